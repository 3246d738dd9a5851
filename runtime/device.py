# SPDX-License-Identifier: Apache-2.0
"""Where an artifact runs: allocation, copies, streams. One class per kind, the same methods."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gptq_compile.runtime import cuda, processor
from gptq_compile.runtime.errors import DeviceError
from gptq_compile.runtime.ffi import ffi, function

log = logging.getLogger(__name__)

_LARGE = 1 << 20  # bytes
_ALIGNMENT = 64  # bytes; generated code may assume it of every tensor


class CpuDevice:
    """The host processor; every call is finished when it returns."""

    kind = "cpu"
    depth = 1  # decode steps in flight
    prefill_tokens = 512  # of one call of `forward` at most
    handle: ctypes.c_void_p | None = None  # of the stream

    def __init__(self, arch: str = "") -> None:
        """Opens the device; ``arch`` names the code that was chosen where an artifact has several libraries."""
        self.arch = arch
        self.device = ffi().device("cpu", 0)
        self._allocate = function("runtime.TVMTensorAllocWithScope")
        self._view = function("runtime.TVMTensorCreateView")
        self._staged: dict[tuple[str, tuple[int, ...], str], Any] = {}

    def limit_prefill(self, tokens: int | None) -> None:
        """Makes calls of ``forward`` no longer than the artifact has room for; None is any length."""
        if tokens is not None:
            self.prefill_tokens = min(self.prefill_tokens, tokens)

    def description(self) -> str:
        """One line for logs."""
        return f"cpu ({self.arch or platform.machine()})"

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Allocates an uninitialized tensor."""
        module = ffi()
        return self._allocate(module.Shape([int(d) for d in shape]), module.dtype(dtype), self.device, None)

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """Allocates a tensor of zero bits. Memory is committed by the system only when it is first written."""
        module = ffi()
        size = math.prod(shape) * module.dtype(dtype).itemsize
        memory = _small_pages(size + _ALIGNMENT) if size >= _LARGE else np.zeros(size + _ALIGNMENT, "uint8")
        begin = -memory.ctypes.data % _ALIGNMENT
        tensor = module.from_dlpack(memory[begin : begin + size])
        return self._view(tensor, module.Shape([int(d) for d in shape]), module.dtype(dtype), 0)

    def tensor(self, array: np.ndarray, dtype: str | None = None) -> Any:
        """Copies an array; ``dtype`` renames its bits (bfloat16 comes as uint16)."""
        result = self.empty(array.shape, dtype or str(array.dtype))
        self.upload(result, array)
        return result

    def staged(self, name: str, array: np.ndarray) -> Any:
        """Copies an array into a buffer kept for this name, shape and dtype; valid until the next such call.

        Inputs of a call go through here, because freeing device memory waits for the whole device.
        """
        key = (name, array.shape, str(array.dtype))
        if key not in self._staged:
            self._staged[key] = self.empty(array.shape, str(array.dtype))
        self.upload(self._staged[key], array)
        return self._staged[key]

    def weight(self, array: np.ndarray, dtype: str) -> Any:
        """A tensor over the array's own memory where its alignment allows it, else a copy."""
        if array.nbytes == 0 or array.ctypes.data % _ALIGNMENT or dtype == "bool":
            return self.tensor(array, dtype)
        module = ffi()
        tensor = module.from_dlpack(array)
        if dtype != str(array.dtype):
            return self._view(tensor, module.Shape(list(array.shape)), module.dtype(dtype), 0)
        return tensor

    def upload(self, tensor: Any, array: np.ndarray) -> None:
        """Copies an array's bytes into a tensor of the same size."""
        array = _bytes_of(tensor, array)
        if array.nbytes:
            ctypes.memmove(tensor.data_ptr(), array.ctypes.data, array.nbytes)

    def download(self, tensor: Any, dtype: str | None = None) -> np.ndarray:
        """Copies a tensor to the host and waits for it."""
        result = np.empty(tuple(tensor.shape), dtype or str(tensor.dtype))
        if result.nbytes:
            ctypes.memmove(result.ctypes.data, tensor.data_ptr(), result.nbytes)
        return result

    def free_bytes(self) -> int | None:
        """Free device memory; None where it is not asked (the CPU)."""
        return None

    def synchronize(self) -> None:
        """Waits for everything enqueued."""

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Inside, the VM enqueues on this device's stream."""
        yield

    def ring(self, depth: int, width: int) -> CpuRing:
        """A ring of token rows."""
        return CpuRing(depth, width)

    def capture(self, run: Callable[[], Any]) -> cuda.Graph | None:
        """Records ``run`` as a graph; None where there are no graphs."""
        return None

    def vm_devices(self) -> list[int]:
        """(device type, index) pairs for ``vm_initialization``, the CPU last."""
        return [1, 0]


class CpuRing:
    """The pinned ring's interface over plain memory."""

    def __init__(self, depth: int, width: int) -> None:
        self._rows = np.zeros((depth, width), "int32")

    def push(self, row: int, device_pointer: int, count: int, reused: bool) -> None:
        """Copies ``count`` int32 into row ``row``."""
        ctypes.memmove(self._rows[row].ctypes.data, device_pointer, count * 4)

    def wait(self, row: int, count: int) -> np.ndarray:
        """Returns a copy of the row's first ``count`` values."""
        return self._rows[row, :count].copy()

    def close(self) -> None:
        """Nothing to free."""


class CudaDevice(CpuDevice):
    """One NVIDIA GPU with one non-blocking stream on which everything that computes happens in order."""

    kind = "cuda"
    depth = 3
    prefill_tokens = 1024
    arch = ""
    handle: ctypes.c_void_p

    def __init__(self, driver: cuda.Driver, index: int) -> None:
        self.driver, self.index = driver, index
        self._context = driver.primary_context(index)
        driver("cuCtxSetCurrent", self._context)
        self.handle = driver.stream()
        self.device = ffi().device("cuda", index)
        self._allocate = function("runtime.TVMTensorAllocWithScope")
        self._staged = {}

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        try:
            return super().empty(shape, dtype)
        except Exception as error:
            size = math.prod(shape) * ffi().dtype(dtype).itemsize
            free = (self.free_bytes() or 0) >> 20
            raise DeviceError(
                f"The GPU has no {size >> 20} MiB for {dtype} {list(shape)}: {free} MiB are free. Load the engine with "
                "a smaller cache_tokens."
            ) from error

    def description(self) -> str:
        major, minor = self.driver.compute_capability(self.index)
        return f"cuda:{self.index} ({self.driver.name(self.index)}, sm_{major}{minor})"

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        tensor = self.empty(shape, dtype)
        if nbytes(tensor):
            self.driver("cuMemsetD8Async", tensor.data_ptr(), 0, nbytes(tensor), self.handle)
        return tensor

    def weight(self, array: np.ndarray, dtype: str) -> Any:
        return self.tensor(array, dtype)

    def upload(self, tensor: Any, array: np.ndarray) -> None:
        # From pageable memory the call returns once the bytes are staged, so `array` may be reused at once.
        array = _bytes_of(tensor, array)
        if array.nbytes:
            self.driver("cuMemcpyHtoDAsync_v2", tensor.data_ptr(), array.ctypes.data, array.nbytes, self.handle)

    def download(self, tensor: Any, dtype: str | None = None) -> np.ndarray:
        result = np.empty(tuple(tensor.shape), dtype or str(tensor.dtype))
        if result.nbytes:
            self.driver("cuMemcpyDtoHAsync_v2", result.ctypes.data, tensor.data_ptr(), result.nbytes, self.handle)
        self.synchronize()
        return result

    def free_bytes(self) -> int | None:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def synchronize(self) -> None:
        self.driver("cuStreamSynchronize", self.handle)

    @contextmanager
    def stream(self) -> Iterator[None]:
        # The context is per thread, and the caller's thread may be a new one.
        self.driver("cuCtxSetCurrent", self._context)
        with ffi().use_raw_stream(self.device, self.handle.value or 0):
            yield

    def ring(self, depth: int, width: int) -> Any:
        return cuda.PinnedRing(self.driver, self.handle, depth, width)

    def capture(self, run: Callable[[], Any]) -> cuda.Graph | None:
        try:
            with cuda.capture(self.driver, self.handle) as graphs:
                keep = run()
        except Exception as error:
            log.warning("The decode step could not be captured as a CUDA graph and runs directly: %s", error)
            return None
        graphs[0].keep.append(keep)
        if graphs[0].nodes == 0:
            graphs[0].close()
            raise DeviceError("The TVM runtime does not launch on the stream it was given. Use apache-tvm 0.27.")
        return graphs[0]

    def vm_devices(self) -> list[int]:
        return [2, self.index, 1, 0]


def open_device(device: str | None, kind: str, archs: Sequence[str]) -> tuple[str, Callable[[], CpuDevice]]:
    """Checks that an artifact can run here, before anything of it is loaded.

    Args:
        device: ``None`` (what the artifact was compiled for), ``cpu``, ``cuda`` or ``cuda:1``; ``cpu:x86-64-v3`` runs
            the code for that processor where the artifact has several.
        kind: the artifact's target kind.
        archs: the architectures its machine code is for; on the CPU the last that runs here is taken.

    Returns:
        The kind and a function that opens the device once TVM's libraries are loaded.

    Raises:
        DeviceError: if the device is another kind, is missing, or cannot run the artifact's machine code.
    """
    wanted = device or kind
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?|(cpu):([\w.+-]+)", wanted)
    if not match:
        raise DeviceError(f"Unknown device {wanted!r}. Use cpu, cuda or cuda:1.")
    built = f"{kind} ({', '.join(archs)})"
    asked = match[1] or match[3]
    if asked != kind:
        raise DeviceError(
            f"This artifact was compiled for {built} and cannot run on {wanted}. Compile it with --target {asked}."
        )
    if kind == "cpu":
        arch = processor.choose(archs, match[4])
        return "cpu", lambda: CpuDevice(arch)
    try:
        driver = cuda.Driver()
    except DeviceError as error:
        raise DeviceError(
            f"This artifact was compiled for {built}, but {error}. Compile it with --target cpu to run here."
        ) from None
    index = int(match[2] or 0)
    if index >= driver.device_count:
        raise DeviceError(f"Device {wanted} does not exist: this machine has {driver.device_count} GPU(s).")
    capability = driver.compute_capability(index)
    if not cuda.runs_on(archs, capability):
        raise DeviceError(
            f"This artifact was compiled for {built}, but {driver.name(index)} is sm_{capability[0]}{capability[1]}. "
            f"Compile it with --target cuda:sm_{capability[0]}{capability[1]}."
        )
    return "cuda", lambda: CudaDevice(driver, index)


def _small_pages(size: int) -> np.ndarray:
    """Bytes of zero that take memory 4 KiB at a time, as they are written.

    numpy asks for pages of 2 MiB, of which a cache of many layers would have one in each before it holds anything.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, "uint8")


def nbytes(tensor: Any) -> int:
    """Size of a tensor's data in bytes."""
    return int(tensor.numel()) * int(tensor.dtype.itemsize)


def _bytes_of(tensor: Any, array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.nbytes != nbytes(tensor):
        raise ValueError(f"cannot copy {array.nbytes} bytes into a tensor of {nbytes(tensor)}")
    return array
