# SPDX-License-Identifier: Apache-2.0
"""Malformed checkpoints: refused by name with exit code 2, nothing crashes, nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptq_compile.cli.main import main
from gptq_compile.errors import ModelError
from gptq_compile.frontend.source import load_source

from .conftest import configure, load_tensors, save_tensors

Tensors = dict[str, torch.Tensor]
UP = "model.layers.0.mlp.up_proj"  # 128 x 64


@pytest.fixture
def refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Compiles the (changed) copy; expects exit code 2 and one sentence, which is returned, and no output."""

    def run() -> str:
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        assert main([str(checkpoint), "-o", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in printed, printed
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before
        return errors[0]

    return run


def _drop(part: str) -> Callable[[Tensors], Any]:
    return lambda t: t.pop(f"{UP}.{part}")


def _put(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda t: t.__setitem__(f"{UP}.{part}", change(t[f"{UP}.{part}"]))


def _filled(position: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[position] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_put("qweight", lambda t: t[:-1]), [f"{UP}.qweight", "8 rows", "it has 7"]),
        (_put("qweight", lambda t: t[:6]), [f"{UP}.qweight", "as many as codes of 3 bits"]),
        (_put("qweight", lambda t: t.half()), [f"{UP}.qweight", "F16"]),
        (_put("qweight", lambda t: t.view(-1)), [f"{UP}.qweight", "2 dimensions"]),
        (_put("qzeros", lambda t: t[:, :-1]), [UP, "zero points of shape [2, 15]", "[2, 16]"]),
        (_put("qzeros", lambda t: t.float()), [f"{UP}.qzeros", "F32"]),
        (_put("scales", lambda t: t[:1]), [UP, "2 groups of 32", "1 rows of scales"]),
        (_put("scales", lambda t: t[:, :64]), [UP, "scales of shape [2, 64]"]),
        (_put("scales", lambda t: t.int()), [f"{UP}.scales", "I32"]),
        (_put("scales", _filled(3, float("nan"))), [f"{UP}", "scales"]),
        (_put("scales", _filled(3, float("inf"))), [f"{UP}", "scales"]),
        (_put("g_idx", _filled(5, 2)), [f"{UP}.g_idx", "group 2", "0 to 1"]),
        (_put("g_idx", _filled(5, -1)), [f"{UP}.g_idx", "group -1"]),
        (_put("g_idx", _filled(5, 1)), [f"{UP}.g_idx", "desc_act is false", "contradict"]),
        (_put("g_idx", lambda t: t[:-8]), [f"{UP}", "56 input features"]),
        (_put("g_idx", lambda t: t.float()), [f"{UP}.g_idx", "F32"]),
        (_drop("scales"), [f"{UP}.scales", "no tensor"]),
        (_drop("qzeros"), [f"{UP}.qzeros", "no tensor"]),
        (_drop("qweight"), [f"{UP}.qweight", "no tensor"]),
        (lambda t: t.__setitem__(f"{UP}.weight", torch.zeros(128, 64)), [f"{UP}.weight", "both"]),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)], [f"{UP}.weight", "no tensor"]),
        (lambda t: [t.__setitem__(k.replace(UP, "model.other"), t.pop(k)) for k in list(t) if k.startswith(UP)],
         [f"{UP}.weight"]),
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight"]),
    ],
)  # fmt: skip
def test_tensors(change: Callable[[Tensors], Any], words: list[str], checkpoint: Path, refused: Any) -> None:
    tensors = load_tensors(checkpoint)
    change(tensors)
    save_tensors(checkpoint, tensors)
    sentence = refused()
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, ["3 bits", "codes of 4 bits"]),
        ({"bits": 5}, ["5", "2, 3, 4 and 8"]),
        ({"bits": "4"}, ["'4'"]),
        ({"bits": True}, ["True"]),
        ({"bits": None}, ["'bits'"]),
        ({"group_size": 64}, ["groups of 64", "rows of scales"]),
        ({"group_size": 0}, ["group_size", "0"]),
        ({"group_size": 1.5}, ["group_size", "1.5"]),
        ({"group_size": None}, ["'group_size'"]),
        ({"sym": True}, ["symmetric", "qzeros"]),
        ({"sym": "yes"}, ["sym", "'yes'"]),
        ({"desc_act": 1}, ["desc_act"]),
        ({"checkpoint_format": "marlin"}, ["marlin"]),
        ({"checkpoint_format": "gptq_p"}, ["gptq_p"]),
        ({"is_marlin_format": True}, ["marlin"]),
        ({"pack_dtype": "int64"}, ["int64"]),
        ({"quant_method": "awq"}, ["awq", "already quantized"]),
        ({"quant_method": None}, []),
        ({"wbits": 3}, ["contradicts itself", "wbits is 3"]),
        ({"format": "gptq_v2"}, ["contradicts itself", "gptq_v2"]),
        ({"dynamic": []}, []),
        ({"dynamic": "x"}, ["dynamic"]),
        ({"dynamic": {"+:(": {"bits": 4}}}, ["'+:('", "not valid"]),
        ({"dynamic": {"+:x": 4}}, ["'+:x'", "not a table"]),
        ({"dynamic": {"+:x": {"bits": 7}}}, ["'+:x'", "7"]),
        ({"dynamic": {"+:x": {"sym": True}}}, ["'sym'", "'+:x'"]),
        ({"dynamic": {f"-:{UP}": {}}}, [UP, "not quantized, but it has codes"]),
    ],
)  # fmt: skip
def test_configs(changes: dict[str, Any], words: list[str], checkpoint: Path) -> None:
    configure(checkpoint, **changes)
    if not words:
        load_source(str(checkpoint))
        return
    with pytest.raises(ModelError) as error:
        load_source(str(checkpoint))
    assert all(word in str(error.value) for word in words), error.value


def test_config_files_that_contradict_each_other(checkpoint: Path, refused: Any) -> None:
    config = json.loads((checkpoint / "quantize_config.json").read_text())
    (checkpoint / "quantize_config.json").write_text(json.dumps({**config, "bits": 3}))
    sentence = refused()
    assert "contradicts itself" in sentence and "bits" in sentence
    (checkpoint / "quantize_config.json").write_text("[" * 100_000)
    assert "quantize_config.json is not valid JSON" in refused()
    (checkpoint / "quantize_config.json").write_text("[]")
    assert "not a table" in refused()


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "..", "", 7, None, ["x"]]
)
def test_an_index_that_leads_out_of_the_folder(file: Any, checkpoint: Path, tmp_path: Path, refused: Any) -> None:
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_tensors(checkpoint), file)}
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index" in refused()


def test_groups_of_other_sizes(checkpoint: Path, refused: Any) -> None:
    tensors = load_tensors(checkpoint)
    tensors[f"{UP}.g_idx"][0] = 1
    save_tensors(checkpoint, tensors)
    configure(checkpoint, desc_act=True)
    assert f"{UP}.g_idx puts 31 input features into group 0" in refused()


def test_desc_act_needs_its_order(checkpoint: Path, refused: Any) -> None:
    tensors = load_tensors(checkpoint)
    save_tensors(checkpoint, {k: v for k, v in tensors.items() if not k.endswith("g_idx")})
    load_source(str(checkpoint))  # natural order needs none
    configure(checkpoint, desc_act=True)
    assert "g_idx" in refused()


def test_mixed_versions_and_a_config_without_codes(write: Any, tmp_path: Path) -> None:
    folder = write("gptq", sym=True)
    tensors = load_tensors(folder)
    tensors[f"{UP}.qzeros"] = tensors[f"{UP}.qzeros"] + 0x11111111
    save_tensors(folder, tensors)
    with pytest.raises(ModelError, match="not one checkpoint"):
        load_source(str(folder))
    floats = {k: v for k, v in tensors.items() if not k.endswith(("qweight", "qzeros", "g_idx", "scales"))}
    save_tensors(folder, floats)
    with pytest.raises(ModelError, match=r"no tensor called '\.\.\.\.qweight'"):
        load_source(str(folder))


def test_fuzzed_headers(checkpoint: Path) -> None:
    """Random damage to the header of the shard: read as it was, or refused with a sentence; never anything else."""
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    random = np.random.default_rng(0)
    names = [n for n in header if n != "__metadata__"]
    refusals = 0
    for i in range(160):
        kind = i % 5
        if kind == 0:  # bytes of the header
            content = bytearray(whole)
            for _ in range(int(random.integers(1, 8))):
                content[int(random.integers(0, 8 + length))] = int(random.integers(0, 256))
        elif kind == 1:  # its length
            content = bytearray(int(random.integers(0, 2**63)).to_bytes(8, "little") + whole[8:])
        elif kind == 2:  # the end
            content = bytearray(whole[: int(random.integers(0, len(whole)))])
        else:  # what it says of one tensor
            name = names[int(random.integers(len(names)))]
            entry = dict(header[name])
            if kind == 3:
                entry["shape"] = random.integers(-2, 300, int(random.integers(0, 4))).tolist()
            else:
                key = ["dtype", "data_offsets", "shape"][int(random.integers(3))]
                odd: list[Any] = ["F4", "I8", "U64", None, [], {}, -1, [0, 0], [5, 2], [0, 2**62], "x"]
                entry[key] = odd[int(random.integers(len(odd)))]
            text = json.dumps({**header, name: entry}).encode()
            content = bytearray(len(text).to_bytes(8, "little") + text + whole[8 + length :])
        file.write_bytes(content)
        try:
            load_source(str(checkpoint))
        except ModelError as error:
            assert str(error).endswith((".", ")"))
            refusals += 1
    assert refusals >= 120
