# SPDX-License-Identifier: Apache-2.0
"""The few functions of the CUDA driver API that the runtime needs, through ctypes; every result is checked.

Stream capture and graphs are driver calls around the VM's launches (CUDA Driver API, sections "Stream Management" and
"Graph Management"). The driver library is the machine's ``libcuda.so.1``, never a stub.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gptq_compile.runtime.errors import DeviceError

_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
# Relaxed: a pool that grows or a module that is loaded lazily during capture is not an error of ours.
_CAPTURE_MODE_RELAXED = 2
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_ERROR_NO_DEVICE = 100

_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGetCount": [ctypes.POINTER(ctypes.c_int)],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDeviceGetName": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
    "cuDeviceGetAttribute": [ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int],
    "cuCtxSetCurrent": [ctypes.c_void_p],
    "cuMemGetInfo_v2": [ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)],
    "cuMemAllocHost_v2": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t],
    "cuMemFreeHost": [ctypes.c_void_p],
    "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p],
    "cuMemcpyDtoHAsync_v2": [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p],
    "cuMemsetD8Async": [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p],
    "cuStreamCreate": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint],
    "cuStreamDestroy_v2": [ctypes.c_void_p],
    "cuStreamSynchronize": [ctypes.c_void_p],
    "cuStreamWaitEvent": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint],
    "cuEventCreate": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint],
    "cuEventRecord": [ctypes.c_void_p, ctypes.c_void_p],
    "cuEventSynchronize": [ctypes.c_void_p],
    "cuEventDestroy_v2": [ctypes.c_void_p],
    "cuStreamBeginCapture_v2": [ctypes.c_void_p, ctypes.c_int],
    "cuStreamEndCapture": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)],
    "cuGraphInstantiateWithFlags": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint64],
    "cuGraphGetNodes": [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)],
    "cuGraphLaunch": [ctypes.c_void_p, ctypes.c_void_p],
    "cuGraphDestroy": [ctypes.c_void_p],
    "cuGraphExecDestroy": [ctypes.c_void_p],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
}


class Driver:
    """``libcuda.so.1`` with checked calls: ``driver("cuGraphLaunch", exec, stream)``."""

    def __init__(self) -> None:
        """Loads and initializes the driver.

        Raises:
            DeviceError: if there is no driver or no GPU.
        """
        try:
            library = self._library = ctypes.CDLL("libcuda.so.1")
            self._functions = {}
            for name, arguments in _SIGNATURES.items():
                self._functions[name] = getattr(library, name)
                self._functions[name].argtypes = arguments
                self._functions[name].restype = ctypes.c_int
        except (OSError, AttributeError):
            # AttributeError: a compile-time stub of the library is loaded in this process.
            raise DeviceError("this machine has no NVIDIA driver (libcuda.so.1)") from None
        status = self._functions["cuInit"](0)
        count = ctypes.c_int()
        if status == 0:
            self("cuDeviceGetCount", ctypes.byref(count))
        if status == _ERROR_NO_DEVICE or (status == 0 and count.value == 0):
            raise DeviceError("this machine's NVIDIA driver finds no GPU")
        if status:
            raise DeviceError(f"the NVIDIA driver did not start ({self._describe(status)})")
        self.device_count = count.value

    def __call__(self, name: str, *arguments: Any) -> None:
        self.check(name, self._functions[name](*arguments))

    def function(self, name: str, arguments: Sequence[Any]) -> Any:
        """A function of the driver with these argument types, or None if the driver does not have it."""
        function = getattr(self._library, name, None)
        if function is None or name in self._functions:
            return self._functions.get(name)
        function.argtypes, function.restype = list(arguments), ctypes.c_int
        return function

    def check(self, name: str, status: int) -> None:
        """Raises DeviceError unless ``status`` is CUDA_SUCCESS."""
        if status:
            raise DeviceError(f"The CUDA driver call {name} failed: {self._describe(status)}.")

    def _describe(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._functions["cuGetErrorString"](status, ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode()}, CUresult {status}"

    def compute_capability(self, index: int) -> tuple[int, int]:
        """(major, minor) of device ``index``."""
        values = []
        for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
            value = ctypes.c_int()
            self("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._ordinal(index))
            values.append(value.value)
        return values[0], values[1]

    def name(self, index: int) -> str:
        """The device's marketing name."""
        buffer = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", buffer, 256, self._ordinal(index))
        return buffer.value.decode(errors="replace")

    def primary_context(self, index: int) -> ctypes.c_void_p:
        """Retains the device's primary context, which the CUDA runtime API (and so TVM) uses too."""
        context = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._ordinal(index))
        return context

    def stream(self) -> ctypes.c_void_p:
        """Creates a stream that does not wait for the legacy default stream."""
        stream = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        return stream

    def _ordinal(self, index: int) -> int:
        device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(device), index)
        return device.value


class Graph:
    """An instantiated CUDA graph and whatever must stay alive while it can be launched."""

    def __init__(self, driver: Driver, graph: ctypes.c_void_p, keep: Sequence[Any] = ()) -> None:
        self._driver = driver
        self.keep = list(keep)
        self._exec = ctypes.c_void_p()
        count = ctypes.c_size_t()
        try:
            driver("cuGraphGetNodes", graph, None, ctypes.byref(count))
            self.nodes = count.value
            driver("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, 0)
        finally:
            driver("cuGraphDestroy", graph)

    def launch(self, stream: ctypes.c_void_p | None) -> None:
        """Enqueues one replay."""
        self._driver("cuGraphLaunch", self._exec, stream)

    def close(self) -> None:
        """Destroys the graph; the stream must have finished its replays."""
        if self._exec:
            self._driver("cuGraphExecDestroy", self._exec)
            self._exec = ctypes.c_void_p()


@contextmanager
def capture(driver: Driver, stream: ctypes.c_void_p) -> Iterator[list[Graph]]:
    """Captures what is enqueued on ``stream`` inside the block; the list then holds the one graph.

    Raises:
        DeviceError: if the capture is invalidated (something in the block synchronized, for example).
    """
    result: list[Graph] = []
    graph = ctypes.c_void_p()
    driver("cuStreamBeginCapture_v2", stream, _CAPTURE_MODE_RELAXED)
    try:
        yield result
    except BaseException:
        # The stream must leave capture mode whatever happened; the first error is the one that counts.
        try:
            driver("cuStreamEndCapture", stream, ctypes.byref(graph))
            if graph:
                driver("cuGraphDestroy", graph)
        except DeviceError:
            pass
        raise
    driver("cuStreamEndCapture", stream, ctypes.byref(graph))
    result.append(Graph(driver, graph))


class PinnedRing:
    """Page-locked int32 rows ``[depth, width]`` with two events per row, for reading tokens back without stalls.

    Copies have a stream of their own. In the one that computes, a copy of four bytes keeps the next step from starting
    for 18 us (H200), as long as three kernels of a layer take.
    """

    def __init__(self, driver: Driver, stream: ctypes.c_void_p, depth: int, width: int) -> None:
        self._driver, self._stream, self._copies = driver, stream, driver.stream()
        self._pointer = ctypes.c_void_p()
        driver("cuMemAllocHost_v2", ctypes.byref(self._pointer), depth * width * 4)
        assert self._pointer.value is not None
        memory = (ctypes.c_int32 * (depth * width)).from_address(self._pointer.value)
        self._rows = np.ctypeslib.as_array(memory).reshape(depth, width)
        self._computed, self._copied = ([self._event() for _ in range(depth)] for _ in range(2))

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._driver("cuEventCreate", ctypes.byref(event), _EVENT_DISABLE_TIMING)
        return event

    def push(self, row: int, device_pointer: int, count: int, reused: bool) -> None:
        """Enqueues the copy of ``count`` int32 from the device into row ``row``.

        Args:
            row: which.
            device_pointer: where what has been enqueued so far leaves them.
            count: how many.
            reused: what is enqueued next may overwrite them, and has to wait for the copy.
        """
        assert self._pointer.value is not None
        target = ctypes.c_void_p(self._pointer.value + row * self._rows.shape[1] * 4)
        self._driver("cuEventRecord", self._computed[row], self._stream)
        self._driver("cuStreamWaitEvent", self._copies, self._computed[row], 0)
        self._driver("cuMemcpyDtoHAsync_v2", target, device_pointer, count * 4, self._copies)
        self._driver("cuEventRecord", self._copied[row], self._copies)
        if reused:
            self._driver("cuStreamWaitEvent", self._stream, self._copied[row], 0)

    def wait(self, row: int, count: int) -> np.ndarray:
        """Waits for row ``row`` and returns a copy of its first ``count`` values."""
        self._driver("cuEventSynchronize", self._copied[row])
        return self._rows[row, :count].copy()

    def close(self) -> None:
        """Frees the pinned memory, the events and the stream of copies."""
        if self._copies:
            self._driver("cuStreamSynchronize", self._copies)
            self._driver("cuStreamDestroy_v2", self._copies)
            self._copies = ctypes.c_void_p()
        for event in (*self._computed, *self._copied):
            self._driver("cuEventDestroy_v2", event)
        self._computed, self._copied = [], []
        if self._pointer:
            self._driver("cuMemFreeHost", self._pointer)
            self._pointer = ctypes.c_void_p()


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether machine code for any of ``archs`` runs on a GPU of this compute capability.

    Code for sm_XY runs on the same major version X with minor >= Y; sm_XYa only on exactly X.Y; compute_XY (PTX) on
    everything from X.Y on (CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility").
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if not match:
            continue
        code = (int(match[2]), int(match[3]))
        if match[4] == "a":
            fits = code == capability
        elif match[1] == "sm":
            fits = code[0] == capability[0] and code[1] <= capability[1]
        else:
            fits = code <= capability
        if fits:
            return True
    return False
