# SPDX-License-Identifier: Apache-2.0
"""Bad input: one sentence on stderr, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from gptq_compile.cli.main import main


class Shell:
    """Runs the command line in an empty folder and looks at what it says and leaves."""

    def __init__(self, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def fails(self, *arguments: object, code: int = 2) -> str:
        """Runs; expects an error; returns its sentence."""
        before = self._tree()
        assert main([str(a) for a in arguments]) == code
        printed = self._capsys.readouterr().err
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, printed
        assert "Traceback" not in printed
        assert self._tree() == before
        sentence = errors[0].removeprefix("error: ")
        assert printed.rstrip().endswith((".", "`"))
        return sentence

    def _tree(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))


@pytest.fixture
def shell(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


@pytest.fixture
def model(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the tiny model to damage."""
    return pathlib.Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def artifact(compiled: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the compiled model to damage."""
    return pathlib.Path(shutil.copytree(compiled.artifact, tmp_path / "artifact"))


RTN = ("--method", "rtn", "--group-size", "32", "-o", "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--wbits", "5"], ["5", "2, 3, 4 or 8"]),
        (["--wbits", "four"], ["--wbits", "four"]),
        (["--group-size", "0"], ["group_size", "0", "-1"]),
        (["--group-size", "-2"], ["group_size", "-2"]),
        (["--damp", "0"], ["damp", "above 0"]),
        (["--nsamples", "0"], ["nsamples", "at least 1"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--target", "tpu"], ["tpu", "cpu, cuda"]),
        (["--target", "cuda:sm_70"], ["sm_70", "sm_80"]),
        (["--target", "cuda:hopper"], ["hopper", "sm_90"]),
        (["--dtype", "int8"], ["int8", "float16"]),
        (["--batch-buckets", "0,1"], ["batch buckets", "1 to 256"]),
        (["--batch-buckets", "a"], ["'a'", "1,2,4,8"]),
        (["--sequential", "no"], ["--sequential", "block"]),
        (["--wbits", "4", "--avg-bits", "3.5"], ["--avg-bits", "--wbits"]),
        (["--avg-bits", "0"], ["avg_bits", "above 0"]),
        (["--max-size", "big"], ["'big'", "90MB"]),
        (["--max-ppl-increase", "x%"], ["'x%'", "5%"]),
        (["--avg-bits", "3", "--method", "rtn"], ["avg_bits", "gptq"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--seq", "3"], ["--seq"]),  # no abbreviations: it could be --seqlen or --sequential
    ],
)
def test_settings_are_checked_before_any_model_is_read(arguments: list[str], words: list[str], shell: Shell) -> None:
    sentence = shell.fails("no-such-model", *arguments)
    assert all(word in sentence for word in words), sentence
    assert "no-such-model" not in sentence


def test_commands_without_what_they_need(shell: Shell, compiled: Any) -> None:
    assert "OUT" in shell.fails("run")
    assert "--text" in shell.fails("eval", compiled.artifact)
    assert "not a folder" in shell.fails("run", "nowhere", "hi")
    assert "manifest.json" in shell.fails("inspect", compiled.model)
    assert "does not exist" in shell.fails("./nowhere", "--target", "cpu")


def test_a_model_without_a_tokenizer(shell: Shell, model: pathlib.Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    assert "tokenizer" in shell.fails(model, *RTN)


def test_a_missing_shard(shell: Shell, model: pathlib.Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in shell.fails(model, *RTN)


def test_a_truncated_shard(shell: Shell, model: pathlib.Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in shell.fails(model, *RTN)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_no_number(value: str, shell: Shell, model: pathlib.Path) -> None:
    def spoil(tensor: Any) -> Any:
        tensor[3, 5] = float(value)
        return tensor

    _rewrite(model, "model.layers.1.mlp.up_proj.weight", spoil)
    assert "model.layers.1.mlp.up_proj.weight" in shell.fails(model, *RTN)


def test_a_tensor_of_the_wrong_shape(shell: Shell, model: pathlib.Path) -> None:
    _rewrite(model, "model.layers.0.self_attn.k_proj.weight", lambda tensor: tensor[:16].clone())
    sentence = shell.fails(model, *RTN)
    assert "model.layers.0.self_attn.k_proj.weight" in sentence and "16" in sentence and "32" in sentence


def test_a_group_larger_than_the_layer(shell: Shell, model: pathlib.Path) -> None:
    sentence = shell.fails(model, "--group-size", "256", "-o", "out")
    assert "256" in sentence and "64" in sentence and "-1" in sentence


def test_an_unknown_model_type(shell: Shell, model: pathlib.Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "frobnicator"}))
    assert "frobnicator" in shell.fails(model, *RTN)


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ("  \n \n", "empty"), ("short", "5 tokens"), (None, "does not exist")]
)
def test_calibration_that_cannot_be_used(
    text: str | None, words: str, shell: Shell, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "calibration.txt"
    if text is not None:
        file.write_text(text)
    arguments = ("--group-size", "32", "--seqlen", "16", "--calibration", file, "-o", "out")
    assert words in shell.fails(model, *arguments)


def test_an_unknown_pass(shell: Shell, model: pathlib.Path) -> None:
    sentence = shell.fails(model, *RTN, "--stop-after", "frobnicate")
    assert "frobnicate" in sentence and "gptq_quantize" in sentence


def test_an_output_folder_that_exists(shell: Shell, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert "--overwrite" in shell.fails(model, *RTN)
    # Even then only what this program wrote is replaced.
    assert "did not write" in shell.fails(model, *RTN, "--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_a_full_disk(shell: Shell, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(module: Any, target: Any, out: pathlib.Path, **_: Any) -> None:
        out.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr("gptq_compile.passes.build.build", full)
    sentence = shell.fails(model, *RTN, "--batch-buckets", "1")
    assert "No space left on device" in sentence


def _damage(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.so", "weights.safetensors", "tokenizer.json", "lib/libtvm_runtime.so"])
def test_a_corrupted_artifact(name: str, shell: Shell, artifact: pathlib.Path) -> None:
    _damage(artifact / name)
    sentence = shell.fails("run", artifact, "hi")
    assert name in sentence and "sha256" in sentence


def test_a_missing_file_and_a_damaged_manifest(shell: Shell, artifact: pathlib.Path) -> None:
    (artifact / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in shell.fails("run", artifact, "hi")
    (artifact / "manifest.json").write_text("{")
    assert "not valid JSON" in shell.fails("eval", artifact, "--text", artifact / "config.json")


def _no_gpu() -> bool:
    import ctypes

    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) != 0
    except (OSError, AttributeError):  # the compiler's stub of the driver has no cuInit
        return True


@pytest.mark.skipif(not _no_gpu(), reason="this machine has a GPU")
def test_a_cuda_artifact_without_a_gpu(shell: Shell, artifact: pathlib.Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["target"] = {"kind": "cuda", "archs": ["sm_90"]}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    sentence = shell.fails("run", artifact, "hi")
    assert "GPU" in sentence or "driver" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x" * 300], ["300", "256"]),  # longer than the context
        (["hi", "--max-new-tokens", "0"], ["max_new_tokens"]),
        (["hi", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["hi", "--temperature", "-1"], ["temperature"]),
        (["hi", "--repetition-penalty", "0"], ["repetition_penalty"]),
        (["hi", "--device", "tpu"], ["tpu"]),
        (["hi", "--threads", "0"], ["threads"]),
        (["hi", "--system", "brief"], ["--system"]),
        ([""], ["prompt"]),
    ],
)
def test_requests_that_cannot_be_served(arguments: list[str], words: list[str], shell: Shell, compiled: Any) -> None:
    sentence = shell.fails("run", compiled.artifact, "--no-chat", *arguments)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (b"hello", ["--window", "64"], "5 tokens"),
        (b"hello", ["--window", "1"], "at least"),
        (b"hello" * 99, ["--window", "16", "--windows", "0"], "windows"),
        (b"hello" * 999, ["--window", "300"], "256"),
        (b"", [], "empty"),
        (b"\xff\xfe\x00", [], "UTF-8"),
        (None, [], "cannot be read"),
    ],
)
def test_texts_that_cannot_be_scored(
    text: bytes | None, arguments: list[str], words: str, shell: Shell, compiled: Any, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_bytes(text)
    assert words in shell.fails("eval", compiled.artifact, "--text", file, *arguments)


def test_a_traceback_comes_only_when_asked_for(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere", "hi", "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_json_tells_errors_as_events(model: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--group-size", "256", "--dry-run", "--json"]) == 2
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "error" and "256" in events[-1]["message"]


def _rewrite(model: pathlib.Path, name: str, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
