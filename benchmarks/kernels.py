# SPDX-License-Identifier: Apache-2.0
"""Times the quantized linear kernels against a kernel that only reads the same bytes, and against torch.

Building needs the compiler and nvcc but no GPU; running needs a GPU, torch and apache-tvm-ffi but no compiler::

    PYTHONPATH=. python benchmarks/kernels.py build OUT [--rows 1 2 8 512] [--bits 4 3 2 8] [--tune stream]
    PYTHONPATH=. python benchmarks/kernels.py run OUT [--json FILE] [--peers]

Shapes are those of Llama-3-8B (q, k, v as one linear; gate and up as one), groups of 128. Every figure is the median of
replays of a CUDA graph whose calls go round copies of the weights that together exceed the caches. ``floor`` is the
best of several read-only kernels, over weights and scales, in the same run. Each kernel is first checked against
float64 on sample rows, with outputs poisoned. ``--tune`` builds kernels in many divisions of the work.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
GROUP = 128
ROTATE_BYTES = 320 << 20
FLOORS = ((4, 0), (8, 0), (4, 528), (8, 528), (8, 264))
"""(loads in flight per thread, blocks of 512 threads; 0: as many as there is data for)."""
CHECK_TILES = 4


def floor_source(loads: int) -> str:
    """Returns ``gq_floor{loads}(words, count, out)``: reads 16-byte words, all blocks together, and keeps their xor."""
    return f"""
__device__ __forceinline__ void gq_floor{loads}(const void* words, int count, void* out) {{
  const uint4* p = (const uint4*)words;
  unsigned kept = 0;
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += {loads} * stride) {{
    uint4 v[{loads}];
#pragma unroll
    for (int j = 0; j < {loads}; ++j)
      v[j] = i + j * stride < count ? __ldcs(p + i + j * stride) : make_uint4(0u, 0u, 0u, 0u);
#pragma unroll
    for (int j = 0; j < {loads}; ++j) kept ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }}
  if (kept == 0x12345678u) *(unsigned*)out = kept;
}}
"""


def _floor(loads: int, blocks: int, words: int) -> Any:
    from gptq_compile.kernels.script import Function, script

    ir = script()
    count = words // 4
    with Function("floor") as f:
        data, out = f.tensor("data", (words,), "uint32"), f.tensor("out", (4,), "uint32")
        with (
            ir.launch_thread("blockIdx.x", blocks or -(-count // (512 * loads))),
            ir.launch_thread("threadIdx.x", 512),
        ):
            call = (f"gq_floor{loads}", data.access_ptr("r"), ir.int32(count), out.access_ptr("w"))
            ir.evaluate(ir.cuda.func_call(*call, source_code=floor_source(loads), return_type="void"))
    return f.result().with_attr({"tirx.is_scheduled": True, "tirx.noalias": True})


def _case(name: str, bits: int, rows: int, static: int) -> Any:
    from gptq_compile.kernels.registry import Case

    n, k = SHAPES[name]
    return Case.make(
        "quant_linear", "float16", rows if rows <= static else None, in_features=k, out_features=n, bits=bits,
        group_size=GROUP, has_zeros=False, has_bias=False,
    )  # fmt: skip


def _bytes(name: str, bits: int) -> int:
    n, k = SHAPES[name]
    return n * k * bits // 8 + n * (k // GROUP) * 2


def divisions(shape: Any, archs: tuple[str, ...]) -> list[Any]:
    """Returns the divisions of the stream kernel's work that ``--tune`` times."""
    from gptq_compile.kernels.cuda import stream

    limit = min(stream.SHARED_BYTES[int(arch[3:5])] for arch in archs) - stream.RESERVED
    found: list[Any] = []
    for tiles, splits, height, units in (
        (1, 16, 1, 1), (2, 8, 1, 1), (4, 4, 1, 1), (8, 2, 1, 1), (4, 4, 2, 1), (8, 2, 2, 1), (4, 4, 4, 1),
        (1, 16, 1, 2), (1, 14, 1, 2), (2, 8, 1, 2), (4, 4, 1, 2), (8, 2, 1, 2), (1, 16, 2, 2), (2, 8, 2, 2),
        (4, 4, 2, 2), (7, 2, 2, 2),
    ):  # fmt: skip
        if shape.rows > 1 and splits > 8 and tiles * splits * shape.rows > 64:
            continue
        configs = [stream.Config(tiles, splits, height, depth, units) for depth in (6, 5, 4, 3)]
        fitting = [config for config in configs if stream.shared_bytes(shape, config) <= limit]
        # Rings of more than five turns did not help.
        found += fitting[-2 if len(fitting) > 2 else -1 :][:1] if splits * units <= shape.units else []
    return found


def pipelines(shape: Any, rows: int, target: Any, best: int = 8) -> list[Any]:
    """Returns the divisions of the pipelined kernel that ``--tune`` times: those that its model finds fastest."""
    from gptq_compile.kernels.cuda import launch, pipeline_choice
    from gptq_compile.kernels.layouts import reads_natural

    tokens = next((width for width in (8, 16, 32) if rows <= width), 64)
    found = pipeline_choice.divisions(shape, tokens, target.archs, launch.supported(target), reads_natural(target))
    return sorted(found, key=lambda config: pipeline_choice.clocks(shape, config, rows))[:best]


def build(arguments: argparse.Namespace) -> None:
    """Builds every kernel into OUT/kernels.so and lists them in OUT/kernels.json."""
    from gptq_compile.kernels.cuda import (
        pipeline_linear,
        resident,
        resident_linear,
        stationary,
        stationary_linear,
        stream,
        tile_linear,
    )
    from gptq_compile.kernels.layouts import layout_for
    from gptq_compile.kernels.registry import select
    from gptq_compile.kernels.target import Target

    target = Target.parse(arguments.target)
    functions: dict[str, Any] = {}
    table: list[dict[str, Any]] = []

    def add(entry: dict[str, Any], func: Any, key: str) -> None:
        if key not in functions:
            functions[key] = func.with_attr({"global_symbol": key, "tirx.is_scheduled": True, "tirx.noalias": True})
        layout = layout_for(_case(entry["shape"], entry["bits"], 1, 1), target).name
        table.append({**entry, "function": key, "layout": layout})

    for name in arguments.shapes:
        for bits in arguments.bits:
            for loads, blocks in FLOORS:
                entry = {"shape": name, "bits": bits, "rows": 0, "kernel": f"floor {loads} x {blocks or 'all'}"}
                add(entry, _floor(loads, blocks, _bytes(name, bits) // 4), f"floor_{name}_{bits}_{loads}_{blocks}")
            for rows in arguments.rows:
                case = _case(name, bits, rows, arguments.static)
                kernel = select(case, target).kernel
                entry = {"shape": name, "bits": bits, "rows": rows, "kernel": kernel.name}
                static = "s" if case.rows is None else str(rows)
                add(entry, kernel.prim_func(case, target), f"linear_{name}_{bits}_{static}")
                if not arguments.tune:
                    continue
                shape = stream.Shape(case.rows or 0, *_n_grouping(case), False)
                if "stationary" in arguments.tune and rows <= stationary.MAX_ROWS:
                    dependent = dataclasses.replace(shape, dependent=True)
                    for config in stationary.divisions(dependent, target.archs):
                        func = stationary_linear.build(case, target, config)
                        label = "_".join(str(getattr(config, f.name)) for f in dataclasses.fields(config))
                        add({**entry, "kernel": f"stationary {label}"}, func, f"stat_{name}_{bits}_{rows}_{label}")
                if "resident" in arguments.tune and rows <= stationary.MAX_ROWS:
                    dependent = dataclasses.replace(shape, dependent=True)
                    for config in resident.ranked(dependent, target.archs)[:8]:
                        func = resident_linear.build(case, target, config)
                        label = "_".join(str(getattr(config, f.name)) for f in dataclasses.fields(config))
                        add({**entry, "kernel": f"resident {label}"}, func, f"res_{name}_{bits}_{rows}_{label}")
                if "stream" in arguments.tune and rows <= stream.MAX_ROWS:
                    for config in divisions(shape, target.archs):
                        func = tile_linear.build_stream(case, target, config)
                        label = "_".join(str(getattr(config, f.name)) for f in dataclasses.fields(config))
                        add({**entry, "kernel": f"stream {label}"}, func, f"linear_{name}_{bits}_{rows}_{label}")
                if "pipeline" in arguments.tune and rows >= 4:
                    for config in pipelines(shape, rows, target):
                        func = pipeline_linear.build(case, target, [(None, config)])
                        label = "_".join(str(getattr(config, f.name)) for f in dataclasses.fields(config))
                        add({**entry, "kernel": f"pipeline {label}"}, func, f"pipe_{name}_{bits}_{static}_{label}")
    write_library(arguments.out, functions, table, target)


def write_library(out: Path, functions: dict[str, Any], table: list[dict[str, Any]], target: Any) -> None:
    """Builds functions into OUT/kernels.so and writes OUT/kernels.json and the libraries that `Bench` loads."""
    from gptq_compile.kernels.runtime_libs import copy_runtime_libraries
    from gptq_compile.kernels.tvm_env import R, relax, tvm
    from gptq_compile.passes.build import build as build_library

    builder = relax.BlockBuilder()
    x = relax.Var("x", R.Tensor((1,), "float32"))
    with builder.function("unused", [x]):
        builder.emit_func_output(x)
    module = builder.get()
    for key, func in functions.items():
        module[tvm.ir.GlobalVar(key)] = func
    out.mkdir(parents=True, exist_ok=True)
    info = build_library(module, target, out / "kernels.so")
    copy_runtime_libraries(target, out / "lib")
    (out / "kernels.json").write_text(json.dumps(table, indent=0) + "\n")
    sys.stdout.write(f"{len(functions)} kernels in {info.seconds:.0f} s\n")


def _n_grouping(case: Any) -> tuple[int, Any]:
    from gptq_compile.kernels.layouts import grouping_of

    return case["out_features"], grouping_of(case)


class Bench:
    """Kernels of one library on one GPU."""

    def __init__(self, folder: Path) -> None:
        import torch
        import tvm_ffi

        for name in ("libcudart.so.13", "libtvm_runtime.so", "libtvm_runtime_cuda.so"):
            if (folder / "lib" / name).exists():
                ctypes.CDLL(str(folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        self.torch, self.ffi = torch, tvm_ffi
        self.library = tvm_ffi.load_module(str(folder / "kernels.so"))
        self.stream = torch.cuda.Stream()
        self.device = tvm_ffi.device("cuda", 0)

    def function(self, name: str) -> Any:
        """Returns a kernel of the library."""
        return self.library.get_function(name, query_imports=True)

    def microseconds(self, call: Any, count: int, repeats: int = 15) -> float:
        """Returns the median time of one call; ``call(i)`` for i below `count` is captured into a graph."""
        torch = self.torch
        with torch.cuda.stream(self.stream), self.ffi.use_raw_stream(self.device, self.stream.cuda_stream):
            call(0)
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="relaxed"):
                for i in range(count):
                    call(i)
            graph.replay()
            times = []
            for _ in range(repeats):
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(self.stream)
                graph.replay()
                last.record(self.stream)
                last.synchronize()
                times.append(first.elapsed_time(last) * 1e3 / count)
        return statistics.median(times)

    def weights(self, name: str, bits: int, layout: Any) -> tuple[Any, Any, Any]:
        """Returns random qweight and scales [copies, ...] and the float64 rows of the first copy's sample tiles."""
        from gptq_compile.kernels.registry import Case

        torch = self.torch
        n, k = SHAPES[name]
        copies = max(2, min(40, -(-ROTATE_BYTES // _bytes(name, bits))))
        size = (copies, n // 16, k // 64, 32 * bits)
        words = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")
        scales = (torch.rand((copies, n // 16, k // GROUP, 8, 2), device="cuda") * 0.015 + 0.005).half()
        case = Case.make("quant_linear", "float16", None, bits=bits, in_features=k, out_features=16 * CHECK_TILES,
                         group_size=GROUP, has_zeros=False, has_bias=False)  # fmt: skip
        tiles = self.sample(name)
        packed = {"qweight": words[0][tiles].cpu().numpy().view(np.uint32), "scales": scales[0][tiles].cpu().numpy()}
        codes = layout.unpack(case, packed).astype(np.float64) - (1 << (bits - 1))
        rows = codes * layout.unpack_grid(case, packed)[0].astype(np.float64).repeat(GROUP, 1)
        return words.view(torch.uint32), scales, torch.from_numpy(rows).cuda()

    def sample(self, name: str) -> Any:
        """Returns the tiles whose outputs are checked, the last among them."""
        last = SHAPES[name][0] // 16 - 1
        return self.torch.linspace(0, last, CHECK_TILES).long()


def _time_floor(bench: Bench, name: str, bits: int, entries: list[dict[str, Any]]) -> float:
    """Returns the best time of the read-only kernels."""
    torch = bench.torch
    size = _bytes(name, bits)
    copies = max(2, min(40, -(-ROTATE_BYTES // size)))
    data = torch.randint(0, 255, (copies, size), dtype=torch.uint8, device="cuda").view(torch.uint32)
    kept = torch.zeros(4, dtype=torch.uint32, device="cuda")
    functions = [bench.function(entry["function"]) for entry in entries if entry["rows"] == 0]
    return min(bench.microseconds(lambda i, f=function: f(data[i], kept), copies) for function in functions)


def _check_and_time(bench: Bench, entry: dict[str, Any], packed: tuple[Any, Any, Any], x: Any) -> tuple[float, float]:
    """Returns (mean error or NaN, microseconds) of one kernel."""
    torch = bench.torch
    words, scales, reference = packed
    rows, n = x.shape[0], SHAPES[entry["shape"]][0]
    function = bench.function(entry["function"])
    out = torch.full((rows, n), float("nan"), dtype=torch.half, device="cuda")
    function(x, words[0], scales[0], out)
    torch.cuda.synchronize()
    expected = x.double() @ reference.T
    got = out.view(rows, -1, 16)[:, bench.sample(entry["shape"])].reshape(rows, -1).double()
    error = float((got - expected).abs().mean() / expected.abs().mean())
    if not bool(torch.isfinite(out).all()):
        error = float("nan")
    return error, bench.microseconds(lambda i: function(x, words[i], scales[i], out), words.shape[0])


def run(arguments: argparse.Namespace) -> int:
    """Checks and times; returns the number of kernels that failed the check."""
    from gptq_compile.kernels.layouts import by_name

    bench = Bench(arguments.out)
    torch = bench.torch
    table = json.loads((arguments.out / "kernels.json").read_text())
    results: list[dict[str, Any]] = []
    failures = 0
    say = sys.stdout.write
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    for name, bits in dict.fromkeys((entry["shape"], entry["bits"]) for entry in table):
        entries = [entry for entry in table if (entry["shape"], entry["bits"]) == (name, bits)]
        n, k = SHAPES[name]
        floor = _time_floor(bench, name, bits, entries)
        say(f"{name} {n}x{k} {bits} bits: floor {floor:.2f} us, {_bytes(name, bits) / floor / 1e3:.0f} GB/s\n")
        results.append({"shape": name, "bits": bits, "rows": 0, "kernel": "floor", "us": floor})
        packed = bench.weights(name, bits, by_name(entries[0]["layout"]))
        for rows in dict.fromkeys(entry["rows"] for entry in entries if entry["rows"]):
            x = torch.randn((rows, k), device="cuda").half()
            timed = []
            for entry in (entry for entry in entries if entry["rows"] == rows):
                error, us = _check_and_time(bench, entry, packed, x)
                if not error < 1e-3:
                    failures += 1
                    say(f"  FAIL {entry['function']}: mean error {error:.1e}\n")
                timed.append((us, entry["kernel"], error))
                results.append({**entry, "us": us, "error": error, "over_floor": us / floor})
            # The first is the registry's choice, the others are --tune's.
            for us, kernel, error in [timed[0], *sorted(timed[1:])[: arguments.best]]:
                say(f"  M={rows}: {us:.2f} us, {us / floor:.3f} of the floor, error {error:.1e} [{kernel}]\n")
        del packed
        if arguments.peers and bits == 4:
            results += _peers(bench, name, sorted({entry["rows"] for entry in entries} - {0}))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=0) + "\n")
    return min(failures, 99)


def _peers(bench: Bench, name: str, all_rows: list[int]) -> list[dict[str, Any]]:
    """Times torch's half linear (cuBLAS) and its int4 linear (tinygemm)."""
    torch = bench.torch
    n, k = SHAPES[name]
    copies = max(2, -(-ROTATE_BYTES // (n * k * 2)))
    w = torch.randn((copies, n, k), device="cuda", dtype=torch.half)
    codes = [
        torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda")
        for _ in range(max(2, min(12, ROTATE_BYTES // (n * k // 2))))
    ]
    packed = [torch.ops.aten._convert_weight_to_int4pack(one, 8) for one in codes]
    grid = torch.rand((k // GROUP, n, 2), device="cuda").bfloat16()
    results = []
    for rows in all_rows:
        x = torch.randn((rows, k), device="cuda").half()
        results.append(("cuBLAS half", rows, bench.microseconds(lambda i: torch.nn.functional.linear(x, w[i]), copies)))  # noqa: B023
        if rows <= 16:
            y = x.bfloat16()
            call = lambda i: torch.ops.aten._weight_int4pack_mm(y, packed[i], GROUP, grid)  # noqa: B023, E731
            results.append(("tinygemm", rows, bench.microseconds(call, len(packed))))
    sys.stdout.write("  peers: " + "; ".join(f"{kind} M={rows} {us:.2f}" for kind, rows, us in results) + "\n")
    return [{"shape": name, "bits": 4, "rows": rows, "kernel": kind, "us": us} for kind, rows, us in results]


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2, 8])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--static", type=int, default=64, help="up to how many rows the number is known to the kernel")
    families = ("stream", "stationary", "resident", "pipeline")
    parser.add_argument("--tune", nargs="+", choices=families, default=(), help="build other divisions of these, too")
    parser.add_argument("--best", type=int, default=3, help="print that many of the fastest")
    parser.add_argument("--peers", action="store_true", help="also time torch's linears")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    if arguments.what == "run":
        return run(arguments)
    build(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
