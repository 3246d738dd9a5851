# SPDX-License-Identifier: Apache-2.0
"""Times linears with half weights and few rows against a kernel that only reads the same bytes, and against cuBLAS.

As `kernels` does for packed weights (same graphs, rotation and read-only kernels)::

    PYTHONPATH=. python benchmarks/half_linear.py build OUT [--rows 1 2 4 8 16] [--tune]    # where TVM is
    PYTHONPATH=. python benchmarks/half_linear.py run OUT [--json FILE]                     # where the GPU is

Every kernel, the one that is taken and the next that would be if there is one, is first checked against float64 on
sample rows, with
outputs poisoned. ``--tune`` builds many divisions of the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import kernels

SHAPES = {**kernels.SHAPES, "opt_head": (50272, 12288), "smollm2_head": (49152, 576)}
CHECKED = 96
"""Weight rows whose results are compared to float64, the last among them."""


def divisions(rows: int, n: int, k: int, target: Any) -> list[Any]:
    """Returns the divisions that ``--tune`` times."""
    from gptq_compile.kernels.cuda import row_linear, stream

    limit = min(stream.limits(target.archs)) - stream.RESERVED
    found = []
    for tiles, splits, units in (
        (1, 16, 1), (2, 8, 1), (4, 4, 1), (3, 5, 1), (8, 2, 1), (16, 1, 1),
        (1, 8, 2), (2, 4, 2), (4, 2, 2), (8, 1, 2), (2, 8, 2), (4, 4, 2), (3, 4, 1), (1, 8, 4), (2, 4, 4), (8, 1, 4),
    ):  # fmt: skip
        config = row_linear.Config(tiles, splits, units, 2)
        spare = limit - row_linear.shared_bytes(rows, n, k, config)
        each = -(-n // (16 * stream.BLOCKS))
        turns = -(-k // (64 * splits * units)) * -(-each // tiles)
        deepest = min(2 + spare // (config.warps * config.slot_bytes), turns + 1)
        if spare < 0 or splits * units > -(-k // 64) or tiles > each:
            continue
        found += [dataclasses.replace(config, depth=deepest, early=early) for early in (1, 3) if early < deepest]
    return found


def build(arguments: argparse.Namespace) -> None:
    """Builds every kernel into OUT/kernels.so and lists them in OUT/kernels.json."""
    from gptq_compile.kernels.cuda import row_linear
    from gptq_compile.kernels.registry import Case, kernels_for, select
    from gptq_compile.kernels.target import Target

    target = Target.parse(arguments.target)
    functions: dict[str, Any] = {}
    table: list[dict[str, Any]] = []

    def add(func: Any, name: str, rows: int, kernel: str) -> None:
        key = f"f{len(functions)}"
        functions[key] = func.with_attr({"global_symbol": key, "tirx.is_scheduled": True, "tirx.noalias": True})
        table.append({"shape": name, "rows": rows, "kernel": kernel, "function": key, "dtype": arguments.dtype})

    for name in arguments.shapes:
        n, k = SHAPES[name]
        for loads, blocks in kernels.FLOORS:
            add(kernels._floor(loads, blocks, n * k // 2), name, 0, f"floor {loads} x {blocks or 'all'}")
        for rows in arguments.rows:
            case = Case.make("linear", arguments.dtype, rows, in_features=k, out_features=n, has_bias=False)
            chosen = select(case, target).kernel
            add(chosen.prim_func(case, target), name, rows, chosen.name)
            others = [q for q in kernels_for("cuda") if q.op == "linear" and q.name != chosen.name]
            before = next((q for q in others if q.can_implement(case, target) is None), None)
            if before is not None:
                add(before.prim_func(case, target), name, rows, before.name)
            if not arguments.tune:
                continue
            for config in divisions(rows, n, k, target):
                label = "_".join(str(v) for v in dataclasses.astuple(config))
                add(row_linear.build(case, target, config), name, rows, f"rows {label}")
    kernels.write_library(arguments.out, functions, table, target)


def _time(bench: kernels.Bench, w: Any, call: Any) -> float:
    """Returns the median microseconds of ``call(copy of the weights)``."""
    return bench.microseconds(lambda i: call(w[i]), w.shape[0])


def _check_and_time(bench: kernels.Bench, function: Any, x: Any, w: Any, checked: Any) -> tuple[float, float]:
    """Returns (mean error over the `checked` weight rows or NaN, microseconds) of one kernel."""
    torch = bench.torch
    out = torch.full((x.shape[0], w.shape[1]), float("nan"), dtype=x.dtype, device="cuda")
    function(x, w[0], out)
    torch.cuda.synchronize()
    expected = x.double() @ w[0][checked].double().T
    error = float((out[:, checked].double() - expected).abs().mean() / expected.abs().mean())
    if not bool(torch.isfinite(out).all()):
        error = float("nan")
    return error, _time(bench, w, lambda weights: function(x, weights, out))


def run(arguments: argparse.Namespace) -> int:
    """Checks and times; returns the number of kernels that failed the check."""
    bench = kernels.Bench(arguments.out)
    torch = bench.torch
    table = json.loads((arguments.out / "kernels.json").read_text())
    say = sys.stdout.write
    results: list[dict[str, Any]] = []
    failures = 0
    dtype = getattr(torch, table[0]["dtype"])
    most = 1e-3 if dtype == torch.half else 4e-3  # half a unit in the last place of what is stored, and some
    say(f"{dtype}, {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    for name in dict.fromkeys(entry["shape"] for entry in table):
        n, k = SHAPES[name]
        copies = max(2, min(40, -(-kernels.ROTATE_BYTES // (n * k * 2))))
        w = torch.randn((copies, n, k), device="cuda", dtype=dtype)
        words = w.view(copies, -1).view(torch.int32).view(torch.uint32)
        kept = torch.zeros(4, dtype=torch.uint32, device="cuda")
        entries = [entry for entry in table if entry["shape"] == name]
        floors = [bench.function(entry["function"]) for entry in entries if not entry["rows"]]
        floor = min(_time(bench, words, functools.partial(_read, function, kept)) for function in floors)
        say(f"{name} {n}x{k}: floor {floor:.2f} us, {n * k * 2 / floor / 1e3:.0f} GB/s\n")
        results.append({"shape": name, "rows": 0, "kernel": "floor", "us": floor})
        checked = torch.linspace(0, n - 1, CHECKED, device="cuda").long()
        for rows in dict.fromkeys(entry["rows"] for entry in entries if entry["rows"]):
            x = torch.randn((rows, k), device="cuda", dtype=dtype)
            timed = []
            for entry in (entry for entry in entries if entry["rows"] == rows):
                error, us = _check_and_time(bench, bench.function(entry["function"]), x, w, checked)
                if not error < most:
                    failures += 1
                    say(f"  FAIL M={rows} {entry['kernel']}: mean error {error:.1e}\n")
                timed.append((us, entry["kernel"], error))
                results.append({**entry, "us": us, "error": error, "over_floor": us / floor})
            us = _time(bench, w, functools.partial(torch.nn.functional.linear, x))
            say(f"  M={rows}: cuBLAS {us:.2f} us\n")
            results.append({"shape": name, "rows": rows, "kernel": "cuBLAS", "us": us, "over_floor": us / floor})
            # The first is the registry's choice, then come the next that would be taken and --tune's.
            for us, kernel, error in [timed[0], *sorted(timed[1:])[: arguments.best]]:
                say(f"  M={rows}: {us:.2f} us, {us / floor:.3f} of the floor, error {error:.1e} [{kernel}]\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=0) + "\n")
    return min(failures, 99)


def _read(function: Any, kept: Any, words: Any) -> None:
    function(words, kept)


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--tune", action="store_true", help="build other divisions, too")
    parser.add_argument("--best", type=int, default=3, help="print that many of the fastest")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    if arguments.what == "run":
        return run(arguments)
    build(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
