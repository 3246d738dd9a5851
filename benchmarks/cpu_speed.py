# SPDX-License-Identifier: Apache-2.0
"""Speed on a CPU of what we compile, of llama.cpp and of onnxruntime-genai, on one machine in one run.

    pip install llama-cpp-python                  # what is not installed is left out
    python benchmarks/cpu_speed.py smollm2 --gguf SmolLM2-135M-Instruct.gguf --genai smollm2-onnx

Every contender is a process of its own; they take turns, round by round, and medians over the rounds are told. Decode:
the tokens after a prompt of 32, greedily; llama.cpp is spared choosing them. Prefill: the time to the first token after
512, which nobody has in a cache. Q4_0 and Q4_1 are made of the GGUF file by llama.cpp itself. The read ceiling is a
kernel of our compiler that does nothing but read, for about as long as the others decode: 32 times 1 GiB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, NEW, PREFILL, CONTEXT = 32, 128, 512, 1024
CEILING_BYTES, READS = 1 << 30, 32

Contender = tuple[Callable[[], float], Callable[[], float]]
"""Seconds of `NEW` tokens after a prompt of `PROMPT`, and of a prompt of `PREFILL`."""


def _ids(vocabulary: int, count: int) -> list[int]:
    return np.random.default_rng(0).integers(3, vocabulary, count).tolist()


def ours(path: str, threads: int) -> Contender:
    """An artifact; ``TVM_NUM_THREADS`` says how many threads."""
    from gptq_compile.runtime.engine import Engine

    engine = Engine.load(path, cache_tokens=CONTEXT)
    ids = _ids(engine.manifest.vocab_size, PREFILL)

    def generate(prompt: list[int], new: int) -> Any:
        engine.cache.forget()
        return engine.generate(prompt, max_new_tokens=new, eos_token_id=[], return_dict_in_generate=True)

    def decode() -> float:
        return NEW / float(generate(ids[:PROMPT], NEW + 1).tokens_per_second)

    def prefill() -> float:
        start = time.perf_counter()
        generate(ids, 1)
        return time.perf_counter() - start

    return decode, prefill


def llama(path: str, threads: int) -> Contender:
    """A GGUF file in llama.cpp."""
    from llama_cpp import Llama

    model = Llama(path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, n_batch=PREFILL, n_ubatch=PREFILL,
                  verbose=False)  # fmt: skip
    ids = _ids(model.n_vocab(), PREFILL)

    def timed(tokens: list[int]) -> float:
        start = time.perf_counter()
        model.eval(tokens)
        return time.perf_counter() - start

    def decode() -> float:
        model.reset()
        model.eval(ids[:PROMPT])
        start = time.perf_counter()
        for _ in range(NEW):
            model.eval([ids[0]])
        return time.perf_counter() - start

    def prefill() -> float:
        model.reset()
        return timed(ids)

    return decode, prefill


def genai(path: str, threads: int) -> Contender:
    """An exported model in onnxruntime-genai."""
    import onnxruntime_genai as og

    config = og.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    vocabulary = json.loads((Path(path) / "genai_config.json").read_text())["model"]["vocab_size"]
    ids = _ids(vocabulary, PREFILL)

    def generator(tokens: list[int], new: int) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(tokens) + new, min_length=len(tokens) + new, do_sample=False)
        made = og.Generator(model, params)
        made.append_tokens(np.array([tokens], np.int32))
        made.generate_next_token()
        return made

    def decode() -> float:
        made = generator(ids[:PROMPT], NEW + 1)
        start = time.perf_counter()
        for _ in range(NEW):
            made.generate_next_token()
        return time.perf_counter() - start

    def prefill() -> float:
        start = time.perf_counter()
        generator(ids, 1)
        return time.perf_counter() - start

    return decode, prefill


def ceiling(path: str, threads: int) -> Contender:
    """Reads `CEILING_BYTES` with all threads, mean of `READS`, for both times. Runs of 256 bytes, four sums each."""
    from gptq_compile.kernels.script import Function, on_stack, script, store
    from gptq_compile.kernels.target import Target
    from gptq_compile.kernels.tvm_env import tvm

    target, ir = Target.parse("cpu:x86-64-v3"), script()
    parts, lanes = 64, 16
    steps = CEILING_BYTES // (parts * 4 * lanes * 4)
    with Function("read") as f:
        x = f.tensor("x", (parts, steps, 4, lanes), "int32")
        out = f.tensor("out", (parts, lanes), "int32")
        with ir.parallel(parts) as part:
            sums = [on_stack(lanes, "int32") for _ in range(4)]
            for each in sums:
                with ir.vectorized(lanes) as lane:
                    store(each, (lane,), ir.int32(0))
            with ir.serial(steps) as step:
                for i, each in enumerate(sums):
                    with ir.vectorized(lanes) as lane:
                        store(each, (lane,), each[lane] + x[part, step, i, lane])
            with ir.vectorized(lanes) as lane:
                store(out, (part, lane), sums[0][lane] + sums[1][lane] + sums[2][lane] + sums[3][lane])
    func = f.result().with_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
    read = tvm.compile(func, target=target.tvm())["read"]
    data = tvm.runtime.tensor(np.ones((parts, steps, 4, lanes), np.int32))
    total = tvm.runtime.tensor(np.zeros((parts, lanes), np.int32))

    def once() -> float:
        start = time.perf_counter()
        for _ in range(READS):
            read(data, total)
        return (time.perf_counter() - start) / READS

    return once, once


CONTENDERS: dict[str, Callable[[str, int], Contender]] = {
    "gptq-compile": ours, "llama.cpp": llama, "onnxruntime-genai": genai, "read": ceiling,
}  # fmt: skip


def work(kind: str, path: str, threads: int) -> None:
    """The process of a contender: answers each line on stdin, ``decode`` or ``prefill``, with seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    decode, prefill = CONTENDERS[kind](path, threads)
    for line in sys.stdin:
        answers.write(f"{(decode if line.strip() == 'decode' else prefill)()}\n")
        answers.flush()


class Process:
    """A contender's process."""

    def __init__(self, kind: str, path: str, threads: int, python: str) -> None:
        here = Path(__file__).resolve()
        environment = {**os.environ, "TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here.parents[1]), os.environ.get("PYTHONPATH")]))
        command = [python, str(here), "--worker", kind, path, "--threads", str(threads)]
        self.name = f"{kind} {Path(path).stem}".strip()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip

    def ask(self, what: str) -> float | None:
        """Seconds, or None if the process cannot."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self._process.stdout.readline()
        return float(answer) if answer.strip() else None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def requantized(gguf: Path, folder: Path, threads: int) -> list[Path]:
    """Q4_0 and Q4_1 of a GGUF file, by llama.cpp; nothing where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return []
    made = []
    for name, kind in (("Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0), ("Q4_1", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1)):
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread, settings.allow_requantize = kind, threads, True
        out = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(out).encode(), ctypes.byref(settings)) == 0:
            made.append(out)
    return made


def main() -> None:
    """Measures and prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", help="folders that gptq-compile wrote for the CPU")
    parser.add_argument("--gguf", type=Path, help="the same weights, for llama.cpp")
    parser.add_argument("--genai", help="folder of `gptq-compile export-onnx`")
    parser.add_argument("--genai-python", default=sys.executable, help="the Python that has onnxruntime-genai")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = _measured(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['name']:40}" + "".join(f"{key} {row[key]:9.1f}   " for key in row if key != "name"))


def _measured(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    here, threads = sys.executable, arguments.threads
    wanted = [("read", "", here), *(("gptq-compile", path, here) for path in arguments.artifacts)]
    if arguments.gguf:
        wanted += [("llama.cpp", str(path), here) for path in requantized(arguments.gguf, folder, threads)]
    if arguments.genai:
        wanted.append(("onnxruntime-genai", arguments.genai, arguments.genai_python))
    processes = [Process(kind, path, threads, python) for kind, path, python in wanted]
    seconds: dict[str, dict[str, list[float]]] = {p.name: {"decode": [], "prefill": []} for p in processes}
    try:
        for turn in range(arguments.rounds + 1):  # the first one warms up
            for process in processes:
                for what, found in seconds[process.name].items():
                    answer = process.ask(what)
                    if turn and answer is not None:
                        found.append(answer)
    finally:
        for process in processes:
            process.close()
    rows: list[dict[str, Any]] = []
    for name, found in seconds.items():
        if not found["decode"]:
            print(f"{name} could not be measured.", file=sys.stderr)
        elif name == "read":
            rows.append({"name": name, "GB/s": CEILING_BYTES / statistics.median(found["decode"]) / 1e9})
        else:
            decode, prefill = (statistics.median(found[what]) for what in ("decode", "prefill"))
            rows.append({"name": name, "decode tokens/s": NEW / decode, "prefill tokens/s": PREFILL / prefill})
    return rows


if __name__ == "__main__":
    main()
