# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of quantizing models of real shapes with random weights, by phase.

The model is traced from its config and quantized by the same passes as any other; only its parameters are made where
they are used instead of being read from disk. Calibration is random token ids::

    python benchmarks/scale.py llama-3-8b --device cuda
    python benchmarks/scale.py opt-175b --layers 1 --device cuda --memory-gb 80
    torchrun --nproc-per-node 2 benchmarks/scale.py llama-3-8b --device cuda
    python benchmarks/scale.py tiny --device cpu --samples 8 --tokens 256
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from host_memory import HostPeak

from gptq_compile.frontend.trace import build_model, trace
from gptq_compile.kernels.target import Target
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pack_weights import PackWeights
from gptq_compile.passes.pipeline import trace_passes
from gptq_compile.passes.program import ParamStore, Program

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
            "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
        },
    ),
    "opt-175b": (
        "opt",
        {
            "vocab_size": 50272, "hidden_size": 12288, "ffn_dim": 49152, "num_hidden_layers": 96,
            "num_attention_heads": 96, "max_position_embeddings": 2048, "word_embed_proj_dim": 12288,
            "dtype": "float16",
        },
    ),
    "small": (
        "llama",
        {
            "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 1,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "dtype": "bfloat16",
        },
    ),
    "tiny": (
        "llama",
        {
            "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "dtype": "bfloat16",
        },
    ),
}  # fmt: skip


def random_model(shape: str, layers: int | None, device: torch.device) -> Program:
    """A program of a known shape whose parameters are made on ``device`` when they are read."""
    from transformers import AutoConfig

    from gptq_compile.frontend import hooks

    model_type, values = SHAPES[shape]
    if layers is not None:
        values = {**values, "num_hidden_layers": layers}
    config = AutoConfig.for_model(model_type, **values)
    dtype = getattr(torch, values["dtype"])
    params = ParamStore()
    with hooks.installed():
        skeleton = build_model(config, hooks.IMPLEMENTATION)
    for seed, (name, like) in enumerate(skeleton.named_parameters()):
        params.add(name, tuple(like.shape), dtype, lambda n=name, s=seed, t=like: _make(n, t, s, dtype, device))
    program = trace(config, params, name=shape)
    PassManager(trace_passes(), validate=False).run(program)
    return program


def _make(name: str, like: torch.Tensor, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Linears keep the size of their input, so that activations neither grow nor fade; norms are 1, biases small."""
    generator = torch.Generator(device).manual_seed(seed)
    if like.dim() > 1:
        fan = like.shape[1] if "embed" not in name else 1
        return torch.randn(like.shape, generator=generator, device=device, dtype=dtype) * fan**-0.5
    if "norm" in name and name.endswith("weight"):
        return torch.ones(like.shape, dtype=dtype, device=device)
    return torch.randn(like.shape, generator=generator, device=device, dtype=dtype) * 0.02


def _differing(codes: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Which part of the codes differ from another run's: of the first linear, of all, and how far at most."""
    parts, far = [], []
    for name, tensor in codes.items():
        other = others[name]
        parts.append(int((tensor != other).count_nonzero()) / tensor.numel())
        far.append(int(((tensor.short() - other.short()).abs_() > 1).count_nonzero()) / tensor.numel())
    return {
        "codes_differing_first": parts[0],
        "codes_differing": sum(parts) / len(parts),
        "codes_more_than_one_apart": sum(far) / len(far),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--memory-gb", type=float, help="refuse to use more of the GPU (1e9 bytes)")
    parser.add_argument("--target", default="cuda:sm_90", help="whose layout weights are packed to")
    parser.add_argument("--setting", nargs="*", default=[], help="NAME=VALUE of QuantizeConfig, values in JSON")
    parser.add_argument("--warm", action="store_true", help="quantize once before, so that all kernels are compiled")
    parser.add_argument("--save-codes", type=Path, help="file to keep all codes in")
    parser.add_argument("--compare-codes", type=Path, help="file with another run's codes to compare with")
    parser.add_argument("--out", type=Path, help="append the result as one JSON line")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:  # before weights are made on it
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    settings = {k: json.loads(v) for k, v in (s.split("=", 1) for s in args.setting)}
    start = time.perf_counter()
    program = random_model(args.shape, args.layers, device)
    traced = time.perf_counter() - start
    vocabulary = program.info.vocab_size
    ids = torch.randint(0, vocabulary, (args.samples, args.tokens), generator=torch.Generator().manual_seed(0))
    config = QuantizeConfig(nsamples=args.samples, seqlen=args.tokens, **settings)
    limit = int(args.memory_gb * 1e9) if args.memory_gb else None
    if args.warm:
        GptqQuantize(config, ids, device, memory_limit=limit).run(program.clone())
    step = GptqQuantize(config, ids, device, memory_limit=limit)
    if device.type == "cuda":
        if args.memory_gb:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_gb * 1e9 / total), device.index or 0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with HostPeak() as host:
        step.run(program)
    if device.type == "cuda":
        torch.cuda.synchronize()
    walk = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else host.bytes
    codes = {name: program.params.get(name) for name in program.params if name.endswith(".codes")}
    if args.save_codes and step.world.rank == 0:
        torch.save(codes, args.save_codes)
    compare = args.compare_codes and step.world.rank == 0
    differing = _differing(codes, torch.load(args.compare_codes)) if compare else {}
    del codes
    start = time.perf_counter()
    PassManager([PackWeights(Target.parse(args.target), device)], validate=False).run(program)
    packed = 0
    for name in list(program.param_nodes):
        if ".qweight" in name or name.endswith(("scales", "zeros")):
            packed += program.params.get(name).nbytes
    pack = time.perf_counter() - start
    result = {
        "shape": args.shape,
        "layers": args.layers or SHAPES[args.shape][1]["num_hidden_layers"],
        "calibration": [args.samples, args.tokens],
        "processes": step.world.size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "settings": settings,
        "trace_seconds": round(traced, 2),
        "seconds": round(walk + pack, 2),
        "walk_seconds": round(walk, 2),
        "phases": {k: round(v, 2) for k, v in step.seconds.items()},
        "pack_seconds": round(pack, 2),
        "packed_gb": round(packed / 1e9, 3),
        "peak_gb": round(peak / 1e9, 3),
        "planned_peak_gb": round(step.plan.peak / 1e9, 3) if step.plan else None,
        "plan": dict(step.plan.lines()) if step.plan else {},
        **differing,
        "relative_error": sum(r.error or 0 for r in step.reports) / max(1, len(step.reports)),
        "relative_error_rtn": sum(r.error_rtn or 0 for r in step.reports) / max(1, len(step.reports)),
    }
    if step.world.rank == 0:
        print(json.dumps(result, indent=1))
        if args.out:
            with args.out.open("a") as f:
                f.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
