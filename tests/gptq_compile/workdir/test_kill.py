# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at random points, resumed: a few here; ``benchmarks/kill_test.py`` does as many as you like.

Run as a program, this file is the process that is killed: it imports and traces once, and forks a child for every run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(command: list[str]) -> list[dict[str, Any]]:
    """Runs a Python program of this checkout and returns the JSON lines it printed."""
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_killed_quantization_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    *points, last = run([__file__, str(tmp_path), "8"])
    assert len(points) == 8 and all(p["same"] for p in points)
    assert sum(p["killed"] for p in points) >= 4, "the kills came too late to test anything"
    assert last["solves"] == 8


def test_a_killed_compilation_goes_on_to_the_same_artifact(tiny_model: Path) -> None:
    settings = ["--group-size", "32", "--nsamples", "2", "--seqlen", "32", "--batch-buckets", "1", "--no-validate"]
    script = str(ROOT / "benchmarks" / "kill_test.py")
    *points, summary = run(
        [script, "--points", "1", "--model", str(tiny_model), "--", "--target", "cpu:x86-64-v3", *settings]
    )
    assert summary["good"] == summary["points"] == len(points) == 1 and summary["files compared"] >= 8


def _driver(folder: Path, count: int) -> None:
    import safetensors.torch
    import torch

    from gptq_compile.frontend.trace import trace
    from gptq_compile.passes.gptq.config import QuantizeConfig
    from gptq_compile.passes.gptq_quantize import GptqQuantize
    from gptq_compile.passes.manager import PassManager
    from gptq_compile.passes.pipeline import trace_passes
    from gptq_compile.workdir.folder import WorkFolder
    from gptq_compile.workdir.work import KeptSolutions
    from tests.architectures import param_store, tiny_config, tiny_model

    program = trace(tiny_config("llama"), param_store(tiny_model("llama")))
    PassManager(trace_passes(), validate=False).run(program)
    ids = torch.randint(0, 250, (8, 64), generator=torch.Generator().manual_seed(5))

    def quantize(place: Path) -> int:
        """Quantizes in a child into ``place``/result; returns its process id."""
        if pid := os.fork():
            return pid
        status = 1
        try:
            with WorkFolder(place / "work", resume=True) as work:
                work.depend("settings", {"wbits": 3})
                GptqQuantize(QuantizeConfig(wbits=3, group_size=32), ids, store=KeptSolutions(work)).run(program)
            tensors = {name: program.params.get(name) for name in program.param_nodes}
            (place / "result").write_bytes(safetensors.torch.save(tensors))
            status = 0
        finally:
            os._exit(status)

    def places(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    start = time.monotonic()
    reference = places("reference")
    assert os.waitpid(quantize(reference), 0)[1] == 0
    seconds = time.monotonic() - start
    expected = (reference / "result").read_bytes()
    rng = random.Random(0)
    for point in range(count):
        place = places(str(point))
        pid = quantize(place)
        time.sleep(rng.uniform(0, 0.9 * seconds))
        os.kill(pid, signal.SIGKILL)
        killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert os.waitpid(quantize(place), 0)[1] == 0
        print(json.dumps({"killed": killed, "same": (place / "result").read_bytes() == expected}), flush=True)
    print(json.dumps({"solves": len(list((reference / "work" / "entries").glob("solve_*")))}), flush=True)


if __name__ == "__main__":
    _driver(Path(sys.argv[1]), int(sys.argv[2]))
