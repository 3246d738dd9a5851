# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile bench``: how fast a compiled model generates on this machine."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from gptq_compile.cli.generation import add_engine_arguments, load_engine
from gptq_compile.cli.output import json_line, note_line, show
from gptq_compile.cli.parser import Parser
from gptq_compile.errors import ConfigError
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import DeviceError
from gptq_compile.runtime.manifest import read_manifest
from gptq_compile.runtime.speed import first_token_seconds, step_speed


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    p = Parser(
        prog="gptq-compile bench",
        description="Generates from random tokens and reports tokens a second, the time to the first token and, on\n"
        "CUDA, the time of every kernel of a step beside the time in which its weights can be read.",
    )
    p.add_argument("artifact", metavar="OUT", help="the folder that gptq-compile wrote")
    p.add_argument(
        "--batch",
        type=_sizes,
        metavar="B,B,...",
        help="sequences at once (default: all sizes with a step of their own)",
    )
    p.add_argument("--context", type=int, default=512, metavar="N", help="mean length of a sequence (default: 512)")
    p.add_argument("--steps", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")
    p.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens before the first token (default: 512)")
    p.add_argument("--no-kernels", dest="kernels", action="store_false", help="do not time single kernels")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_engine_arguments(p)
    arguments = p.parse_args(argv)
    sizes = arguments.batch or _own_sizes(arguments.artifact)
    if arguments.cache_tokens is None:
        arguments.cache_tokens = max(max(sizes) * (arguments.context + arguments.steps), arguments.prompt + 1) + 64
    with load_engine(arguments, max_batch=max(sizes)) as engine:
        result = measure(engine, sizes, arguments.context, arguments.steps, arguments.prompt, arguments.kernels)
    if arguments.json:
        json_line(result)
    else:
        _show(result)
    return 0


def measure(
    engine: Engine, sizes: Sequence[int], context: int, steps: int, prompt: int, kernels: bool
) -> dict[str, Any]:
    """Everything that is reported, as plain values; times in seconds."""
    room = engine.context_length
    context, prompt = min(context, max(1, room - steps)), min(prompt, room - 1)
    result: dict[str, Any] = {"model": engine.manifest.name, "device": engine.device, "steps": []}
    for size in sizes:
        speed = step_speed(engine, size, context, steps)
        result["steps"].append(
            {
                "batch": size, "context": speed.context, "seconds": speed.seconds,
                "tokens_per_second": speed.tokens_per_second,
            }
        )  # fmt: skip
    result["first_token"] = {"prompt": prompt, "seconds": first_token_seconds(engine, prompt)}
    if kernels and engine.manifest.target_kind == "cuda":
        size = min(s for s in engine.manifest.decode if s >= min(sizes))
        try:
            result["kernels"] = {"batch": size, **_kernels(engine, size, context)}
        except DeviceError as error:
            note_line(f"Kernels were not timed: {error}")
    return result


def _kernels(engine: Engine, size: int, context: int) -> dict[str, Any]:
    from gptq_compile.runtime.kernel_times import kernel_times

    step = kernel_times(engine, size, context)
    return {
        "copy_bytes_per_second": step.bytes_per_second,
        "kernels": [
            {
                "name": k.name, "count": k.count, "seconds": k.seconds, "weight_bytes": k.weight_bytes,
                "floor_seconds": step.floor(k),
            }
            for k in step.kernels
        ],
    }  # fmt: skip


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    first = result["first_token"]
    title = f"{result['model']} on {result['device']}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = f"first token of a prompt of {first['prompt']}: {first['seconds'] * 1e3:.1f} ms"
    for name in ("sequences", "context", "tokens/s", "ms a step"):
        table.add_column(name, justify="right")
    for step in result["steps"]:
        speed, milliseconds = f"{step['tokens_per_second']:.1f}", f"{step['seconds'] * 1e3:.3f}"
        table.add_row(str(step["batch"]), str(step["context"]), speed, milliseconds)
    show(table)
    if "kernels" in result:
        show(_kernel_table(result["kernels"]))


def _kernel_table(timed: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"kernels of a step of {timed['batch']}", title_justify="left", caption_justify="left")
    table.caption = (
        "us: mean time in a graph of the kernel's launches, without overlap; floor: its weights at "
        f"{timed['copy_bytes_per_second'] / 1e9:.0f} GB/s, what a copy on the device reads and writes"
    )
    for name in ("kernel", "launches", "us", "floor us", "ratio", "us a step"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for k in timed["kernels"]:
        microseconds, floor = k["seconds"] * 1e6, k["floor_seconds"] * 1e6
        shown = (f"{floor:.2f}", f"{microseconds / floor:.2f}") if floor else ("", "")
        total = f"{k['count'] * microseconds:.1f}"
        table.add_row(k["name"], str(k["count"]), f"{microseconds:.2f}", *shown, total)
    return table


def _own_sizes(artifact: str) -> list[int]:
    """The batch sizes that have a step of their own."""
    return sorted(read_manifest(pathlib.Path(artifact) / "manifest.json").decode)


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise ConfigError(f"The batch sizes {text!r} are not whole numbers from 1 on with commas between, as 1,8.")
    return sizes
