# SPDX-License-Identifier: Apache-2.0
"""What was compiled for the CPU taken apart again: exported, compiled anew, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import gptq_compile
from gptq_compile.cli.main import main
from gptq_compile.errors import ModelError
from gptq_compile.frontend.source import load_source


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "tiny"
    options = [
        "--wbits",
        "3",
        "--group-size",
        "32",
        "--method",
        "rtn",
        "--target",
        "cpu:x86-64-v3",
        "--batch-buckets",
        "1",
        "--activations",
        "float",
        "--kv-cache",
        "float32",
        "--json",
    ]
    assert main([str(tiny_model), *options, "-o", str(out)]) == 0
    return out


def test_an_artifact_exports_to_the_same_model(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from tests.onnx_check import OrtModel

    assert main(["export-onnx", str(artifact), "-o", str(tmp_path / "onnx"), "--json"]) == 0
    ids = np.random.default_rng(0).integers(0, 250, (1, 12))
    got = OrtModel(tmp_path / "onnx" / "model.onnx").logits(ids, [12])[0].astype("float64")
    with gptq_compile.Engine.load(artifact) as engine:
        wanted = engine.logits(ids[0]).astype("float64")
    assert np.square(got - wanted).sum() <= 1e-9 * np.square(wanted).sum()


def test_compiled_again_it_has_the_same_weights(artifact: Path, tmp_path: Path) -> None:
    options = ["--target", "cpu:x86-64-v3", "--batch-buckets", "1", "--json"]
    assert main([str(artifact), *options, "-o", str(tmp_path / "again")]) == 0
    with (
        safe_open(artifact / "weights.safetensors", "pt") as first,
        safe_open(tmp_path / "again" / "weights.safetensors", "pt") as second,
    ):
        assert set(first.keys()) == set(second.keys())
        for name in first.keys():  # noqa: SIM118 - not a mapping
            assert np.array_equal(first.get_tensor(name).numpy(), second.get_tensor(name).numpy()), name


def changed(artifact: Path, folder: Path, **values: object) -> Path:
    """A copy whose manifest says something else."""
    shutil.copytree(artifact, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))
    return folder


def test_what_cannot_be_taken_apart_is_refused_by_name(artifact: Path, tmp_path: Path) -> None:
    cuda = changed(artifact, tmp_path / "cuda", target={"kind": "cuda", "archs": ["sm_90"]})
    with pytest.raises(ModelError, match=r"was compiled for cuda.*the model it was compiled from"):
        load_source(str(cuda))
    with pytest.raises(ModelError, match="not a valid manifest"):
        load_source(str(changed(artifact, tmp_path / "broken", quantization={"layers": 3, "sym": True})))
    quantization = json.loads((artifact / "manifest.json").read_text())["quantization"]
    layer = quantization["layers"][0]
    wide = quantization | {"layers": [layer | {"shape": [layer["shape"][0] + 64, layer["shape"][1]]}]}
    with pytest.raises(ModelError, match=rf"{layer['name']}.*has shape.*Compile the model again"):
        load_source(str(changed(artifact, tmp_path / "wide", quantization=wide)))
    other = quantization | {"layers": [layer | {"name": "model.layers.0.experts"}]}
    with pytest.raises(ModelError, match=r"does not hold the linear 'model.layers.0.experts' by itself"):
        load_source(str(changed(artifact, tmp_path / "experts", quantization=other)))
