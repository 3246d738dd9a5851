# SPDX-License-Identifier: Apache-2.0
"""An artifact appears whole or not at all, and the runtime reads what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from gptq_compile.artifact import files
from gptq_compile.artifact.writer import ArtifactWriter
from gptq_compile.errors import OutputError
from gptq_compile.runtime.artifact import Artifact

MANIFEST = {
    "model": {
        "name": "m", "model_type": "llama", "source": "s", "vocab_size": 4, "context_length": 8, "bos_token_id": None,
        "eos_token_ids": [1], "add_bos": False,
    },
    "target": {"kind": "cpu", "archs": []},
    "dtype": "float32",
    "quantization": {},
    "kv_cache": {"page_size": 16, "dtype": "float32", "layers": [{"kv_heads": 1, "head_dim": 4, "v_head_dim": 4}]},
    "entries": {
        "forward": "forward", "decode": {"1": "decode_1"}, "sample": "sample", "advance": "advance",
        "repetition_penalty": "repetition_penalty", "mark_seen": "mark_seen",
    },
    "library": "model.so",
    "generation": {},
    "chat": None,
    "versions": {},
}  # fmt: skip
WEIGHTS = [
    ("b", np.arange(3, dtype=np.uint8)),
    ("a", np.arange(6, dtype=np.float16).reshape(2, 3)),
    ("c", torch.arange(4, dtype=torch.bfloat16)),
    ("d", np.arange(5, dtype=np.uint32)[::-1]),
]


def write(out, **kwargs):
    with ArtifactWriter(out, **kwargs) as artifact:
        artifact.add_file(b"\x7fELF", "model.so")
        artifact.add_file(b"{}", "lib/libtvm_ffi.so")
        artifact.add_weights(iter(WEIGHTS), metadata={"made_by": "test"})
        return artifact.finish(MANIFEST)


def nothing_left(folder) -> bool:
    return not list(folder.iterdir())


def test_a_signal_while_it_is_removed_leaves_nothing(tmp_path, monkeypatch):
    remove, calls = files.shutil.rmtree, []

    def interrupted(path, ignore_errors=False):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "deep" / "out") as artifact:
        artifact.add_file(b"{}", "lib/libtvm_ffi.so")
        raise OSError("something else")
    assert len(calls) == 2 and nothing_left(tmp_path)


def test_the_runtime_reads_it(tmp_path):
    out = write(tmp_path / "out")
    assert out == tmp_path / "out" and os.listdir(tmp_path) == ["out"]
    artifact = Artifact(out)
    assert [w.name for w in artifact.manifest.weights] == ["b", "a", "c", "d"]
    assert [w.dtype for w in artifact.manifest.weights] == ["uint8", "float16", "bfloat16", "uint32"]
    for weight, (_, tensor) in zip(artifact.manifest.weights, WEIGHTS, strict=True):
        want = tensor.view(torch.uint16).numpy() if isinstance(tensor, torch.Tensor) else tensor
        got = artifact.weight(weight)
        assert np.array_equal(got, want)
        assert got.ctypes.data % 64 == 0  # usable in place
    assert set(artifact.manifest.files) == {"model.so", "lib/libtvm_ffi.so", "weights.safetensors"}
    for name, entry in artifact.manifest.files.items():
        content = (out / name).read_bytes()
        assert (entry.sha256, entry.size) == (hashlib.sha256(content).hexdigest(), len(content))


def test_the_reference_library_reads_the_weights(tmp_path):
    from safetensors import safe_open

    out = write(tmp_path / "out")
    with safe_open(out / "weights.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "gptq-compile", "made_by": "test"}
        for name, tensor in WEIGHTS:
            want = torch.from_numpy(tensor.copy()) if isinstance(tensor, np.ndarray) else tensor
            assert torch.equal(f.get_tensor(name), want)


def test_weights_may_lie_in_two_files(tmp_path):
    with ArtifactWriter(tmp_path / "out") as artifact:
        artifact.add_file(b"x", "model.so")
        artifact.add_weights([("a", np.ones(2, np.float32))])
        artifact.add_weights([("b", np.zeros(2, np.float32))], file="more.safetensors")
        artifact.finish(MANIFEST)
    read = Artifact(tmp_path / "out")
    assert [w.file for w in read.manifest.weights] == ["weights.safetensors", "more.safetensors"]
    assert np.array_equal(read.weight(read.manifest.weights[1]), [0, 0])


def test_files_are_copied(tmp_path):
    (tmp_path / "real.so").write_bytes(b"library")
    (tmp_path / "link.so").symlink_to(tmp_path / "real.so")
    with ArtifactWriter(tmp_path / "out") as artifact:
        artifact.add_files({"model.so": tmp_path / "link.so", "config.json": b"{}"})
        artifact.finish(MANIFEST)
    assert not (tmp_path / "out" / "model.so").is_symlink()
    assert (tmp_path / "out" / "model.so").read_bytes() == b"library"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_nothing_is_left_by_an_error(tmp_path, error):
    with pytest.raises(type(error)), ArtifactWriter(tmp_path / "new" / "deep" / "out") as artifact:
        artifact.add_file(b"x", "model.so")
        raise error
    assert nothing_left(tmp_path)


def test_nothing_is_left_by_an_error_between_weights(tmp_path):
    def weights():
        yield "a", np.ones(3, np.int8)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError), ArtifactWriter(tmp_path / "out") as artifact:
        artifact.add_weights(weights())
    assert nothing_left(tmp_path)


def test_nothing_is_left_without_finish(tmp_path):
    with ArtifactWriter(tmp_path / "out") as artifact:
        artifact.add_file(b"x", "model.so")
    assert nothing_left(tmp_path)


def test_existing_folder(tmp_path):
    out = write(tmp_path / "out")
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(OutputError) as error:
        write(out)
    assert str(error.value) == (f"The output folder {out} exists and is not empty; choose another or pass --overwrite.")
    assert (out / "manifest.json").read_bytes() == before


def test_empty_folder_and_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("of the artifact before")
    write(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_only_artifacts_are_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(OutputError, match="holds something that gptq-compile did not write, so it is not overwritten"):
        write(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_failed_overwrite_keeps_the_old_one(tmp_path):
    out = write(tmp_path / "out")
    with pytest.raises(ValueError), ArtifactWriter(out, overwrite=True) as artifact:
        artifact.add_file(b"new", "model.so")
        raise ValueError
    assert (Artifact(out).folder / "model.so").read_bytes() == b"\x7fELF"
    assert os.listdir(tmp_path) == ["out"]


def test_output_is_a_file(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="exists and is not a folder; choose another name"):
        write(tmp_path / "out")


def test_output_under_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"The output folder .*file/out cannot be created: "):
        write(tmp_path / "file" / "out")
    assert os.listdir(tmp_path) == ["file"]


def test_too_little_space_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "available_bytes", lambda path: 1_500_000)
    with pytest.raises(OutputError) as error:
        write(tmp_path / "out", disk_needed=2_000_000_000)
    assert str(error.value) == (f"The output folder {tmp_path / 'out'} needs 2.0 GB, and its disk has 1.5 MB free.")
    with pytest.raises(OutputError, match=r"needs 2\.0 GB"):
        ArtifactWriter(tmp_path / "out", disk_needed=2_000_000_000).check()
    assert nothing_left(tmp_path)


def test_real_write_failure(tmp_path):
    """The kernel refuses the write: a file size limit stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OutputError) as error, ArtifactWriter(tmp_path / "out", disk_needed=1000) as artifact:
            artifact.add_weights([("a", np.zeros(1_000_000, np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert str(error.value).startswith(
        f"Writing {tmp_path / 'out'} failed: {os.strerror(errno.EFBIG)} (it needs 1.0 kB in all, and its disk has "
    )
    assert str(error.value).endswith("free). Nothing was left behind.")
    assert nothing_left(tmp_path)


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from gptq_compile.artifact.writer import ArtifactWriter
with ArtifactWriter(sys.argv[1]) as artifact:
    artifact.add_file(b"x" * 1000, "model.so")
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), "SIGKILL"], cwd=root, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(os.listdir(tmp_path)) == 1
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_interrupted_by_ctrl_c(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), "SIGINT"]
    run = subprocess.run(command, cwd=root, check=False, stderr=subprocess.PIPE)
    assert b"KeyboardInterrupt" in run.stderr
    assert nothing_left(tmp_path)


def test_another_run_at_work_is_left_alone(tmp_path):
    with ArtifactWriter(tmp_path / "out") as first:
        mine = first._folder.path
        other = tmp_path / mine.name.replace(str(os.getpid()), "1")
        mine.rename(other)  # what another process' folder looks like
        with ArtifactWriter(tmp_path / "out") as second:
            second.add_file(b"x", "model.so")
            assert other.is_dir()
            second.finish(MANIFEST)
        other.rename(mine)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "."])
def test_names_stay_inside(tmp_path, name):
    with (
        pytest.raises(OutputError, match="is not the name of a file inside"),
        ArtifactWriter(tmp_path / "out") as artifact,
    ):
        artifact.add_file(b"x", name)


def test_names_once(tmp_path):
    with (
        pytest.raises(OutputError, match=r"config\.json would be written twice"),
        ArtifactWriter(tmp_path / "out") as artifact,
    ):
        artifact.add_file(b"x", "config.json")
        artifact.add_file(b"x", "config.json")
    with pytest.raises(OutputError, match="'a' would be written twice"), ArtifactWriter(tmp_path / "out") as artifact:
        artifact.add_weights([("a", np.ones(1, np.int8)), ("a", np.ones(1, np.int8))])


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({**MANIFEST, "files": {}}, "The manifest's files are filled in"),
        ({**MANIFEST, "library": "other.so"}, "names the library other.so, which was not added"),
        ({**MANIFEST, "quantization": {"error": float("nan")}}, "cannot be written as JSON"),
        ({**MANIFEST, "quantization": {"error": np.float32(1)}}, "cannot be written as JSON"),
    ],
)
def test_bad_manifest(tmp_path, manifest, words):
    with pytest.raises(OutputError, match=words), ArtifactWriter(tmp_path / "out") as artifact:
        artifact.add_file(b"x", "model.so")
        artifact.finish(manifest)
    assert nothing_left(tmp_path)


def test_unknown_dtype(tmp_path):
    with pytest.raises(OutputError, match="'a' has dtype float64"), ArtifactWriter(tmp_path / "out") as artifact:
        artifact.add_weights([("a", np.ones(1))])


def test_manifest_is_plain_json(tmp_path):
    document = json.loads((write(tmp_path / "out") / "manifest.json").read_text("utf-8"))
    assert (document["format"], document["schema_version"]) == ("gptq-compile", 1)
    assert document["weights"][1] == {"name": "a", "shape": [2, 3], "dtype": "float16"}
