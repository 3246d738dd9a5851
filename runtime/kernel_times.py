# SPDX-License-Identifier: Apache-2.0
"""Time of every kernel of a decode step on a CUDA device, beside the time that reading its weights takes.

A step is captured as a graph; the nodes of each kernel become a graph of their own, one after another, and that is
replayed between two events. Nodes keep their arguments, so every layer's weights are read in turn and the caches do
not hold them. Which tensors a kernel reads is seen from the pointers among its arguments. CUDA 12.4 or newer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptq_compile.runtime.cuda import Driver
from gptq_compile.runtime.decode import WARM_UP_STEPS, DecodeBatch
from gptq_compile.runtime.device import CudaDevice, nbytes
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import DeviceError

_RELAXED, _KERNEL_NODE, _POINTER = 2, 0, 8
_REPLAYS = 20
_COPY_BYTES = 1 << 29


class _KernelParams(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2`` (CUDA driver API, cuda.h)."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("kernel_params", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("ctx", ctypes.c_void_p),
    )


_P = ctypes.POINTER
SIGNATURES: dict[str, list[Any]] = {
    "cuStreamBeginCapture_v2": [ctypes.c_void_p, ctypes.c_int],
    "cuStreamEndCapture": [ctypes.c_void_p, _P(ctypes.c_void_p)],
    "cuGraphGetNodes": [ctypes.c_void_p, _P(ctypes.c_void_p), _P(ctypes.c_size_t)],
    "cuGraphNodeGetType": [ctypes.c_void_p, _P(ctypes.c_int)],
    "cuGraphKernelNodeGetParams_v2": [ctypes.c_void_p, _P(_KernelParams)],
    "cuFuncGetName": [_P(ctypes.c_char_p), ctypes.c_void_p],
    "cuFuncGetParamInfo": [ctypes.c_void_p, ctypes.c_size_t, _P(ctypes.c_size_t), _P(ctypes.c_size_t)],
    "cuGraphCreate": [_P(ctypes.c_void_p), ctypes.c_uint],
    "cuGraphAddKernelNode_v2": [
        _P(ctypes.c_void_p), ctypes.c_void_p, _P(ctypes.c_void_p), ctypes.c_size_t, _P(_KernelParams),
    ],
    "cuGraphKernelNodeCopyAttributes": [ctypes.c_void_p, ctypes.c_void_p],
    "cuGraphInstantiateWithFlags": [_P(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint64],
    "cuGraphLaunch": [ctypes.c_void_p, ctypes.c_void_p],
    "cuGraphDestroy": [ctypes.c_void_p],
    "cuGraphExecDestroy": [ctypes.c_void_p],
    "cuEventCreate": [_P(ctypes.c_void_p), ctypes.c_uint],
    "cuEventRecord": [ctypes.c_void_p, ctypes.c_void_p],
    "cuEventSynchronize": [ctypes.c_void_p],
    "cuEventElapsedTime": [_P(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p],
    "cuEventDestroy_v2": [ctypes.c_void_p],
    "cuMemcpyDtoDAsync_v2": [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p],
}  # fmt: skip


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a step.

    Attributes:
        name: as it is in the machine code. ``count``: launches a step.
        seconds: of one launch, in a graph of such launches. ``weight_bytes``: of the weights that one launch reads.
    """

    name: str
    count: int
    seconds: float
    weight_bytes: float


@dataclass(frozen=True)
class StepKernels:
    """All kernels of a step, most time first, and the bytes that a copy on the device reads and writes a second."""

    kernels: tuple[KernelTime, ...]
    bytes_per_second: float

    def floor(self, kernel: KernelTime) -> float:
        """Seconds in which a copy would move as many bytes as the kernel reads of weights."""
        return kernel.weight_bytes / self.bytes_per_second


def kernel_times(engine: Engine, batch: int, context: int) -> StepKernels:
    """Times the kernels of the step for ``batch`` sequences (a size that has a step of its own) of ``context`` tokens.

    Raises:
        DeviceError: on a CPU, or if the driver is older than CUDA 12.4.
    """
    device = engine._device
    if not isinstance(device, CudaDevice):
        raise DeviceError("Kernels are timed on CUDA devices only.")
    calls = _Calls(device.driver)
    state = DecodeBatch(device, engine._model, engine.cache, batch, engine.manifest.vocab_size)
    rows = [engine.cache.allocate(context) for _ in range(batch)]
    try:
        with engine.scheduler.lock, device.stream():
            table = np.stack(rows)
            positions = np.full(batch, context - 1, "int32")
            device.upload(state._positions, positions)
            device.upload(state._page_table, table)
            device.upload(state._slots, engine.cache.slots_of(table, positions))
            for _ in range(WARM_UP_STEPS):
                state._decode()
            sizes = {int(t.data_ptr()): nbytes(t) for t in engine._model.weights}
            return StepKernels(_times(calls, device, state._decode, sizes), _copy_rate(calls, device))
    finally:
        for row in rows:
            engine.cache.release(row)
        state.close()


class _Calls:
    """The driver functions above, which are not all in every driver that can run an artifact."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._functions = driver, {}
        for name, arguments in SIGNATURES.items():
            function = driver.function(name, arguments)
            if function is None:
                raise DeviceError(f"This NVIDIA driver has no {name}: kernels are timed from CUDA 12.4 on.")
            self._functions[name] = function

    def __call__(self, name: str, *arguments: Any) -> None:
        self._driver.check(name, self._functions[name](*arguments))

    def handle(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Calls a function whose first argument is where a handle goes."""
        made = ctypes.c_void_p()
        self(name, ctypes.byref(made), *arguments)
        return made

    def parameters(self, func: int) -> list[int]:
        """Sizes of a kernel's parameters."""
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        while not self._functions["cuFuncGetParamInfo"](func, len(sizes), ctypes.byref(offset), ctypes.byref(size)):
            sizes.append(size.value)
        return sizes


def _times(calls: _Calls, device: CudaDevice, run: Callable[[], Any], sizes: dict[int, int]) -> tuple[KernelTime, ...]:
    calls("cuStreamBeginCapture_v2", device.handle, _RELAXED)
    graph = ctypes.c_void_p()
    try:
        outputs = run()  # kept, as the nodes write there
    finally:
        calls("cuStreamEndCapture", device.handle, ctypes.byref(graph))
    try:
        kinds: dict[str, list[tuple[ctypes.c_void_p, _KernelParams]]] = {}
        for node in _nodes(calls, graph):
            params = _KernelParams()
            calls("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(params))
            name = ctypes.c_char_p()
            calls("cuFuncGetName", ctypes.byref(name), params.func)
            kinds.setdefault((name.value or b"?").decode(), []).append((node, params))
        found = []
        for kind, nodes in kinds.items():
            read = [_weights_read(calls, params, sizes, kind) for _, params in nodes]
            seconds = _replay(calls, device, nodes) / len(nodes)
            found.append(KernelTime(kind, len(nodes), seconds, sum(read) / len(read)))
        del outputs
        return tuple(sorted(found, key=lambda k: -k.count * k.seconds))
    finally:
        calls("cuGraphDestroy", graph)


def _nodes(calls: _Calls, graph: ctypes.c_void_p) -> list[ctypes.c_void_p]:
    """The kernel nodes of a graph."""
    count = ctypes.c_size_t()
    calls("cuGraphGetNodes", graph, None, ctypes.byref(count))
    handles = (ctypes.c_void_p * count.value)()
    calls("cuGraphGetNodes", graph, handles, ctypes.byref(count))
    found = []
    for handle in handles:
        kind = ctypes.c_int()
        calls("cuGraphNodeGetType", handle, ctypes.byref(kind))
        if kind.value == _KERNEL_NODE:
            found.append(ctypes.c_void_p(handle))
    return found


def _weights_read(calls: _Calls, params: _KernelParams, sizes: dict[int, int], name: str) -> int:
    """Bytes of the weights among a node's arguments; of a table that is gathered from, nothing worth counting."""
    if "take" in name:
        return 0
    total = 0
    for i, size in enumerate(calls.parameters(params.func)):
        if size == _POINTER:
            pointer = ctypes.cast(params.kernel_params[i], _P(ctypes.c_uint64)).contents.value
            total += sizes.get(pointer, 0)
    return total


def _replay(calls: _Calls, device: CudaDevice, nodes: list[tuple[ctypes.c_void_p, _KernelParams]]) -> float:
    """Seconds of one replay of a graph of nothing but these nodes, one after another."""
    graph = calls.handle("cuGraphCreate", 0)
    try:
        before: ctypes.c_void_p | None = None
        for node, params in nodes:
            after = None if before is None else ctypes.byref(before)
            new = calls.handle("cuGraphAddKernelNode_v2", graph, after, int(before is not None), ctypes.byref(params))
            calls("cuGraphKernelNodeCopyAttributes", new, node)
            before = new
        executable = calls.handle("cuGraphInstantiateWithFlags", graph, 0)
    finally:
        calls("cuGraphDestroy", graph)
    try:
        return _elapsed(calls, device, lambda: calls("cuGraphLaunch", executable, device.handle))
    finally:
        calls("cuGraphExecDestroy", executable)


def _copy_rate(calls: _Calls, device: CudaDevice) -> float:
    a, b = (device.empty([_COPY_BYTES], "uint8") for _ in range(2))
    copy = lambda: calls("cuMemcpyDtoDAsync_v2", b.data_ptr(), a.data_ptr(), _COPY_BYTES, device.handle)  # noqa: E731
    return 2 * _COPY_BYTES / _elapsed(calls, device, copy)


def _elapsed(calls: _Calls, device: CudaDevice, launch: Callable[[], None]) -> float:
    """Seconds a launch takes on the device, the mean of several after one to warm up."""
    start, end = (calls.handle("cuEventCreate", 0) for _ in range(2))
    try:
        launch()
        calls("cuEventRecord", start, device.handle)
        for _ in range(_REPLAYS):
            launch()
        calls("cuEventRecord", end, device.handle)
        calls("cuEventSynchronize", end)
        milliseconds = ctypes.c_float()
        calls("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return milliseconds.value / 1e3 / _REPLAYS
    finally:
        for event in (start, end):
            calls("cuEventDestroy_v2", event)
