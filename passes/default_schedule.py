# SPDX-License-Identifier: Apache-2.0
"""Default schedules for the PrimFuncs no kernel was written for: elementwise leftovers, reductions, gathers.

TVM's dlight has good fallbacks for GPUs but next to nothing for CPUs, where an unscheduled function runs on one core
and LLVM may not vectorize a floating-point reduction, because that reorders additions. The CPU rule here splits the
reduced axis into ``LANES`` partial results (``rfactor``), computes all blocks of one row together, and shares the rows
out over the cores.
"""

from __future__ import annotations

import logging
from typing import Any

import tvm_ffi

from gptq_compile.errors import BuildError
from gptq_compile.kernels.tvm_env import tvm

logger = logging.getLogger(__name__)

# Partial results of a vectorized reduction: four AVX2 registers of float32, which hides the latency of an addition.
LANES = 32
# Below this many output elements a function stays on one core: waking the thread pool costs about as much as
# computing 32k elements.
PARALLEL_ELEMENTS = 32768
GPU_THREADS = 256
_MAYBE_RESHAPE = 3  # parameters of the kernels that are called with one tensor: it, and one result or two

_OPAQUE_PATTERN = 8  # relax OpPatternKind.kOpaque


def is_scheduled(func: Any) -> bool:
    """Tells whether somebody wrote the loops of PrimFunc ``func`` on purpose.

    That is so if it says it (``tirx.is_scheduled``), or if any of its loops is bound to threads, parallel, vectorized
    or unrolled, or if it launches GPU threads, or if it is not made of schedulable blocks.
    """
    attrs = func.attrs
    if attrs is not None and int(attrs.get("tirx.is_scheduled", 0) or 0) == 1:
        return True
    marks: list[bool] = []
    blocks: list[bool] = []
    tvm_ffi.structural_walk(
        func.body,
        [
            (tvm.tirx.For, lambda loop: marks.append(loop.kind != tvm.tirx.ForKind.SERIAL)),
            (
                tvm.tirx.AttrStmt,
                lambda stmt: marks.append(stmt.attr_key in ("thread_extent", "virtual_thread")),
            ),
            (tvm.s_tir.SBlock, lambda _: blocks.append(True)),
        ],
        order="post",
    )
    return any(marks) or not blocks


def _mark(func: Any) -> Any:
    return func.with_attr("tirx.is_scheduled", True)


@tvm.transform.module_pass(opt_level=0, name="KeepKernels")
class KeepKernels:
    """Marks the PrimFuncs that are there before operators are legalized, so that they are kept as they are.

    None of them is fused with operators around it: a kernel's loops are its schedule, and an in-place kernel must
    not move. Those without a schedule still get one.
    """

    def transform_module(self, mod: Any, _: Any) -> Any:
        """Returns ``mod`` with every PrimFunc opaque to operator fusion and the scheduled ones marked."""
        mod = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, tvm.tirx.PrimFunc):
                kept = _mark(func) if is_scheduled(func) else func
                mod[var] = _with_root(kept).with_attr("op_pattern", _OPAQUE_PATTERN)
        return mod


def _with_root(func: Any) -> Any:
    """Puts the body of a function of two tensors or three into a root block.

    TVM looks for reshapes among the functions that are called with one tensor, and takes a root block for granted.
    """
    s_tir = tvm.s_tir
    if len(func.params) > _MAYBE_RESHAPE or isinstance(func.body, s_tir.SBlockRealize):
        return func
    body = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", func.body))
    return func.with_body(body)


@tvm.transform.module_pass(opt_level=0, name="SortShapeFunctions")
class SortShapeFunctions:
    """Puts the stores of every function that computes sizes into the order of their places.

    `VMShapeLower` leaves them in the order of a hash table over addresses, another one in every process, and the same
    model is to become the same bytes. They only read places that none of them writes.
    """

    def transform_module(self, mod: Any, _: Any) -> Any:
        """Returns ``mod`` with the bodies of shape functions sorted."""
        mod = mod.clone()
        for var, func in mod.functions_items():
            body = getattr(func, "body", None)
            if not (var.name_hint.startswith("shape_func") and isinstance(body, tvm.tirx.SeqStmt)):
                continue
            if all(isinstance(store, tvm.tirx.BufferStore) for store in body.seq):
                stores = sorted(body.seq, key=lambda store: int(store.indices[0]))
                mod[var] = func.with_body(tvm.tirx.SeqStmt(stores))
        return mod


@tvm.transform.module_pass(opt_level=0, name="ScheduleLeftovers")
class ScheduleLeftovers:
    """Gives every PrimFunc that is not scheduled yet a default schedule.

    Attributes:
        kind: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def transform_module(self, mod: Any, _: Any) -> Any:
        """Returns ``mod``; on the CPU a function that no rule can handle keeps its serial loops.

        Raises:
            BuildError: if a function cannot be mapped to GPU threads.
        """
        mod = mod.clone()
        for var, func in mod.functions_items():
            if not isinstance(func, tvm.tirx.PrimFunc) or is_scheduled(func):
                continue
            scheduled = schedule_cpu(func) if self.kind == "cpu" else schedule_gpu(func)
            if scheduled is not None:
                mod[var] = _mark(scheduled)
            elif self.kind == "cuda":
                raise BuildError(
                    f"The function {var.name_hint} has no GPU schedule and no default one fits it. "
                    f"Bind its loops to threads in the kernel that makes it."
                )
            else:
                logger.debug("%s keeps its serial loops", var.name_hint)
        return mod


def schedule_gpu(func: Any) -> Any | None:
    """Returns ``func`` with its loops bound to GPU threads by the first rule that can, else None."""
    from tvm.s_tir import dlight

    gpu = dlight.gpu
    target = tvm.target.Target.current(allow_none=False)
    for rule in (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()):
        try:
            schedule = rule.apply(func, target, False)
        except tvm.s_tir.ScheduleError as error:
            logger.debug("%s does not fit: %s", type(rule).__name__, error)
            continue
        if schedule is not None:
            schedule = schedule[0] if isinstance(schedule, list) else schedule
            return schedule.mod["main"]
    return _bind_in_place(func)


def _bind_in_place(func: Any) -> Any | None:
    """Schedules a function of one data-parallel block that reads what it writes.

    TVM's schedule checks refuse such blocks, because in general another iteration could read the element. A spatial
    block axis promises that iterations are independent, so the checks are turned off for this one case.
    """
    from tvm.s_tir.dlight.analysis import normalize_prim_func

    sch = tvm.s_tir.Schedule(func, enable_check=False)
    infos = normalize_prim_func(sch)
    if not infos or len(infos) != 1 or set(infos[0].dom_kind()) != {"S"}:
        return None
    points = sch.fuse(*sch.get_loops(infos[0].block_rv))
    block, thread = sch.split(points, factors=[None, GPU_THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return sch.mod["main"]


def schedule_cpu(func: Any) -> Any | None:
    """Returns ``func`` with rows shared over the cores and reductions vectorized, or None if no rule fits."""
    try:
        return _schedule_rows(func)
    except tvm.s_tir.ScheduleError as error:
        logger.debug("no row schedule: %s", error)
        return None


def _schedule_rows(func: Any) -> Any | None:
    from tvm.s_tir.dlight.analysis import normalize_prim_func

    sch = tvm.s_tir.Schedule(func)
    infos = normalize_prim_func(sch)
    if not infos:
        return None
    infos = _inline_cheap(sch, infos)
    kinds = [info.dom_kind() for info in infos]
    if any("O" in kind for kind in kinds):
        return None

    partial: dict[int, Any] = {}
    for index, (info, kind) in enumerate(zip(infos, kinds, strict=True)):
        if kind.endswith("R") and "R" not in kind[:-1]:
            block = _split_reduction(sch, info.block_rv, len(kind) - 1)
            if block is not None:
                partial[index] = block

    last = infos[-1].block_rv
    rows = min(_leading_spatial(kind) for kind in kinds)
    if all("R" not in kind for kind in kinds):
        rows = min(rows, len(kinds[-1]) - 1)  # the innermost axis is left for LLVM to vectorize
    if rows == 0:
        return sch.mod["main"]
    row = sch.fuse(*sch.get_loops(last)[:rows])
    if not _is_small(sch, last):
        sch.parallel(row)
    for index in reversed(range(len(infos))):
        if index != len(infos) - 1:
            sch.compute_at(infos[index].block_rv, row, preserve_unit_loops=True)
        if index in partial:
            sch.compute_at(partial[index], row, preserve_unit_loops=True)
            _vectorize_partial(sch, partial[index], row)
    return sch.mod["main"]


def _inline_cheap(sch: Any, infos: list[Any]) -> list[Any]:
    """Inlines elementwise producers of plain arithmetic and returns the other blocks.

    One that calls a function is computed once per element: softmax needs its exponentials twice.
    """
    kept = []
    for info in infos:
        calls: list[bool] = []
        tvm_ffi.structural_walk(sch.get(info.block_rv).body, [(tvm.ir.Call, lambda _, c=calls: c.append(True))])
        if info is not infos[-1] and info.is_injective() and not calls:
            try:
                sch.compute_inline(info.block_rv)
                continue
            except tvm.s_tir.ScheduleError as error:
                logger.debug("%s stays a block of its own: %s", info.name, error)
        kept.append(info)
    return kept


def _leading_spatial(kind: str) -> int:
    return len(kind) - len(kind.lstrip("S"))


def _split_reduction(sch: Any, block: Any, spatial: int) -> Any | None:
    """Splits the innermost reduced axis into ``LANES`` partial results; returns the block that computes them."""
    loop = sch.get_loops(block)[spatial]
    extent = sch.get(loop).extent
    if not isinstance(extent, tvm.tirx.IntImm) or extent.value % LANES or extent.value < 4 * LANES:
        return None
    _, lane = sch.split(loop, factors=[None, LANES])
    return sch.rfactor(lane, spatial)


def _vectorize_partial(sch: Any, block: Any, row: Any) -> None:
    """Makes the lane axis, which ``compute_at`` put first, the innermost one and vectorizes it."""
    below = [sch.get(loop).loop_var for loop in sch.get_loops(block)].index(sch.get(row).loop_var) + 1
    lane, *spatial, reduced = sch.get_loops(block)[below:]
    sch.reorder(*spatial, reduced, lane)
    sch.vectorize(lane)
    sch.decompose_reduction(block, reduced)


def _is_small(sch: Any, block: Any) -> bool:
    """Tells whether ``block`` visits a known, small number of points."""
    total = 1
    for loop in sch.get_loops(block):
        extent = sch.get(loop).extent
        if not isinstance(extent, tvm.tirx.IntImm):
            return False
        total *= extent.value
    return total < PARALLEL_ELEMENTS
