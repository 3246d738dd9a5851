# SPDX-License-Identifier: Apache-2.0
"""Generation speed of a model of real shapes with random weights, which are made on the GPU: 4 bits beside FP16.

Machine code is built where the compiler is; nothing but it and a manifest is written::

    PYTHONPATH=. python benchmarks/decode_speed.py build OUT/w4 llama-3-8b --bits 4 --head
    PYTHONPATH=. python benchmarks/decode_speed.py build OUT/fp16 llama-3-8b --bits 16

and run where the GPU is (torch makes the weights and reads the clock of the GPU; no TVM compiler)::

    PYTHONPATH=. python benchmarks/decode_speed.py run OUT/w4 OUT/fp16 --batch 1 8 32 --context 512

A step's floor is the time to read its weights and the keys and values of its context once, at the rate that a kernel
reaches which does nothing but read. ``--target cpu`` and a small shape try the whole path on any machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

BYTES = {"uint32": 4, "float32": 4, "float16": 2, "uint8": 1, "int64": 8}


def build_skeleton(out: Path, args: argparse.Namespace) -> None:
    """Compiles a model of known shapes; its parameters are never made."""
    import torch
    from scale import random_model

    from gptq_compile.kernels.runtime_libs import copy_runtime_libraries
    from gptq_compile.kernels.target import Target
    from gptq_compile.passes.build import build
    from gptq_compile.passes.lower_to_relax import lower_to_relax
    from gptq_compile.passes.manager import PassManager
    from gptq_compile.passes.pipeline import lowering_passes

    target = Target.parse(args.target)
    dtype = "float16" if target.kind == "cuda" else "float32"
    program = random_model(args.shape, args.layers, torch.device("cpu"))
    if args.bits < 16:
        pretend_quantized(program, args.bits, args.group_size, args.head)
    PassManager(lowering_passes(target, dtype), validate=False).run(program)
    lowered = lower_to_relax(program, target, args.batch)
    out.mkdir(parents=True, exist_ok=True)
    build(lowered.module, target, out / "model.so")
    copy_runtime_libraries(target, out / "lib")
    caches = program.inputs[[n.name for n in program.inputs].index("page_table") + 1 :]
    sizes = [tuple(int(d) for d in c.meta["val"].shape[1:]) for c in caches]
    info, nodes = program.info, program.param_nodes
    manifest = {
        "format": "gptq-compile", "schema_version": 1, "dtype": dtype, "library": "model.so", "generation": {},
        "model": {
            "name": f"{args.shape}-{args.bits}", "vocab_size": info.vocab_size, "context_length": info.context_length,
            "bos_token_id": None, "eos_token_ids": [], "add_bos": False,
        },
        "target": {"kind": target.kind, "archs": list(target.archs)},
        "kv_cache": {
            "page_size": sizes[0][1], "dtype": dtype,
            "layers": [
                {"kv_heads": k[0], "head_dim": k[2], "v_head_dim": v[2]}
                for k, v in zip(sizes[::2], sizes[1::2], strict=True)
            ],
        },
        "entries": {
            "forward": "forward", "decode": {str(b): name for b, name in lowered.decode.items()},
            **{name: name for name in ("sample", "repetition_penalty", "mark_seen", "advance")},
        },
        "weights": [
            {
                "name": name, "shape": list(program.params.shape(name)), "file": "model.so",
                "dtype": str(nodes[name].meta["val"].dtype).removeprefix("torch."),
            }
            for name in lowered.weights
        ],
        "files": {
            str(p.relative_to(out)): {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "size": p.stat().st_size}
            for p in [out / "model.so", *sorted((out / "lib").iterdir())]
        },
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest))


def pretend_quantized(program: Any, bits: int, group_size: int, head: bool) -> None:
    """Makes every linear a quantized one whose codes are only known by their shape."""
    import torch

    from gptq_compile.passes.stages import quantizable

    ops = torch.ops.gptq_compile

    def never() -> torch.Tensor:
        raise RuntimeError("The weights of a skeleton are made on the GPU.")

    for node in quantizable(program, head):
        x, weight, *rest = node.args
        rows, columns = (int(d) for d in weight.meta["val"].shape)
        name, grid = weight.meta["param"], (rows, 1 if group_size < 0 else -(-columns // group_size))
        tensors = []
        for key, shape, dtype in (
            ("codes", (rows, columns), torch.uint8), ("scales", grid, torch.float32), ("zeros", grid, torch.uint8),
        ):  # fmt: skip
            program.params.add(f"{name}.{key}", shape, dtype, never)
            tensors.append(program._placeholder(f"{name}.{key}"))
        bias = rest[0] if rest else node.kwargs.get("bias")
        with program.graph.inserting_before(node):
            new = program.call(ops.quant_linear.default, (x, *tensors, None, bias, bits, group_size), like=node)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    for node in [n for n in program.param_nodes.values() if not n.users]:
        program.graph.erase_node(node)


class _Skeleton:
    """Stands for an artifact whose weights exist only on the GPU."""

    def __init__(self, folder: Path) -> None:
        from gptq_compile.runtime.manifest import read_manifest

        self.folder, self.manifest = folder, read_manifest(folder / "manifest.json")

    def path(self, name: str) -> Path:
        return self.folder / name

    def weight(self, weight: Any) -> Any:
        return weight


def random_weight(device: str, weight: Any) -> Any:
    """A weight on the device: any codes, scales and matrices that keep the size of activations, norms of one."""
    import torch
    import tvm_ffi

    from gptq_compile.runtime.ffi import function

    shape, dtype = weight.shape, getattr(torch, weight.dtype)
    if weight.dtype == "uint32":
        made = torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, device=device)
    elif weight.dtype == "uint8":
        made = torch.randint(6, 10, shape, dtype=dtype, device=device)
    elif weight.name.endswith(".scales"):
        # Codes of four bits are uniform around their zero points, with a deviation of 4.6.
        made = torch.rand(shape, dtype=dtype, device=device).add_(0.5).mul_(0.2 / 64)
    elif len(shape) > 1:
        made = torch.randn(shape, dtype=dtype, device=device).mul_(1 if "embed" in weight.name else shape[-1] ** -0.5)
    elif "norm" in weight.name and "bias" not in weight.name:
        made = torch.ones(shape, dtype=dtype, device=device)
    elif "bias" in weight.name:
        made = torch.zeros(shape, dtype=dtype, device=device)
    else:  # inverse frequencies of rotary embeddings and other constants
        count = math.prod(shape)
        made = torch.logspace(0, -4, count, dtype=torch.float64, device=device).to(dtype).reshape(shape)
    tensor = tvm_ffi.from_dlpack(made.contiguous())
    if weight.dtype == "uint32":
        return function("runtime.TVMTensorCreateView")(tensor, tvm_ffi.Shape(shape), tvm_ffi.dtype("uint32"), 0)
    return tensor


def open_engine(folder: Path, max_batch: int, tokens: int) -> Any:
    """An engine over a skeleton."""
    import torch

    from gptq_compile.runtime.device import open_device
    from gptq_compile.runtime.engine import Engine
    from gptq_compile.runtime.ffi import load_runtime

    skeleton: Any = _Skeleton(folder)
    kind, make = open_device(None, skeleton.manifest.target_kind, skeleton.manifest.archs)
    load_runtime(folder / "lib", kind == "cuda")
    device: Any = make()
    device.weight = lambda weight, dtype: random_weight(kind, weight)
    engine = Engine(skeleton, device, max_batch, tokens)
    if kind == "cuda":
        torch.cuda.synchronize()
    return engine


def read_rate(kind: str) -> float:
    """Bytes per second of something that only reads: the largest of many float32."""
    import torch

    big = torch.ones(1 << (30 if kind == "cuda" else 26), dtype=torch.float32, device=kind)
    seconds = []
    for _ in range(6):
        if kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.amax(big).item()
        seconds.append(time.perf_counter() - start)
    return big.nbytes / min(seconds)


def measure(folder: Path, batches: list[int], context: int, prompt: int, rate: float, steps: int) -> dict[str, Any]:
    """Step times (medians of generations) and time to first token of one skeleton."""
    manifest = json.loads((folder / "manifest.json").read_text())
    vocabulary = manifest["model"]["vocab_size"]
    tokens = max(batches) * (context + 2 * steps) + 2 * prompt
    started = time.perf_counter()
    engine = open_engine(folder, max(batches), tokens)
    found: dict[str, Any] = {"model": manifest["model"]["name"], "load_seconds": time.perf_counter() - started}
    read = [w for w in manifest["weights"] if "embed" not in w["name"]]
    weight_bytes = sum(math.prod(w["shape"]) * BYTES[w["dtype"]] for w in read)
    found["weight_gb"] = weight_bytes / 1e9
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"max_new_tokens": steps, "eos_token_id": [], "return_dict_in_generate": True}
    for batch in batches:
        length = context - steps // 2  # so that the mean context of the steps is the one asked for
        ids = [rng.integers(0, vocabulary, length).tolist() for _ in range(batch)]
        engine.generate(ids, **options)
        seconds = [1 / engine.generate(ids, **options)[0].tokens_per_second for _ in range(5)]
        step = statistics.median(seconds)
        cache = batch * context * engine.manifest.cache_bytes_per_token
        floor = (weight_bytes + cache) / rate
        found[f"batch_{batch}"] = {
            "step_ms": step * 1e3, "tokens_per_second": batch / step, "floor_ms": floor * 1e3, "ratio": step / floor,
        }  # fmt: skip
    firsts = []
    for _ in range(6):  # another prompt each time: what was in the cache before is not computed again
        ids = rng.integers(0, vocabulary, prompt).tolist()
        firsts.append(engine.generate(ids, **{**options, "max_new_tokens": 1}).prefill_seconds)
    found["first_token_ms"] = statistics.median(firsts[1:]) * 1e3
    engine.close()
    return found


def run(folders: list[Path], args: argparse.Namespace) -> None:
    import torch

    kind = json.loads((folders[0] / "manifest.json").read_text())["target"]["kind"]
    rate = read_rate(kind)
    name = torch.cuda.get_device_name() if kind == "cuda" else "cpu"
    report: dict[str, Any] = {"device": name, "read_gb_per_s": rate / 1e9, "models": []}
    for folder in folders:
        batches = [
            b for b in args.batch if str(b) in json.loads((folder / "manifest.json").read_text())["entries"]["decode"]
        ]
        if kind == "cuda":
            torch.cuda.empty_cache()  # of the model before
        report["models"].append(measure(folder, batches, args.context, args.prompt, rate, args.steps))
        print(json.dumps(report["models"][-1], indent=1), flush=True)
    base = next((m for m in report["models"] if m["model"].endswith("-16")), None)
    for model in report["models"]:
        if base is not None and model is not base:
            model["speedup_over_fp16"] = base["batch_1"]["step_ms"] / model["batch_1"]["step_ms"]
    print(json.dumps({k: v for k, v in report.items() if k != "models"}))
    print("\n".join(f"{m['model']}: {m.get('speedup_over_fp16', 1):.2f} x FP16" for m in report["models"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build")
    make.add_argument("out", type=Path)
    make.add_argument("shape")
    make.add_argument("--bits", type=int, default=4, help="16 builds the same graph in full precision")
    make.add_argument("--group-size", type=int, default=128)
    make.add_argument("--target", default="cuda:sm_90")
    make.add_argument("--head", action="store_true", help="quantize the head too")
    make.add_argument("--layers", type=int)
    make.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    go = commands.add_parser("run")
    go.add_argument("folders", type=Path, nargs="+")
    go.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    go.add_argument("--context", type=int, default=512)
    go.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt for the time to the first token")
    go.add_argument("--steps", type=int, default=64)
    go.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.command == "build":
        build_skeleton(args.out, args)
    else:
        run(args.folders, args)


if __name__ == "__main__":
    main()
