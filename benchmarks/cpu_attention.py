# SPDX-License-Identifier: Apache-2.0
"""Time of the CPU's attention alone: decode steps at several contexts, and prompts, of whole models.

    python benchmarks/cpu_attention.py --shape smollm2-135m --cache float32,float16,int8

Every layer has a cache of its own, as in a model, so what a step reads comes from memory when it is longer than the
processor's cache. Medians over the steps. A step stores a token in each cache as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm
from gptq_compile.runtime import processor

PAGE = 16
# layers, query heads, key heads, head dimension
SHAPES = {"smollm2-135m": (30, 9, 3, 64), "llama-3.2-1b": (16, 32, 8, 64)}


def compiled(op: str, target: Target, rows: int | None, cache: str, **attrs: Any) -> Any:
    """The function that the registry picks; a cache of the activations' type needs no name."""
    attrs |= {"cache_dtype": cache} if cache != "float32" else {}
    case = Case.make(op, "float32", rows, page_size=PAGE, **attrs)
    kernel = select(case, target).kernel
    return tvm.compile(kernel.prim_func(case, target), target=target.tvm())[op]


def caches(layers: int, tokens: int, heads: int, dim: int, dtype: str) -> list[Any]:
    """Keys and values of every layer, of random numbers."""
    shape = (-(-tokens // PAGE) + 1, heads, PAGE, dim + 4 * (dtype == "int8"))
    rng = np.random.default_rng(0)
    made = []
    for _ in range(2 * layers):
        values = rng.standard_normal(shape, np.float32)
        made.append(tvm.runtime.tensor(values.astype(dtype) if dtype != "int8" else np.ones(shape, np.int8)))
    return made


def measure(shape: str, target: Target, cache: str, contexts: list[int], prompts: list[int]) -> dict[str, float]:
    """Milliseconds of all layers' attention: ``decode N`` at a context of N tokens, ``prefill N`` of N tokens."""
    layers, heads, kv_heads, dim = SHAPES[shape]
    both = {"kv_heads": kv_heads, "head_dim": dim, "v_head_dim": dim}
    rng = np.random.default_rng(0)
    result = {}
    for what, sizes in (("decode", contexts), ("prefill", prompts)):
        rows = 1 if what == "decode" else None
        if not sizes:
            continue
        attend = compiled("paged_attention", target, rows, cache, heads=heads, **both)
        append = compiled("kv_append", target, rows, cache, **both)
        for size in sizes:
            n = rows or size
            memory = caches(layers, size, kv_heads, dim, cache)
            table = rng.permutation(-(-size // PAGE)).astype(np.int32)[None]
            positions = np.arange(size - n, size, dtype=np.int32)
            slots = (table[0, positions // PAGE] * PAGE + positions % PAGE).astype(np.int32)
            q, k, v = (rng.standard_normal((n, h, dim), np.float32) for h in (heads, kv_heads, kv_heads))
            args = [tvm.runtime.tensor(x) for x in (positions, np.zeros(n, np.int32), table)]
            query, key, value, where, out = (tvm.runtime.tensor(x) for x in (q, k, v, slots, np.empty_like(q)))
            times = []
            for _ in range(60 if what == "decode" else 5):
                start = time.perf_counter()
                for layer in range(layers):
                    append(key, value, where, memory[2 * layer], memory[2 * layer + 1])
                    attend(query, memory[2 * layer], memory[2 * layer + 1], *args, out)
                times.append(1e3 * (time.perf_counter() - start))
            result[f"{what} {size}"] = round(statistics.median(times), 3)
    return result


def main() -> None:
    """Prints a JSON line for each type of cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--cache", default="float32")
    parser.add_argument(
        "--arch", default="", help="an architecture of `cpu` targets (default: the best that runs here)"
    )
    parser.add_argument("--contexts", default="32,512,1500,4096")
    parser.add_argument("--prompts", default="512,1024")
    args = parser.parse_args()
    arch = args.arch or processor.choose(list(Target.parse("cpu").archs))
    contexts, prompts = ([int(n) for n in text.split(",") if n] for text in (args.contexts, args.prompts))
    for cache in args.cache.split(","):
        times = measure(args.shape, Target.parse(f"cpu:{arch}"), cache, contexts, prompts)
        print(json.dumps({"shape": args.shape, "arch": arch, "cache": cache, "ms": times}), flush=True)


if __name__ == "__main__":
    main()
