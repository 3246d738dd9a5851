# SPDX-License-Identifier: Apache-2.0
"""The binding to tvm-ffi's C ABI, beside tvm_ffi itself in the same process: they see each other's functions."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest
import tvm_ffi

from gptq_compile.runtime import abi

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def _opened() -> None:
    assert abi.open_library(pathlib.Path(tvm_ffi.libinfo.find_libtvm_ffi()))


def test_a_tensor_shares_the_arrays_memory_and_keeps_it() -> None:
    array = np.arange(24, dtype="int32").reshape(2, 3, 4)
    tensor = abi.from_dlpack(array)
    assert tensor.shape == (2, 3, 4) and tensor.numel() == 24
    assert str(tensor.dtype) == "int32" and tensor.dtype.itemsize == 4
    assert tensor.data_ptr() == array.ctypes.data
    owner = weakref.ref(array)
    del array
    gc.collect()
    assert owner() is not None
    del tensor
    gc.collect()
    assert owner() is None


@pytest.mark.parametrize("name", ["float32", "float16", "int64", "int32", "uint32", "int8", "uint8", "bool"])
def test_types_of_tensors(name: str) -> None:
    tensor = abi.from_dlpack(np.zeros((3,), name))
    assert str(tensor.dtype) == name and tensor.dtype.itemsize == np.dtype(name).itemsize
    assert abi.dtype("bfloat16").itemsize == 2


def test_arrays_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        abi.from_dlpack(np.zeros((4, 4))[:, ::2])


def test_arguments_arrive_as_they_are() -> None:
    seen: list[object] = []

    def listen(*arguments: object) -> int:
        seen.extend(arguments)
        return len(arguments)

    tvm_ffi.register_global_func("gptq_compile.test_abi.listen", listen, override=True)
    function = abi.get_global_func("gptq_compile.test_abi.listen")
    array = np.arange(6, dtype="float32")
    count = function(
        7, -(1 << 62), True, None, "téxt", abi.dtype("float16"), abi.device("cpu", 3), abi.from_dlpack(array)
    )
    assert count == 8
    assert seen[:4] == [7, -(1 << 62), True, None] and seen[4] == "téxt"
    assert seen[5] == tvm_ffi.dtype("float16") and seen[6] == tvm_ffi.device("cpu", 3)
    np.testing.assert_array_equal(np.from_dlpack(seen[7]), array)
    with pytest.raises(TypeError, match="float"):
        function(1.5)


def test_arrays_give_their_elements() -> None:
    tensors = [abi.from_dlpack(np.full(i + 1, i, "int8")) for i in range(3)]
    array = abi.convert(tensors)
    assert len(array) == 3 and [t.shape for t in array] == [(1,), (2,), (3,)]
    assert [t.data_ptr() for t in array] == [t.data_ptr() for t in tensors]
    with pytest.raises(IndexError):
        array[3]
    assert len(abi.convert([])) == 0


def test_results_and_errors() -> None:
    def answer(what: str) -> object:
        if what == "raise":
            raise ValueError("no such\nthing")
        return {"none": None, "true": True, "number": -3}[what]

    tvm_ffi.register_global_func("gptq_compile.test_abi.answer", answer, override=True)
    function = abi.get_global_func("gptq_compile.test_abi.answer")
    assert function("none") is None and function("true") is True and function("number") == -3
    with pytest.raises(RuntimeError, match="no such\nthing"):
        function("raise")
    assert function("number") == -3, "the error was taken away"
    assert abi.get_global_func("gptq_compile.no_such_function", allow_missing=True) is None
    with pytest.raises(ValueError, match=r"gptq_compile\.no_such_function"):
        abi.get_global_func("gptq_compile.no_such_function")


def test_functions_of_a_module(artifact: pathlib.Path) -> None:
    module = abi.load_module(str(artifact / "model.so"))
    machine = module["vm_load_executable"]()
    machine["vm_initialization"](1, 0, 2)
    assert isinstance(machine["decode_1"], abi.Function)
    with pytest.raises(AttributeError, match="'decode_3'"):
        machine["decode_3"]


def test_a_thread_has_the_stream_that_it_was_given() -> None:
    where = abi.device("cuda", 0)
    with abi.use_raw_stream(where, 0x1234):
        with abi.use_raw_stream(where, 0x5678):
            assert tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", 0)) == 0x5678
        assert tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", 0)) == 0x1234


_PROGRAM = textwrap.dedent(
    """
    import json, sys
    if sys.argv[2] == "hidden":
        sys.modules["tvm_ffi"] = None  # not installed
    import gptq_compile
    engine = gptq_compile.Engine.load(sys.argv[1])
    text = engine.generate("hello", 20, eos_token_id=[])
    libraries = sorted({line.split()[-1] for line in open("/proc/self/maps") if "libtvm_ffi.so" in line})
    print(json.dumps({"text": text, "libraries": libraries, "package": "tvm_ffi.core" in sys.modules}))
    if sys.argv[2] == "later":
        import tvm_ffi
        assert tvm_ffi.get_global_func("device_api.cpu") is not None, "two registries"
        assert engine.generate("hello", 20, eos_token_id=[]) == text
    """
)


@pytest.mark.parametrize("how", ["later", "hidden"])
def test_a_process_that_generates_does_not_need_the_package(artifact: pathlib.Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(artifact), how], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[0])
    assert len(seen["text"]) > 0 and not seen["package"]
    ours = str(artifact / "lib" / "libtvm_ffi.so")
    assert seen["libraries"] == [ours if how == "hidden" else str(tvm_ffi.libinfo.find_libtvm_ffi())]
