# SPDX-License-Identifier: Apache-2.0
"""Cases of the attention of a decode step, with float64 references.

Importing this needs numpy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import Arguments, KernelCase, poisoned

from gptq_compile.kernels import reference
from gptq_compile.kernels.registry import Case

PAGE = 16
_TOLERANCE = 4e-3  # of |difference| / (1 + |expected|): halves are rounded twice


def cases() -> list[KernelCase]:
    """Every option, head shapes of several models, short and long contexts, one and many rows."""
    options: list[dict[str, Any]] = [
        {"label": "plain"},
        {"label": "merged", "merged": True},
        {"label": "window", "window": 21, "softcap": 5.0},
        {"label": "sinks", "has_sinks": True, "merged": True, "input_dtype": "float32"},
        {"label": "alibi", "has_alibi": True, "rotary": 0},
        {"label": "interleaved", "interleaved": True, "rotary": 16, "headwise": True},
    ]
    shapes = [
        # heads, key heads, head_dim, v_head_dim, rows, longest context
        (6, 2, 32, 32, 1, 70), (4, 4, 24, 16, 3, 40), (9, 3, 64, 64, 1, 300), (32, 8, 128, 128, 1, 700),
        (16, 1, 128, 128, 2, 500), (12, 2, 80, 80, 2, 200), (8, 4, 256, 256, 1, 300), (32, 8, 128, 128, 33, 64),
    ]  # fmt: skip
    found = []
    for i, (heads, kv_heads, dim, v_dim, rows, longest) in enumerate(shapes):
        for j, option in enumerate(options):
            if i < 2 or i == 3 or (i + j) % 3 == 0:
                found.append(_case(heads, kv_heads, dim, v_dim, rows, longest, dict(option)))
    return found


def _case(heads: int, kv_heads: int, dim: int, v_dim: int, rows: int, longest: int, option: dict) -> KernelCase:
    label, merged, headwise = option.pop("label"), option.pop("merged", False), option.pop("headwise", False)
    rotary, dtype = option.pop("rotary", dim), option.pop("input_dtype", "float16")
    sizes = {"q": (heads, dim), "k": (kv_heads, dim), "v": (kv_heads, v_dim)}
    places: dict[str, int] = {}
    if merged:  # q, k and v side by side in one tensor
        starts = np.cumsum([0, *(h * d for h, d in sizes.values())]).tolist()
        for key, start in zip(sizes, starts, strict=False):
            places |= {f"{key}_width": starts[-1], f"{key}_at": start, f"{key}_head": sizes[key][1]}
    else:  # or a tensor each, where heads may stand apart
        gap = 8 if headwise else 0
        for key, (h, d) in sizes.items():
            places |= {f"{key}_width": h * (d + gap), f"{key}_at": gap, f"{key}_head": d + gap}
            places[f"{key}_at"] = gap if headwise else 0
    case = Case.make(
        "decode_attention", "float16", rows, heads=heads, kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim,
        page_size=PAGE, scale=dim**-0.5, rotary_dim=rotary, input_dtype=dtype, **places, **option,
    )  # fmt: skip
    name = f"decode_attention_{label}_h{heads}_k{kv_heads}_d{dim}_m{rows}"
    table = -(-longest // PAGE) + 1
    pages = rows * table + 1

    def make(rng: np.random.Generator) -> Arguments:
        if merged:
            whole = rng.normal(size=(rows, case["q_width"])).astype(dtype)
            found = [whole, whole.copy(), whole.copy()]
        else:
            found = [rng.normal(size=(rows, case[f"{key}_width"])).astype(dtype) for key in sizes]
        positions = rng.integers(0, longest, rows).astype(np.int32)
        positions[0] = longest - 1
        if rows > 1:
            positions[1] = 0
        if rotary:
            angles = positions[:, None] / 100.0 ** (np.arange(rotary // 2) / (rotary // 2))
            angles = np.repeat(angles, 2, 1) if case.get("interleaved") else np.tile(angles, 2)
            found += [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
        page_table = rng.permutation(pages - 1)[: rows * table].reshape(rows, table).astype(np.int32)
        at = np.arange(rows)
        slots = page_table[at, positions // PAGE] * PAGE + positions % PAGE
        sequences = at[::-1].astype(np.int32)  # token t belongs to row sequences[t] of the table
        found += [positions, slots[::-1].astype(np.int32)[::-1].copy(), sequences, page_table[::-1].copy()]
        for d in (dim, v_dim):
            found.append(rng.normal(size=(pages, kv_heads, PAGE, d)).astype(np.float16))
        if case.get("has_sinks"):
            found.append(rng.normal(size=heads).astype(np.float32))
        if case.get("has_alibi"):
            found.append((2.0 ** -np.arange(1, heads + 1)).astype(np.float32))
        return [*found, poisoned((rows, heads, v_dim), "float16")]

    def check(before: Arguments, after: Arguments) -> tuple[bool, str]:
        cache_at = 3 + 2 * bool(rotary) + 4
        keys, values, out = expected(case, before)
        worst = 0.0
        for index, want in ((cache_at, keys), (cache_at + 1, values), (len(after) - 1, out)):
            error = np.abs(after[index].astype(np.float64) - want) / (1 + np.abs(want))
            if not np.all(error <= _TOLERANCE):
                return False, f"argument {index}: error {np.nanmax(error):.2e}, {int(np.isnan(error).sum())} NaN"
            worst = max(worst, float(error.max()))
        return True, f"error {worst:.2e}"

    return KernelCase(name, case, make, check)


def expected(case: Case, arguments: Arguments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(k_cache, v_cache, out) after the call, float64 (what is stored in halves rounded to them)."""
    left = list(arguments)
    heads = {"q": case["heads"], "k": case["kv_heads"], "v": case["kv_heads"]}
    dims = {"q": case["head_dim"], "k": case["head_dim"], "v": case["v_head_dim"]}
    parts = {}
    for key in heads:
        tensor, at, apart = left.pop(0), case[f"{key}_at"], case[f"{key}_head"]
        columns = at + np.arange(heads[key])[:, None] * apart + np.arange(dims[key])
        parts[key] = tensor[:, columns]
    if case["rotary_dim"]:
        cos, sin = left.pop(0), left.pop(0)
        for key in ("q", "k"):
            turned = reference.rotary_embedding(parts[key], cos, sin, bool(case.get("interleaved")))
            parts[key] = turned
    parts = {key: part.astype(np.float16) for key, part in parts.items()}
    positions, slots, sequences, page_table, k_cache, v_cache = left[:6]
    sinks = left[6] if case.get("has_sinks") else None
    slopes = left[6] if case.get("has_alibi") else None
    k_cache, v_cache = reference.kv_append(parts["k"], parts["v"], slots, k_cache, v_cache)
    out = reference.paged_attention(
        parts["q"], k_cache, v_cache, positions, sequences, page_table, sinks, slopes, scale=case["scale"],
        window=case.get("window", 0), softcap=case.get("softcap", 0.0),
    )  # fmt: skip
    return k_cache.astype(np.float64), v_cache.astype(np.float64), out
