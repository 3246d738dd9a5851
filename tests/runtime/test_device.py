# SPDX-License-Identifier: Apache-2.0
"""Devices: refusals before anything runs, and the CUDA driver calls against a fake driver over host memory.

The fake implements every driver function the runtime uses as a C callback, checks its arguments and records the
calls. It proves signatures, order and error handling; what a GPU computes is for a machine that has one.
"""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gptq_compile.runtime import cuda
from gptq_compile.runtime import engine as engine_module
from gptq_compile.runtime.device import CpuDevice, CudaDevice, open_device
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import DeviceError, RuntimeFailure
from gptq_compile.runtime.ffi import ffi

STREAM, GRAPH, CONTEXT, EXEC = 0x51, 0x52, 0x54, 0x1000


class FakeLibrary:
    """``libcuda.so.1`` with one or two GPUs; device memory is host memory."""

    def __init__(self, capability: tuple[int, int] = (9, 0), count: int = 1, init: int = 0) -> None:
        self.capability, self.count, self.init = capability, count, init
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        self.memory: dict[int, Any] = {}
        self.events = 0
        self.nodes = 3
        self.capturing = False
        self.streams, self.graphs = 0, 0
        self.on_launch: dict[int, Callable[[], None]] = {}  # by executable graph
        for name, arguments in cuda._SIGNATURES.items():
            # Pointers arrive as integers; the real argument types are set on top by the code under test.
            plain = [a if a in (ctypes.c_int, ctypes.c_uint, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_uint64)
                     else ctypes.c_void_p for a in arguments]  # fmt: skip
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *plain)(self._wrap(name)))

    def _wrap(self, name: str) -> Callable[..., int]:
        body = getattr(self, f"_{name}", None)

        def call(*args: Any) -> int:
            self.calls.append(name)
            if name in self.fail:
                return self.fail[name]
            return (body(*args) if body else 0) or 0

        return call

    @staticmethod
    def _set(pointer: int, value: int, kind: Any = ctypes.c_void_p) -> None:
        kind.from_address(pointer).value = value

    def _cuInit(self, flags: int) -> int:
        return self.init

    def _cuDeviceGetCount(self, out: int) -> None:
        self._set(out, self.count, ctypes.c_int)

    def _cuDeviceGet(self, out: int, index: int) -> None:
        assert 0 <= index < self.count
        self._set(out, index, ctypes.c_int)

    def _cuDeviceGetName(self, out: int, size: int, index: int) -> None:
        ctypes.memmove(out, b"Fake GPU\0", 9)

    def _cuDeviceGetAttribute(self, out: int, attribute: int, index: int) -> None:
        self._set(out, {75: self.capability[0], 76: self.capability[1]}[attribute], ctypes.c_int)

    def _cuDevicePrimaryCtxRetain(self, out: int, index: int) -> None:
        self._set(out, CONTEXT)

    def _cuCtxSetCurrent(self, context: int) -> None:
        assert context == CONTEXT

    def _cuMemGetInfo_v2(self, free: int, total: int) -> None:
        self._set(free, 1 << 20, ctypes.c_size_t)

    def _cuMemAllocHost_v2(self, out: int, size: int) -> None:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        self._set(out, ctypes.addressof(buffer))

    def _cuMemFreeHost(self, pointer: int) -> None:
        del self.memory[pointer]

    def _cuMemcpyHtoDAsync_v2(self, to: int, source: int, size: int, stream: int) -> None:
        assert stream == STREAM and not self.capturing
        ctypes.memmove(to, source, size)

    def _cuMemcpyDtoHAsync_v2(self, to: int, source: int, size: int, stream: int) -> None:
        assert stream >= STREAM and not self.capturing
        ctypes.memmove(to, source, size)

    def _cuMemsetD8Async(self, to: int, value: int, size: int, stream: int) -> None:
        assert stream == STREAM
        ctypes.memset(to, value, size)

    def _cuStreamCreate(self, out: int, flags: int) -> None:
        assert flags == 1
        self._set(out, STREAM + 0x10 * self.streams)  # the first computes
        self.streams += 1

    def _cuStreamDestroy_v2(self, stream: int) -> None:
        assert stream > STREAM
        self.streams -= 1

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert stream >= STREAM and not self.capturing

    def _cuEventCreate(self, out: int, flags: int) -> None:
        self.events += 1
        self._set(out, 0x1000 + self.events)

    def _cuEventDestroy_v2(self, event: int) -> None:
        self.events -= 1

    def _cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        assert stream == STREAM and mode == 2 and not self.capturing
        self.capturing = True

    def _cuStreamEndCapture(self, stream: int, out: int) -> int:
        assert stream == STREAM and self.capturing
        self.capturing = False
        self._set(out, GRAPH)
        return 0

    def _cuGraphGetNodes(self, graph: int, nodes: int | None, out: int) -> None:
        assert graph == GRAPH and nodes is None
        self._set(out, self.nodes, ctypes.c_size_t)

    def _cuGraphInstantiateWithFlags(self, out: int, graph: int, flags: int) -> None:
        assert graph == GRAPH
        self._set(out, EXEC + self.graphs)
        self.graphs += 1

    def _cuGraphLaunch(self, executable: int, stream: int) -> None:
        assert stream == STREAM
        self.on_launch[executable]()

    def _cuGraphExecDestroy(self, executable: int) -> None:
        assert EXEC <= executable < EXEC + self.graphs

    def _cuGetErrorString(self, status: int, out: int) -> None:
        self.text = ctypes.c_char_p(b"a fake failure")
        self._set(out, ctypes.cast(self.text, ctypes.c_void_p).value or 0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeLibrary]:
    """Installs a fake driver."""

    def install(**options: Any) -> FakeLibrary:
        library = FakeLibrary(**options)
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: library)
        return library

    return install


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["sm_80", "sm_89", "sm_90"], (9, 0), True), (["sm_80"], (8, 0), True), (["sm_80"], (8, 9), True),
        (["sm_89"], (8, 0), False), (["sm_80", "sm_89"], (9, 0), False), (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False), (["sm_90"], (10, 0), False), (["sm_90", "compute_90"], (12, 0), True),
        (["compute_90"], (8, 9), False), (["sm_100"], (10, 3), True), (["sm_120"], (10, 0), False),
        ([], (9, 0), False), (["gfx942"], (9, 4), False),
    ],
)  # fmt: skip
def test_which_gpus_run_which_code(archs: list[str], capability: tuple[int, int], expected: bool) -> None:
    assert cuda.runs_on(archs, capability) is expected


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    with pytest.raises(
        DeviceError, match=r"compiled for cuda \(sm_90\), but this machine has no NVIDIA driver.*--target cpu"
    ):
        open_device(None, "cuda", ["sm_90"])


def test_a_stub_driver_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: object())
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        open_device(None, "cuda", ["sm_90"])


def test_no_gpu(fake: Callable[..., FakeLibrary]) -> None:
    fake(init=100)
    with pytest.raises(DeviceError, match="finds no GPU"):
        open_device("cuda", "cuda", ["sm_90"])
    fake(count=0)
    with pytest.raises(DeviceError, match="finds no GPU"):
        open_device("cuda", "cuda", ["sm_90"])
    fake(init=999)
    with pytest.raises(DeviceError, match=r"did not start \(a fake failure, CUresult 999"):
        open_device("cuda", "cuda", ["sm_90"])


def test_another_architecture(fake: Callable[..., FakeLibrary]) -> None:
    fake(capability=(7, 5))
    with pytest.raises(DeviceError, match=r"compiled for cuda \(sm_80, sm_90\), but Fake GPU is sm_75"):
        open_device(None, "cuda", ["sm_80", "sm_90"])


def test_another_gpu(fake: Callable[..., FakeLibrary]) -> None:
    fake(count=2)
    assert open_device("cuda:1", "cuda", ["sm_90"])[0] == "cuda"
    with pytest.raises(DeviceError, match=r"cuda:2 does not exist: this machine has 2 GPU"):
        open_device("cuda:2", "cuda", ["sm_90"])
    with pytest.raises(DeviceError, match=r"cannot run on cpu.*--target cpu"):
        open_device("cpu", "cuda", ["sm_90"])


def test_a_cuda_artifact_is_refused_before_its_libraries_load(
    copy: pathlib.Path, toy: ModuleType, fake: Callable[..., FakeLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = toy.manifest()
    data["target"] = {"kind": "cuda", "archs": ["sm_80"]}
    toy.write_manifest(copy, data)
    loaded: list[Any] = []
    monkeypatch.setattr(engine_module, "load_runtime", lambda *args: loaded.append(args))
    fake(capability=(9, 0))
    with pytest.raises(DeviceError, match="Fake GPU is sm_90"):
        Engine.load(copy)
    fake(capability=(8, 6))
    with pytest.raises(RuntimeFailure, match=r"libtvm_runtime_cuda\.so is not in the list"):
        Engine.load(copy)
    assert loaded == []


def test_failing_driver_calls_are_named(fake: Callable[..., FakeLibrary]) -> None:
    library = fake()
    driver = cuda.Driver()
    library.fail["cuStreamSynchronize"] = 700
    with pytest.raises(DeviceError, match="cuStreamSynchronize failed: a fake failure, CUresult 700"):
        driver("cuStreamSynchronize", None)


def test_a_failing_capture_ends_capture_mode_and_keeps_the_first_error(fake: Callable[..., FakeLibrary]) -> None:
    library = fake()
    driver = cuda.Driver()
    stream = driver.stream()
    with pytest.raises(ValueError, match="first"), cuda.capture(driver, stream):
        raise ValueError("first")
    assert not library.capturing and library.calls[-1] == "cuGraphDestroy"


class FakeCudaDevice(CudaDevice):
    """The CUDA device class over the fake driver and host memory; a capture also runs, as nothing can record it."""

    def __init__(self, driver: cuda.Driver, library: FakeLibrary) -> None:
        super().__init__(driver, 0)
        self.library = library
        self.device = ffi().device("cpu", 0)

    def vm_devices(self) -> list[int]:
        return [1, 0]

    def capture(self, run: Callable[[], Any]) -> cuda.Graph | None:
        graph = super().capture(run)
        if graph is not None:
            replays: list[None] = []

            def replay() -> None:
                if replays:  # the first replay's work was done while "capturing"
                    tokens, fixed = run()[1], graph.keep[0][1]
                    ctypes.memmove(fixed.data_ptr(), tokens.data_ptr(), 4 * tokens.numel())
                replays.append(None)

            self.library.on_launch[EXEC + self.library.graphs - 1] = replay
        return graph


def fake_engine(artifact: pathlib.Path, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> Engine:
    def opened(*_: Any) -> Any:
        return "cpu", lambda: FakeCudaDevice(cuda.Driver(), library)

    monkeypatch.setattr(engine_module, "open_device", opened)
    return Engine.load(artifact, cache_tokens=400)


@pytest.mark.parametrize("capturable", [True, False])
def test_the_cuda_device_generates_what_the_cpu_does(
    engine: Engine,
    artifact: pathlib.Path,
    fake: Callable[..., FakeLibrary],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capturable: bool,
) -> None:
    library = fake()
    if not capturable:
        library.fail["cuStreamBeginCapture_v2"] = 900
    other = fake_engine(artifact, library, monkeypatch)
    prompt = "a prompt over more than one page"
    assert other.generate(prompt, 40, eos_token_id=[]) == engine.generate(prompt, 40, eos_token_id=[])
    np.testing.assert_array_equal(other.logits([1, 2, 3]), engine.logits([1, 2, 3]))
    assert ("cuGraphLaunch" in library.calls) == capturable
    assert ("could not be captured" in caplog.text) == (not capturable)
    assert len([r for r in caplog.records if "captured" in r.message]) == (0 if capturable else 1)
    other.close()
    assert library.events == 0 and library.streams == 1 and not library.memory
    assert library.calls.count("cuGraphExecDestroy") == (CudaDevice.depth if capturable else 0)


def test_an_empty_graph_is_an_error(
    artifact: pathlib.Path, fake: Callable[..., FakeLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = fake()
    library.nodes = 0
    engine = fake_engine(artifact, library, monkeypatch)
    with pytest.raises(DeviceError, match="does not launch on the stream"):
        engine.generate("x", 9, eos_token_id=[])


def test_out_of_memory_says_what_was_asked(fake: Callable[..., FakeLibrary], monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake()
    gpu = FakeCudaDevice(cuda.Driver(), library)

    def full(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "_allocate", full)
    with pytest.raises(DeviceError, match=r"no 4 MiB for float32 \[1024, 1024\]: 1 MiB are free"):
        gpu.empty([1024, 1024], "float32")


def test_cpu_weights_share_memory_when_aligned() -> None:
    cpu = CpuDevice()
    memory = np.zeros(64 + 64 * 4, "uint8")
    begin = -memory.ctypes.data % 64
    aligned = memory[begin : begin + 128].view("uint16").reshape(8, 8)
    aligned[:] = 0x3F80
    shared = cpu.weight(aligned, "bfloat16")
    assert shared.data_ptr() == aligned.ctypes.data and str(shared.dtype) == "bfloat16" and shared.shape == (8, 8)
    copied = cpu.weight(memory[begin + 2 : begin + 130].view("uint16"), "uint16")
    assert copied.data_ptr() % 64 == 0 and copied.data_ptr() != memory.ctypes.data + begin + 2
    with pytest.raises(ValueError, match="cannot copy 4 bytes"):
        cpu.upload(shared, np.zeros(1, "float32"))


def test_cpu_zeros_are_aligned_zeros() -> None:
    cpu = CpuDevice()
    tensor = cpu.zeros([3, 5], "float32")
    assert tensor.data_ptr() % 64 == 0
    np.testing.assert_array_equal(cpu.download(tensor), np.zeros((3, 5), "float32"))
    assert cpu.zeros([0, 2], "int32").shape == (0, 2)
