# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at random points of a compilation, resumed each time: is the artifact that of an uninterrupted run?

    python benchmarks/kill_test.py --points 50 [--model FOLDER] [-- more arguments of gptq-compile]

Half of the points are uniform over the time of the whole run, half over its quantization. Every run is a process of its
own, forked from one that has imported everything but started no thread, so that a run takes seconds; the killed and the
resuming process share nothing but the disk. One JSON line a point and a summary are printed; the exit code is 1 if
any artifact differs, any solve was done twice, or anything half-written was left behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_SETTINGS = [
    "--target", "cpu", "--wbits", "3", "--group-size", "32", "--nsamples", "16", "--seqlen", "128",
    "--batch-buckets", "1", "--no-validate",
]  # fmt: skip


def main() -> int:
    """Runs the test; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: a random llama of two layers)")
    parser.add_argument("settings", nargs="*", help="arguments of gptq-compile, after --")
    arguments = parser.parse_args()
    settings = arguments.settings or _SETTINGS
    with tempfile.TemporaryDirectory(prefix="kill-test-") as scratch:
        folder = Path(scratch)
        model = arguments.model or random_llama(folder / "model")
        _import_everything()
        return _test(folder, [str(model.absolute()), *settings], arguments.points, random.Random(arguments.seed))


def _test(folder: Path, command: list[str], points: int, rng: random.Random) -> int:
    started = time.monotonic()
    reference = Run([*command, "-o", str(folder / "reference")], folder / "reference.log")
    if reference.wait():
        raise SystemExit(f"The uninterrupted run failed:\n{reference.log.read_text()}")
    expected = contents(folder / "reference")
    begin, end = reference.span("quantize")
    shutil.rmtree(folder / "reference")
    bad, stages, kept = 0, Counter[str](), []
    for point in range(points):
        # A stage's beginning is waited for, because on a busy machine no two runs take the same time.
        after, at = ("", rng.uniform(0, reference.seconds)) if point % 2 else ("quantize", rng.uniform(0, end - begin))
        result = _kill_and_resume(folder / f"point-{point}", command, after, at, expected)
        shutil.rmtree(folder / f"point-{point}")
        print(json.dumps({"point": point, **result}), flush=True)
        bad += not result["good"]
        stages[result["stage"]] += 1
        kept.append(result["solves"])
    summary = {
        "points": points,
        "good": points - bad,
        "killed during": dict(stages),
        "solves kept": {"least": min(kept), "most": max(kept), "mean": round(sum(kept) / len(kept), 1)},
        "uninterrupted seconds": round(reference.seconds, 2),
        "quantization seconds": round(end - begin, 2),
        "files compared": len(expected),
        "all seconds": round(time.monotonic() - started),
    }
    print(json.dumps(summary), flush=True)
    return 1 if bad else 0


def _kill_and_resume(
    folder: Path, command: list[str], after: str, at: float, expected: dict[str, str]
) -> dict[str, Any]:
    """Kills a run ``at`` seconds after a stage has begun (or its start), resumes it, and looks at what is there."""
    folder.mkdir()
    out, work = folder / "out", folder / "work"
    command = [*command, "-o", str(out), "--work-dir", str(work), "--resume"]
    run = Run(command, folder / "killed.log")
    while after and after not in (e.get("name") for e in run.events()):
        time.sleep(0.01)
    time.sleep(at)
    killed = run.kill()
    solves = {p: p.stat().st_mtime_ns for p in work.glob("entries/solve_*") if p.suffix != ".writing"}
    journal = (work / "journal.jsonl").read_text() if (work / "journal.jsonl").exists() else ""
    named = journal.count('{"entry": "solve ')
    resumed = Run(command, folder / "resumed.log")
    status = resumed.wait()
    problems = []
    if status:
        problems.append(f"resuming ended with {status}: {resumed.log.read_text()[-500:]}")
    elif contents(out) != expected:
        found = contents(out)
        problems.append(f"differ: {[n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n)]}")
    # The last file may have been in place without its journal line; all others must not be written again.
    again = [p.name for p, t in solves.items() if p.stat().st_mtime_ns != t]
    if len(again) > len(solves) - named:
        problems.append(f"solved twice: {again}")
    known = {"out", "work", "killed.log", "resumed.log"}
    if left := [p.name for p in folder.iterdir() if p.name not in known] + [p.name for p in work.rglob("*.writing")]:
        problems.append(f"left behind: {left}")
    return {
        "good": not problems,
        "at": round(at, 3),
        "stage": run.last_stage() if killed else "after the end",
        "solves": len(solves),
        "resumed seconds": round(resumed.seconds, 2),
        **({"problems": problems} if problems else {}),
    }


class Run:
    """One ``gptq-compile --json`` in a forked process, its output in a log."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log, self.seconds = log, 0.0
        self._began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                from gptq_compile.cli.main import main as compile_main

                status = compile_main([*command, "--json"])
            finally:
                os._exit(status)

    def wait(self) -> int:
        """The exit code."""
        _, status = os.waitpid(self.pid, 0)
        self.seconds = time.monotonic() - self._began
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> bool:
        """Kills it; whether it was still running."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def events(self) -> list[dict[str, Any]]:
        """What it reported; the last line may be cut short."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]

    def last_stage(self) -> str:
        """The stage it was in."""
        return next((e["name"] for e in reversed(self.events()) if e["event"] == "stage"), "start")

    def span(self, stage: str) -> tuple[float, float]:
        """Seconds since the start at which a stage began and ended."""
        stages = [e for e in self.events() if e["event"] in ("stage", "done")]
        index = next(i for i, e in enumerate(stages) if e.get("name") == stage)
        return stages[index]["time"], stages[index + 1]["time"]


def contents(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file below a folder but the report, in which there are times."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "report.html")
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def random_llama(folder: Path) -> Path:
    """Saves a llama of two layers with random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = AutoConfig.for_model(
        "llama", vocab_size=258, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _import_everything() -> None:
    import gptq_compile.api
    import gptq_compile.cli.compile
    import gptq_compile.cli.reporters
    import gptq_compile.kernels.tvm_env
    import gptq_compile.passes.build
    import gptq_compile.passes.lower_to_relax  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
