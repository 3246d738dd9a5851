# SPDX-License-Identifier: Apache-2.0
"""Times of the kernels of a captured step, over a driver that keeps count of what it is asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gptq_compile.runtime import kernel_times
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import DeviceError

WEIGHTS = {0x1000: 4096, 0x2000: 512, 0x9000: 1 << 30}
# (function, pointers among its arguments); the fourth node is a copy.
NODES = [(1, [0x1000, 0x7]), (1, [0x2000, 0x8]), (2, [0x5]), None, (3, [0x9000])]
NAMES = {1: b"linear_kernel", 2: b"norm_kernel", 3: b"take_kernel"}


class FakeDriver:
    """Graphs are lists; a replay of n nodes takes n milliseconds."""

    def __init__(self, without: str = "") -> None:
        self.without, self.live, self.clock = without, set[int](), 0.0
        self.graphs: dict[int, list[Any]] = {100: [*range(1, 6)]}
        self.attributes: list[tuple[int, int]] = []
        self.keep: list[Any] = []
        self._next = 1000

    def function(self, name: str, arguments: Any) -> Callable[..., int] | None:
        if name == self.without:
            return None
        body = getattr(self, f"_{name.removesuffix('_v2')}", lambda *_: 0)
        return lambda *given: body(*given) or 0

    def check(self, name: str, status: int) -> None:
        assert status == 0, name

    def _new(self, out: Any) -> int:
        self._next += 1
        self.live.add(self._next)
        out._obj.value = self._next
        return self._next

    def _cuStreamEndCapture(self, stream: Any, out: Any) -> None:
        out._obj.value = 100
        self.live.add(100)

    def _cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> None:
        if nodes is not None:
            nodes[:] = self.graphs[graph.value]
        count._obj.value = len(self.graphs[graph.value])

    def _cuGraphNodeGetType(self, node: int, out: Any) -> None:
        out._obj.value = 0 if NODES[node - 1] else 1

    def _cuGraphKernelNodeGetParams(self, node: Any, out: Any) -> None:
        made = NODES[node.value - 1]
        assert made is not None
        values = [ctypes.c_uint64(v) for v in made[1]] + [ctypes.c_int(3)]
        array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        self.keep += [values, array]
        out._obj.func, out._obj.kernel_params = made[0], array

    def _cuFuncGetName(self, out: Any, func: int) -> None:
        out._obj.value = NAMES[func]

    def _cuFuncGetParamInfo(self, func: int, index: int, offset: Any, size: Any) -> int:
        pointers = max(len(n[1]) for n in NODES if n and n[0] == func)
        size._obj.value = 8 if index < pointers else 4
        return 0 if index <= pointers else 1

    def _cuGraphCreate(self, out: Any, flags: int) -> None:
        self.graphs[self._new(out)] = []

    def _cuGraphAddKernelNode(self, out: Any, graph: Any, before: Any, count: int, params: Any) -> None:
        nodes = self.graphs[graph.value]
        assert count == (1 if nodes else 0) and (before._obj.value if before else None) == (nodes or [None])[-1]
        self._next += 1
        out._obj.value = self._next
        nodes.append(self._next)

    def _cuGraphKernelNodeCopyAttributes(self, to: Any, source: Any) -> None:
        self.attributes.append((to.value, source.value))

    def _cuGraphInstantiateWithFlags(self, out: Any, graph: Any, flags: int) -> None:
        self.graphs[self._new(out)] = self.graphs[graph.value]

    def _cuGraphLaunch(self, executable: Any, stream: Any) -> None:
        self.clock += len(self.graphs[executable.value])

    def _cuGraphDestroy(self, graph: Any) -> None:
        self.live.remove(graph.value)

    _cuGraphExecDestroy = _cuEventDestroy = _cuGraphDestroy

    def _cuEventCreate(self, out: Any, flags: int) -> None:
        self.graphs[self._new(out)] = []

    def _cuEventRecord(self, event: Any, stream: Any) -> None:
        self.graphs[event.value] = [self.clock]

    def _cuEventElapsedTime(self, out: Any, start: Any, end: Any) -> None:
        out._obj.value = self.graphs[end.value][0] - self.graphs[start.value][0]


def test_each_kernel_is_replayed_on_its_own() -> None:
    driver = FakeDriver()
    calls = kernel_times._Calls(driver)  # type: ignore[arg-type]
    device: Any = SimpleNamespace(handle=ctypes.c_void_p(7))
    ran: list[int] = []
    found = kernel_times._times(calls, device, lambda: ran.append(1), WEIGHTS)
    assert ran == [1]
    assert {k.name: (k.count, k.weight_bytes) for k in found} == {
        "linear_kernel": (2, (4096 + 512) / 2), "norm_kernel": (1, 0), "take_kernel": (1, 0),
    }  # fmt: skip
    assert found[0].name == "linear_kernel"  # most time first
    assert all(k.seconds == pytest.approx(1e-3) for k in found)  # a node is a millisecond
    assert [source for _, source in driver.attributes] == [1, 2, 3, 5]
    assert not driver.live  # graphs, their executables and events are gone


def test_the_floor_is_what_a_copy_would_take() -> None:
    kernel = kernel_times.KernelTime("k", 1, 1e-5, 4e6)
    assert kernel_times.StepKernels((kernel,), 4e12).floor(kernel) == pytest.approx(1e-6)


def test_an_older_driver_is_named() -> None:
    with pytest.raises(DeviceError, match=r"no cuFuncGetParamInfo: kernels are timed from CUDA 12\.4 on"):
        kernel_times._Calls(FakeDriver(without="cuFuncGetParamInfo"))  # type: ignore[arg-type]


def test_a_cpu_has_no_kernels_to_time(engine: Engine) -> None:
    with pytest.raises(DeviceError, match="CUDA devices only"):
        kernel_times.kernel_times(engine, 1, 8)


def test_parameters_of_a_node_lie_where_the_driver_puts_them() -> None:
    params = kernel_times._KernelParams
    assert (params.grid.offset, params.block.offset, params.shared_bytes.offset) == (8, 20, 32)
    assert (params.kernel_params.offset, params.kern.offset, ctypes.sizeof(params)) == (40, 56, 72)
