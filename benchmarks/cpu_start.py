# SPDX-License-Identifier: Apache-2.0
"""How long `gptq-compile run` takes to its first token in a new process, and what a process that generates holds.

    python benchmarks/cpu_start.py smollm2 --runs 12          # seconds
    python benchmarks/cpu_start.py smollm2 --memory           # MiB

Seconds go from starting Python until the first byte of text is read from its standard output, and until the process has
ended; files are in the system's cache, byte-code is compiled, and the first run is not counted. Memory is what the
kernel calls VmRSS (shared pages of libraries too), less the weights file and less 100 % of the cache pages that hold
text, after each of a series of requests in one process; each length of prompt is new.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "The three primary colours of light are red, green and"
SERIES = ((5, 1), (32, 128), (100, 8), (333, 8), (512, 8), (700, 8), (1024, 8), (1500, 8), (2000, 8))
"""Tokens of the prompt, and new ones."""
ROOT = str(Path(__file__).resolve().parents[1])


def environment() -> dict[str, str]:
    """This process's, with this checkout in front and byte-code written."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))}


def start(artifact: str, prompt: str, runs: int) -> dict[str, float]:
    """Medians of seconds to the first text, to the end of the process, and of processor time."""
    code = "import sys; from gptq_compile.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", artifact, prompt, "--no-chat", "--max-new-tokens", "1"]
    found: dict[str, list[float]] = {"first": [], "end": [], "cpu": []}
    for run in range(runs + 1):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), cwd="/") as process:
            assert process.stdout is not None
            if not os.read(process.stdout.fileno(), 1):
                raise SystemExit("There was no text.")
            first = time.perf_counter() - begin
            process.stdout.read()
            _, process.returncode, used = os.wait4(process.pid, 0)
        if run:
            for name, value in zip(
                found, (first, time.perf_counter() - begin, used.ru_utime + used.ru_stime), strict=True
            ):
                found[name].append(value)
    rows = {name: statistics.median(values) for name, values in found.items()}
    return {**rows, "first_least": min(found["first"]), "first_most": max(found["first"])}


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def memory(artifact: str) -> None:
    """Prints a line for each request of `SERIES`: resident MiB, and what is left without weights and cache."""
    sys.path.insert(0, ROOT)
    from gptq_compile.runtime.engine import Engine

    engine = Engine.load(artifact, max_batch=1)
    weights = sum(path.stat().st_size for path in Path(artifact).glob("*.safetensors")) / 2**20
    manifest = engine.manifest
    page = manifest.page_size * manifest.cache_bytes_per_token / 2**20
    ids = [(i * 7919) % (manifest.vocab_size - 3) + 3 for i in range(sum(prompt for prompt, _ in SERIES))]
    at = 0
    for done, (prompt, new) in enumerate(SERIES, 1):
        if prompt + new > engine.context_length:
            break
        engine.generate(ids[at : at + prompt], max_new_tokens=new, eos_token_id=[])
        at += prompt
        # Pages are taken in turn, so those that were ever written are the kept ones, and the last of each sequence.
        cache = min((engine.cache.kept_pages + done) * page, (engine.cache.pages + 1) * page)
        resident = _resident()
        print(json.dumps({"prompt": prompt, "new": new, "resident": round(resident, 1), "cache": round(cache, 1),
                          "beside": round(resident - weights - cache, 1)}), flush=True)  # fmt: skip
    engine.close()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", help="a folder that gptq-compile wrote for the CPU")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--memory", action="store_true", help="MiB instead of seconds")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = str(Path(arguments.artifact).resolve())
    if arguments.worker:
        memory(path)
    elif arguments.memory:
        subprocess.run([sys.executable, __file__, path, "--worker"], env=environment(), check=True)
    else:
        print(
            json.dumps({name: round(value, 3) for name, value in start(path, arguments.prompt, arguments.runs).items()})
        )


if __name__ == "__main__":
    main()
