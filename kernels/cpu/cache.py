# SPDX-License-Identifier: Apache-2.0
"""The KV cache on the CPU: keys by column, in float32, float16 or int8 (see `cache_format`)."""

from __future__ import annotations

import math
from typing import Any

from gptq_compile.kernels import cache_format
from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import refuse_dtype
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Expr, Function, on_stack, script, store, when
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm

_SERIAL_VALUES = 1 << 15
"""Values of a call of known size below which a parallel launch costs more than it saves."""
_LARGEST_FLOAT = 3.4e38


class Pages:
    """The keys or the values of all pages.

    Args:
        cache: the tensor ``[pages, heads, page_size, row_width]``.
        dim: features of a row.
        columns: whether a page is stored by column.
    """

    def __init__(self, cache: Any, dim: int, columns: bool) -> None:
        ir = script()
        pages, heads, size, width = cache.shape
        size, width = int(size), int(width)
        self.dim, self.size, self.columns, self.dtype = dim, size, columns, str(cache.dtype)
        self._flat = ir.decl_buffer((pages, heads, size * width), cache.dtype, data=cache.data)
        self._scales = None
        if self.dtype == "int8":
            self._scales = ir.decl_buffer((pages, heads, size * width // 4), "float32", data=cache.data)

    @staticmethod
    def tensor(f: Function, name: str, pages: Expr, heads: int, size: int, dim: int, dtype: str) -> Any:
        """The parameter of a kernel that holds the cache."""
        return f.tensor(name, (pages, heads, size, cache_format.row_width(dtype, dim)), dtype)

    @property
    def scaled(self) -> bool:
        """Whether rows have scales."""
        return self._scales is not None

    def _at(self, page: Expr, head: Expr, row: Expr, feature: Expr) -> tuple[Expr, ...]:
        inside = feature * self.size + row if self.columns else row * self.dim + feature
        return script().cast(page, "int64"), head, inside

    def value(self, page: Expr, head: Expr, row: Expr, feature: Expr) -> Expr:
        """A value in float32, its row's scale left out."""
        return script().cast(self._flat[self._at(page, head, row, feature)], "float32")

    def scale(self, page: Expr, head: Expr, row: Expr) -> Expr:
        """The scale of a row."""
        assert self._scales is not None
        return self._scales[script().cast(page, "int64"), head, self.size * self.dim // 4 + row]

    def put(self, page: Expr, head: Expr, row: Expr, source: Any, token: Expr) -> None:
        """Emits the storing of ``source[token, head]`` as a row."""
        ir = script()
        lanes = tm.lanes(self.dim, 16)
        if self._scales is None:
            with ir.serial(self.dim // lanes) as i:
                if self.columns:
                    with ir.serial(lanes) as lane:
                        self._put(page, head, row, i * lanes + lane, source[token, head, i * lanes + lane])
                else:
                    with ir.vectorized(lanes) as lane:
                        self._put(page, head, row, i * lanes + lane, source[token, head, i * lanes + lane])
            return
        largest, plain, factor = on_stack(lanes), on_stack(lanes), on_stack(2)
        for array in (largest, plain):
            with ir.vectorized(lanes) as lane:
                store(array, (lane,), ir.float32(0))
        with ir.serial(self.dim // lanes) as i:
            with ir.vectorized(lanes) as lane:
                value = ir.fabs(ir.cast(source[token, head, i * lanes + lane], "float32"))
                store(largest, (lane,), ir.max(largest[lane], value))
            with ir.vectorized(lanes) as lane:
                value = ir.fabs(ir.cast(source[token, head, i * lanes + lane], "float32"))
                store(plain, (lane,), plain[lane] + value)
        store(factor, (0,), fold(largest, lanes, ir.max))
        store(factor, (1,), fold(plain, lanes, lambda a, b: a + b))
        finite = factor[1] <= ir.float32(_LARGEST_FLOAT)  # which is false for NaN
        scale = ir.Select(finite, factor[0] * ir.float32(1 / cache_format.LARGEST), ir.float32(math.nan))
        store(self._scales, (ir.cast(page, "int64"), head, self.size * self.dim // 4 + row), scale)
        usable = tvm.tirx.all(finite, factor[0] > ir.float32(cache_format.LEAST))
        store(factor, (1,), ir.Select(usable, ir.float32(cache_format.LARGEST) / factor[0], ir.float32(0)))
        codes = on_stack(lanes, "int32")
        with ir.serial(self.dim // lanes) as i:
            with ir.vectorized(lanes) as lane:
                value = ir.cast(source[token, head, i * lanes + lane], "float32") * factor[1]
                store(codes, (lane,), ir.cast(ir.nearbyint(value), "int32"))
            if self.columns:
                with ir.serial(lanes) as lane:
                    self._put(page, head, row, i * lanes + lane, codes[lane])
            else:
                with ir.vectorized(lanes) as lane:
                    self._put(page, head, row, i * lanes + lane, codes[lane])

    def _put(self, page: Expr, head: Expr, row: Expr, feature: Expr, value: Expr) -> None:
        store(self._flat, self._at(page, head, row, feature), script().cast(value, self.dtype))


def fold(vector: Any, lanes: int, join: Any) -> Expr:
    """All lanes of an array joined to one; by shuffles, because narrower loads would pin the vector to memory."""
    tir = tvm.tirx
    value = tir.BufferLoad(vector, [tir.Ramp(0, 1, lanes)]) if lanes > 1 else vector[0]
    while lanes > 1:
        lanes //= 2
        value = join(tir.Shuffle([value], list(range(lanes))), tir.Shuffle([value], list(range(lanes, 2 * lanes))))
    return value


def cache_dtype(case: Case) -> str:
    """Type of the cache: that of the activations unless the case names another."""
    return str(case.get("cache_dtype", case.dtype))


def refuse_cache(case: Case) -> Refusal | None:
    """Refuses types that no kernel here is written for."""
    if cache_dtype(case) not in cache_format.CACHE_DTYPES:
        known = " and ".join(cache_format.CACHE_DTYPES)
        return Refusal(f"the cache is {cache_dtype(case)}; this kernel is written for {known}")
    return None


def _accepts(case: Case, target: Target) -> Refusal | None:
    return refuse_dtype(case) or refuse_cache(case)


def _append(case: Case, target: Target) -> Any:
    """Stores k and v of each token at its slot; a negative slot is skipped."""
    ir = script()
    n, dtype = tm.rows(case), cache_dtype(case)
    heads, dim, size = int(case["kv_heads"]), int(case["head_dim"]), int(case.get("page_size", 16))
    v_dim = int(case.get("v_head_dim", dim))
    with Function("kv_append") as f:
        k, v = f.tensor("k", (n, heads, dim), case.dtype), f.tensor("v", (n, heads, v_dim), case.dtype)
        slots, pages = f.tensor("slots", (n,), "int32"), f.symbol("num_pages")
        k_cache = Pages.tensor(f, "k_cache", pages, heads, size, dim, dtype)
        v_cache = Pages.tensor(f, "v_cache", pages, heads, size, v_dim, dtype)
        keys, values = Pages(k_cache, dim, True), Pages(v_cache, v_dim, False)
        loop = ir.parallel
        if case.rows is not None and case.rows * heads * (dim + v_dim) <= _SERIAL_VALUES:
            loop = ir.serial
        with loop(n) as t, when(slots[t] >= 0), ir.serial(heads) as h:
            page, row = slots[t] // size, slots[t] % size
            keys.put(page, h, row, k, t)
            values.put(page, h, row, v, t)
    return f.result()


KERNELS = (Kernel("cpu.kv_append", "kv_append", _accepts, _append),)
