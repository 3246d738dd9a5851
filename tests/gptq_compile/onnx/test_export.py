# SPDX-License-Identifier: Apache-2.0
"""The exported folder: what is in it, what ONNX's checker says, and what happens when it cannot be made."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import shape_inference

from gptq_compile.cli.main import main
from gptq_compile.errors import PassError
from gptq_compile.onnx.export import LIBRARY
from gptq_compile.onnx.lowering import RULES, Lowering
from tests.onnx_check import OrtModel, quantized

OPTIONS = ["--wbits", "3", "--group-size", "32", "--method", "rtn", "--json"]


@pytest.fixture(scope="module")
def exported(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("onnx") / "tiny"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["export-onnx", str(tiny_model), *OPTIONS, "-o", str(out)]) == 0
    last = json.loads(said.getvalue().splitlines()[-1])
    assert last["event"] == "done" and last["format"] == "onnx" and last["command"] is None
    return out


def test_the_folder_is_whole(exported: pathlib.Path) -> None:
    names = {p.name for p in exported.iterdir()}
    assert {
        "model.onnx", "model.onnx.data", "genai_config.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    } <= names  # fmt: skip
    config = json.loads((exported / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 16)
    assert config["model"]["eos_token_id"] == 257 and config["search"]["past_present_share_buffer"]


def test_the_model_is_valid_and_describes_itself(exported: pathlib.Path) -> None:
    onnx.checker.check_model(str(exported / "model.onnx"), full_check=True)
    proto = onnx.load(exported / "model.onnx", load_external_data=False)
    proto = shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True, check_type=True)
    known = {v.name for v in [*proto.graph.value_info, *proto.graph.output]}
    assert [n.name for n in proto.graph.node if not set(n.output) <= known] == []  # every value has a shape
    properties = {p.key: p.value for p in proto.metadata_props}
    assert properties["producer"] == "gptq-compile" and properties["wbits"] == "3" and properties["group_size"] == "32"
    assert len(json.loads(properties["layers"])) == 14
    assert [
        n for n in proto.graph.node if n.op_type == "MatMulNBits" and len(n.input) > 4 and n.input[4]
    ] == []  # g_idx
    inputs, outputs = ([v.name for v in values] for values in (proto.graph.input, proto.graph.output))
    assert inputs[:3] == ["input_ids", "position_ids", "attention_mask"] and outputs[0] == "logits"
    assert inputs[3:] == [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert outputs[1:] == [f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value")]


def test_genai_generates_what_onnxruntime_says(exported: pathlib.Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed here")
    prompt, count = [10, 20, 30], 12
    model = OrtModel(exported / "model.onnx")
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(np.array([ids]), [len(ids)])[0, -1].argmax()))
    made = og.Model(str(exported))
    parameters = og.GeneratorParams(made)
    parameters.set_search_options(max_length=len(ids), do_sample=False)
    generator = og.Generator(made, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    got = [int(t) for t in generator.get_sequence(0)]
    assert got == ids[: len(got)] and (len(got) == len(ids) or got[-1] == 257)


def test_only_exports_are_overwritten(
    exported: pathlib.Path, tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-onnx", str(tiny_model), *OPTIONS, "-o", str(exported)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.onnx").write_bytes(b"something else")
    assert main(["export-onnx", str(tiny_model), *OPTIONS, "--overwrite", "-o", str(other)]) == 2
    assert "did not write" in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["model.onnx"]
    assert main(["export-onnx", str(tiny_model), *OPTIONS, "--overwrite", "-o", str(exported)]) == 0


def test_an_op_without_a_form_is_refused_before_anything_is_written(
    tiny_model: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Lowering(quantized("llama", num_hidden_layers=1)).run()  # fills the table
    monkeypatch.delitem(RULES, torch.ops.aten.cos.default)
    with pytest.raises(PassError, match=r"cos.* in module model\.rotary_emb .* has no form in ONNX"):
        Lowering(quantized("llama", num_hidden_layers=1)).run()
    assert main(["export-onnx", str(tiny_model), *OPTIONS, "-o", str(tmp_path / "out")]) == 2
    assert "has no form in ONNX" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_custom_operators_run_with_their_library(
    exported: pathlib.Path, tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "custom"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["export-onnx", str(tiny_model), *OPTIONS, "--ops", "custom", "-o", str(out)]) == 0
    config = json.loads((out / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY
    custom, stock = OrtModel(out / "model.onnx", library=out / LIBRARY), OrtModel(exported / "model.onnx")
    assert {p.key: p.value for p in custom.proto.metadata_props}["ops"] == "custom"
    assert "QuantLinear" in custom.operators() and "MatMulNBits" not in custom.operators()
    outputs = [len(node.output) for node in custom.proto.graph.node if node.op_type == "QuantLinear"]
    assert sorted(outputs) == [1, 1, 1, 1, 2, 2, 3, 3]  # two layers: o and down; gate and up; q, k and v
    ids = np.random.default_rng(0).integers(0, 200, (1, 9))
    got, want = custom.logits(ids, [6, 1, 1, 1]), stock.logits(ids, [6, 1, 1, 1])
    assert np.sum((got - want) ** 2) <= 1e-7 * np.sum(want**2)
    words = sum(np.prod(t.dims) for t in custom.proto.graph.initializer if t.name.endswith(".qweight"))
    attributes = [{a.name: a.i for a in n.attribute} for n in custom.proto.graph.node if n.op_type == "QuantLinear"]
    assert 32 * words == 3 * sum(a["in_features"] * a["out_features"] for a in attributes)  # bits


def test_custom_operators_need_a_compiler_before_anything_is_quantized(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["export-onnx", str(tiny_model), *OPTIONS[:-1], "--ops", "custom", "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "No C compiler" in said.err and "quantizing" not in said.out
    assert not (tmp_path / "out").exists()
