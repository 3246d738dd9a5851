# SPDX-License-Identifier: Apache-2.0
"""One compilation by two processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., object]) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    (folder / "text.txt").write_text("Two processes read these words together. " * 60)
    return folder


def _compile(model: Path, out: Path, *more: str, processes: int = 1) -> list[subprocess.CompletedProcess[str]]:
    """Runs the command in so many processes; a checkpoint, since that needs no machine code."""
    command = [
        sys.executable, "-m", "gptq_compile.cli.main", str(model), "-o", str(out), "--format", "gptq_v2",
        "--device", "cpu", "--calibration", str(model / "text.txt"), "--nsamples", "6", "--seqlen", "48",
        "--group-size", "16", *more,
    ]  # fmt: skip
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(processes)}
    running = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        running.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
            )
        )
    done = []
    for process in running:
        out_text, error_text = process.communicate(timeout=240)
        done.append(subprocess.CompletedProcess(command, process.returncode, out_text, error_text))
    return done


def test_two_processes_make_what_one_makes_and_take_over_its_work(model: Path, tmp_path: Path) -> None:
    work = ("--work-dir", str(tmp_path / "work"))
    alone = _compile(model, tmp_path / "alone")
    first, second = _compile(model, tmp_path / "both", *work, processes=2)
    assert [alone[0].returncode, first.returncode, second.returncode] == [0, 0, 0], first.stderr + second.stderr
    assert "quantizing" in first.stdout and second.stdout == ""
    one, both = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("alone", "both"))
    assert one.keys() == both.keys()
    words = [name for name in one if name.endswith("qweight")]
    assert words
    for name in words:
        assert (one[name] != both[name]).mean() < 0.05, name  # ties only

    again = _compile(model, tmp_path / "again", *work, "--resume", processes=2)
    assert [done.returncode for done in again] == [0, 0], again[0].stderr + again[1].stderr
    assert "were finished by an earlier run" in again[0].stdout
    taken = load_file(next((tmp_path / "again").glob("*.safetensors")))
    assert all((taken[name] == both[name]).all() for name in both)


def test_the_first_process_refuses_for_all(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    first, second = _compile(model, tmp_path / "out", processes=2)
    assert first.returncode == 2 and "exists and is not empty" in first.stderr
    assert second.returncode != 0
    assert (tmp_path / "out" / "kept.txt").read_text() == "mine"
