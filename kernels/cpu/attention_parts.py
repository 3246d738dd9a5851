# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels of the CPU share: their arguments, register tiles and scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import AttentionParams, refuse_dtype, refuse_heads
from gptq_compile.kernels.cpu.cache import Pages, cache_dtype, refuse_cache
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.script import Expr, Function, on_stack, script, store
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm

MASKED = -3.0e38
"""Stand-in for minus infinity that stays finite in (score - maximum), so that an empty maximum gives 0, not NaN."""
NO_MAXIMUM = -1.0e30
CHUNK = 64
"""Keys between two looks at the largest score."""


def refuse(case: Case) -> Refusal | None:
    """Refuses what no attention kernel here can do."""
    return refuse_heads(case) or refuse_dtype(case) or refuse_cache(case)


def vector_lanes(target: Target) -> int:
    """Floats of a vector register."""
    return 16 if target.has("avx512f") else 8


def accumulators(target: Target) -> int:
    """Vectors of sums that fit into the registers beside what is multiplied."""
    return 24 if target.has("avx512f") else 12


def divisor(number: int, most: int) -> int:
    """The largest divisor of a number up to a bound, at least 1."""
    return next(d for d in range(max(1, min(number, most)), 0, -1) if number % d == 0)


class Arguments:
    """The tensors of a paged_attention kernel.

    Attributes:
        p: the case's attributes. ``n``: tokens, a number or symbolic. ``key_lanes``, ``value_lanes``: vector lengths.
        chunk_pages: pages that are looked at together, ``chunk`` keys.
    """

    def __init__(self, f: Function, case: Case, target: Target) -> None:
        self.p = p = AttentionParams.of(case)
        self.n, self.dtype = tm.rows(case), case.dtype
        dtype, size = cache_dtype(case), p.page_size
        self.q = f.tensor("q", (self.n, p.heads, p.head_dim), case.dtype)
        pages = f.symbol("num_pages")
        k_cache = Pages.tensor(f, "k_cache", pages, p.kv_heads, size, p.head_dim, dtype)
        v_cache = Pages.tensor(f, "v_cache", pages, p.kv_heads, size, p.v_head_dim, dtype)
        self.positions = f.tensor("positions", (self.n,), "int32")
        self.sequences = f.tensor("seq_of_token", (self.n,), "int32")
        self.table = f.tensor("page_table", (f.symbol("b"), f.symbol("p")), "int32")
        self.sinks = f.tensor("sinks", (p.heads,), "float32") if p.has_sinks else None
        self.slopes = f.tensor("alibi_slopes", (p.heads,), "float32") if p.has_alibi else None
        self.out = f.tensor("out", (self.n, p.heads, p.v_head_dim), case.dtype)
        self.keys, self.values = Pages(k_cache, p.head_dim, True), Pages(v_cache, p.v_head_dim, False)
        self.key_lanes = tm.lanes(size, vector_lanes(target))
        self.query_lanes = tm.lanes(p.head_dim, vector_lanes(target))
        self.value_lanes = tm.lanes(p.v_head_dim, vector_lanes(target))
        self.chunk_pages = max(1, CHUNK // size)
        self.chunk = self.chunk_pages * size

    def first(self, position: Expr) -> Expr:
        """The first cache position that a token at ``position`` sees."""
        ir = script()
        return ir.max(position - (self.p.window - 1), 0) if self.p.window else ir.int32(0)

    def score(self, product: Expr, key: Expr, position: Expr, head: Expr) -> Expr:
        """Logit of a key at position ``key`` by the scaled product q.k; MASKED where the token does not see it."""
        ir, p = script(), self.p
        if p.softcap:
            product = tm.f32(p.softcap) * tm.tanh(product * tm.f32(1.0 / p.softcap))
        if self.slopes is not None:
            product = product + self.slopes[head] * ir.cast(key - position, "float32")
        seen = key <= position
        if p.window:
            seen = tvm.tirx.all(seen, key > position - p.window)
        return ir.Select(seen, product, ir.float32(MASKED))

    def load_query(self, to: Any, row: Expr, token: Expr, head: Expr) -> None:
        """Emits ``to[row] = scale * q[token, head]``."""
        ir = script()
        with each(self.p.head_dim, self.query_lanes) as at:
            store(to, (row, at), ir.cast(self.q[token, head, at], "float32") * ir.float32(self.p.scale))


def held(value: Expr, dtype: str = "int32") -> Expr:
    """Emits a variable with a value, and returns the variable."""
    variable = on_stack(1, dtype)
    store(variable, (0,), script().cast(value, dtype))
    return variable[0]


@contextlib.contextmanager
def each(count: int, lanes: int) -> Iterator[Expr]:
    """Emits a loop over ``count`` elements, a vector at a time, around the statements of the block."""
    ir = script()
    with ir.serial(count // lanes) as i, ir.vectorized(lanes) as lane:
        yield i * lanes + lane


def vectors(count: int, lanes: int) -> list[Any]:
    """Emits arrays for register tiles."""
    return [on_stack(lanes) for _ in range(count)]


def fill(array: Any, lanes: int, value: float) -> None:
    """Emits the setting of all lanes of an array."""
    ir = script()
    with ir.vectorized(lanes) as lane:
        store(array, (lane,), ir.float32(value))
