# SPDX-License-Identifier: Apache-2.0
"""Runs CPU kernels on buffers that touch pages nobody may read; a program of its own, since a stray access ends it.

Every argument, packed weights and outputs included, lies twice: once so that it ends at an inaccessible page, once so
that it begins behind one. Generated code may assume tensors aligned to 64 bytes, so an array whose size is no multiple
of that ends up to 63 bytes before the page; those bytes are filled with two patterns, and must neither change nor
change the result.

``python -m tests.kernels.guarded ARCH GROUP...`` runs each group in a process forked after the imports, prints the name
of each case before it runs, and how each group ended.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tvm_ffi

from gptq_compile.kernels.cache_format import CACHE_DTYPES, CacheFormat
from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T, tvm
from gptq_compile.kernels.words import Grouping
from tests.gpu import cases_attention, cases_ops
from tests.gpu.op_case import OpCase

ALIGNMENT = 64  # bytes; what TVM's generated code may assume
PAGE = mmap.PAGESIZE
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guarded:
    """A copy of an array between two inaccessible pages.

    Attributes:
        array: the copy, 64-byte aligned.
    """

    def __init__(self, array: np.ndarray, at_end: bool, fill: int) -> None:
        size = -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        self._pages = max(1, -(-size // PAGE))
        base = _libc.mmap(None, (self._pages + 2) * PAGE, 0, _ANONYMOUS, -1, 0)  # 0: PROT_NONE
        if base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("mmap failed")
        self._base = base
        if _libc.mprotect(base + PAGE, self._pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
        inside = (ctypes.c_uint8 * (self._pages * PAGE)).from_address(base + PAGE)
        self._bytes = np.frombuffer(inside, np.uint8)
        self._bytes[:] = fill
        self._fill = fill
        self._begin = self._pages * PAGE - size if at_end else 0
        self._end = self._begin + array.nbytes
        self.array = self._bytes[self._begin : self._end].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    def around_is_untouched(self) -> bool:
        """Whether the accessible bytes beside the array are what they were filled with."""
        beside = (self._bytes[: self._begin], self._bytes[self._end :])
        return all(bool((part == self._fill).all()) for part in beside)

    def close(self) -> None:
        """Gives the memory back; the array must not be used again."""
        self.array = self._bytes = np.empty(0, np.uint8)
        _libc.munmap(self._base, (self._pages + 2) * PAGE)


def run(function: Callable[..., object], arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Calls a kernel on guarded copies in every placement.

    Returns:
        The arguments after the call.

    Raises:
        AssertionError: if something beside an argument changed, or changed a result.
    """
    results: list[list[np.ndarray]] = []
    for at_end in (True, False):
        for fill in (0xFF, 0x55):  # NaN, and a large number
            copies = [Guarded(np.ascontiguousarray(argument), at_end, fill) for argument in arguments]
            function(*[tvm_ffi.from_dlpack(copy.array) for copy in copies])
            assert all(copy.around_is_untouched() for copy in copies), "bytes beside an argument were written"
            results.append([copy.array.copy() for copy in copies])
            for copy in copies:
                copy.close()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes(), "bytes beside an argument were read"
    return results[0]


# K, N, group: whole vectors and panels, and nothing of the kind.
_SHAPES = ((256, 64, 64), (130, 37, 20), (77, 16, -1), (300, 17, 128), (33, 5, 7))
_CACHE_OPS = ("paged_attention", "kv_append")
_ROWS = (((1, 1), (2, 2), (None, 17)), ((1, 1), (8, 8), (None, 1)))


def linear_cases(target: Target, bits: int) -> Iterator[tuple[str, Case, list[np.ndarray]]]:
    """Quantized linears as artifacts have them: (name, case, arguments with the output last)."""
    rng = np.random.default_rng(1)
    for i, ((k, n, group), activations) in enumerate(itertools.product(_SHAPES, ("float", "int8"))):
        for rows, tokens in _ROWS[i // 2 % 2]:
            zeros = i % 4 < 2
            case = Case.make(
                "quant_linear", "float32", rows, in_features=k, out_features=n, bits=bits, group_size=group,
                has_zeros=zeros, has_bias=not zeros, activations=activations,
            )  # fmt: skip
            grouping = Grouping.of(bits, k, group)
            codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
            scales = (rng.uniform(0.5, 2.0, (n, grouping.groups)) / 100).astype(np.float16).astype(np.float32)
            offsets = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if zeros else None
            packed = layout_for(case, target).pack(case, codes, scales, offsets)
            bias = [] if zeros else [rng.standard_normal(n).astype(np.float32)]
            x = rng.standard_normal((tokens, k)).astype(np.float32)
            out = np.full((tokens, n), np.nan, np.float32)
            yield f"{bits} bits, {n} x {k}, groups of {group}, rows {rows}, {activations}", case, [
                x, *packed.values(), *bias, out,
            ]  # fmt: skip


def plain_cases() -> Iterator[tuple[str, Case, list[np.ndarray]]]:
    """Linears that are not quantized, the head among them."""
    rng = np.random.default_rng(2)
    for k, n in ((64, 128), (576, 65), (33, 7)):
        for rows, tokens in ((1, 1), (3, 3), (None, 5)):
            case = Case.make(
                "linear", "float32", rows, in_features=k, out_features=n, has_bias=False, out_dtype="float32",
                weight_dtype="float32",
            )  # fmt: skip
            x, w = (rng.standard_normal((m, k)).astype(np.float32) for m in (tokens, n))
            yield f"linear {n} x {k}, rows {rows}", case, [x, w, np.full((tokens, n), np.nan, np.float32)]


def op_cases() -> Iterator[tuple[str, Case, list[np.ndarray]]]:
    """Every op but the linears and what reads the cache, at sizes around a vector."""
    yield from _sized(c for c in cases_ops.op_cases("float32") if c.case.op not in _CACHE_OPS)


def cache_cases(dtype: str) -> Iterator[tuple[str, Case, list[np.ndarray]]]:
    """Attention and the storing of keys and values, at sizes around a page of the cache."""
    yield from _sized(cases_attention.attention_cases("float32", CacheFormat(dtype, True)))


def _sized(cases: Iterable[OpCase]) -> Iterator[tuple[str, Case, list[np.ndarray]]]:
    for op_case in cases:
        for n in [size for size in op_case.sizes if size <= 17]:
            yield f"{op_case.name}, n={n}", op_case.case, op_case.make_inputs(np.random.default_rng(n), n)


def stray() -> Iterator[tuple[str, Case, list[np.ndarray]]]:
    """No kernel of ours: one that reads an element too many, to see that it is found."""

    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((16,), "float32"), out: T.Buffer((16,), "float32")):
        for i in range(16):
            out[i] = a[i] + a[i + 1]

    ones = np.ones(16, np.float32)
    print("stray", flush=True)
    run(tvm.compile(main, target=Target.parse("cpu:x86-64-v3").tvm())["main"], [ones, ones])
    yield from ()


def check(arch: str, group: str) -> int:
    """Runs a group's cases; returns how many there were."""
    target = Target.parse(f"cpu:{arch}")
    cases = {
        "linear": plain_cases, "ops": op_cases, "stray": stray,
        **{f"cache-{dtype}": functools.partial(cache_cases, dtype) for dtype in CACHE_DTYPES},
        **{f"bits{b}": functools.partial(linear_cases, target, b) for b in (2, 3, 4, 8)},
    }[group]  # fmt: skip
    compiled: dict[Case, Callable[..., object]] = {}
    count = 0
    for name, case, arguments in cases():
        kernel = select(case, target).kernel
        print(f"{kernel.name}: {name}", flush=True)
        if case not in compiled:
            compiled[case] = tvm.compile(kernel.prim_func(case, target), target=target.tvm())[case.op]
        after = run(compiled[case], arguments)
        sizes = [math.prod(a.shape) for a in after]
        assert all(sizes), "an argument is empty, which tests nothing"
        count += 1
    return count


if __name__ == "__main__":
    arch, *groups = sys.argv[1:]
    for group in groups:
        if (pid := os.fork()) == 0:
            print(check(arch, group), "cases", flush=True)
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"{group}: exit code {status}", flush=True)
