# SPDX-License-Identifier: Apache-2.0
"""Time of a decode step of exported models in onnxruntime, each in processes of its own that take turns.

    python benchmarks/onnx_tokens.py smollm2-onnx smollm2-onnx:4 smollm2-custom --threads 2 --rounds 5

After a colon stands MatMulNBits's accuracy level (4: activations in 8 bits), which is otherwise as exported. A model
that has a library of operators is run with it. Threads that wait spin, as by default, for the wall time; CPU time of
a token is measured with threads that sleep, and depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY = "libgptq_compile_ops.so"
PROMPT, WARM, STEPS = 32, 4, 80


def session(folder: Path, level: int | None, threads: int, spin: bool) -> Any:
    """The model of a folder, with another accuracy level if one is given."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    if (folder / LIBRARY).exists():
        options.register_custom_ops_library(str(folder / LIBRARY))
    if level is None:
        return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", level))
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:  # beside its weights
        file.write(model.SerializeToString())
        file.flush()
        return ort.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])


def measure(made: Any) -> tuple[list[float], float]:
    """Seconds of each step, and CPU seconds of all together."""
    inputs, outputs = made.get_inputs(), [o.name for o in made.get_outputs()]
    names = {i.name for i in inputs}
    past = [i for i in inputs if i.name.startswith("past_key_values.")]
    cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in past}
    seconds, done, before = [], 0, 0.0
    for step, count in enumerate([PROMPT, *[1] * (WARM + STEPS)]):
        feeds = {
            "input_ids": np.arange(done + 5, done + 5 + count)[None],
            "attention_mask": np.ones((1, done + count), np.int64),
            "position_ids": np.arange(done, done + count)[None],
        }
        if step == 1 + WARM:
            before = cpu_seconds()
        start = time.perf_counter()
        values = made.run(None, {k: v for k, v in feeds.items() if k in names} | cache)
        seconds.append(time.perf_counter() - start)
        cache = {n.replace("present", "past_key_values"): v for n, v in zip(outputs, values, strict=True)}
        del cache["logits"]
        done += count
    return seconds[1 + WARM :], cpu_seconds() - before


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def one(model: str, threads: int) -> dict[str, float]:
    """Measures one model in this process; milliseconds."""
    folder, _, level = model.partition(":")
    seconds, _ = measure(session(Path(folder), int(level) if level else None, threads, spin=True))
    _, cpu = measure(session(Path(folder), int(level) if level else None, threads, spin=False))
    return {"least": min(seconds) * 1e3, "median": statistics.median(seconds) * 1e3, "cpu": cpu / STEPS * 1e3}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", metavar="DIR[:LEVEL]")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.alone:
        print(json.dumps(one(a.models[0], a.threads)))
        return
    found: dict[str, list[dict[str, float]]] = {model: [] for model in a.models}
    for _ in range(a.rounds):
        for model, runs in found.items():
            command = [sys.executable, __file__, model, "--threads", str(a.threads), "--alone"]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"{'ms a token':40} least  median of medians  median CPU time")
    for model, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in ("median", "cpu")}
        print(f"{model:40} {min(r['least'] for r in runs):5.2f}  {middle['median']:17.2f}  {middle['cpu']:15.2f}")


if __name__ == "__main__":
    main()
