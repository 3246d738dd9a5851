# SPDX-License-Identifier: Apache-2.0
"""The libcuda stub is built once, whole, and TVM's code generators work with it and without it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_compile.errors import BuildError
from gptq_compile.kernels import toolchain
from gptq_compile.kernels.fatbin import archs_in

needs_cc = pytest.mark.skipif(toolchain.find_cc() is None, reason="no C compiler is installed")
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not installed")

BUILD_STUB = (
    "import sys; from pathlib import Path; from gptq_compile.kernels.toolchain import *; "
    "print(build_libcuda_stub(Path(sys.argv[1])))"
)


@needs_cc
def test_stub_has_every_symbol_and_no_device(tmp_path: Path) -> None:
    path = toolchain.build_libcuda_stub(tmp_path)
    stub = ctypes.CDLL(str(path))
    for name in toolchain.STUB_SYMBOLS:
        assert getattr(stub, name)() == 3, "CUDA_ERROR_NOT_INITIALIZED"
    assert b"libcuda.so.1\0" in path.read_bytes(), "its soname is what TVM's runtime asks for"


@needs_cc
def test_processes_that_build_the_stub_at_once_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD_STUB, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(paths) == 1
    folder = Path(paths.pop()).parent
    assert [p.name for p in folder.iterdir()] == ["libcuda.so.1"], "a half-written file was left"


@needs_cc
def test_the_stub_is_not_built_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toolchain.build_libcuda_stub(tmp_path)
    written = first.stat().st_mtime_ns
    monkeypatch.setenv("PATH", "")
    assert toolchain.build_libcuda_stub(tmp_path) == first
    assert first.stat().st_mtime_ns == written


def test_failing_compiler_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cc = tmp_path / "cc"
    cc.write_text("#!/bin/sh\necho 'cc: broken' >&2\nexit 1\n")
    cc.chmod(0o755)
    monkeypatch.setenv("CC", str(cc))
    with pytest.raises(BuildError, match="cc: broken"):
        toolchain.build_libcuda_stub(tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toolchain.cache_dir() == tmp_path / "gptq-compile"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", "/home/someone")
    assert toolchain.cache_dir() == Path("/home/someone/.cache/gptq-compile")


def driver_exists() -> bool:
    """Asks a fresh process, because this one may have loaded the stub."""
    code = "import ctypes; ctypes.CDLL('libcuda.so.1')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_without_a_c_compiler_only_cuda_is_refused(tmp_path: Path) -> None:
    """No gcc, no stub: TVM still imports and generates LLVM code; CUDA gets a sentence."""
    if driver_exists():
        pytest.skip("this machine has a driver, so no stub is needed")
    code = (
        "import sys; before = sys.excepthook\n"
        "from gptq_compile.kernels import tvm_env\n"
        "assert sys.excepthook is before, 'tvm took the excepthook'\n"
        "print(tvm_env.tvm.target.Target('llvm').kind.name)\n"
        "try: tvm_env.require_cuda_codegen()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    env = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    kind, refusal = done.stdout.strip().split("\n")
    assert kind == "llvm"
    assert refusal.startswith("BuildError CUDA code cannot be generated") and "Install gcc" in refusal
    assert done.stderr == "", "importing TVM is not quiet"


@needs_cc
@needs_nvcc
def test_cuda_code_generation_is_ready_here() -> None:
    if toolchain.find_cudart() is None:
        pytest.skip("libcudart.so.13 is not installed")
    from gptq_compile.kernels.tvm_env import require_cuda_codegen

    require_cuda_codegen()


@needs_cc
@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_fatbin_reader_agrees_with_nvcc(tmp_path: Path, arch: str) -> None:
    nvcc = toolchain.require_nvcc([arch])
    source, fatbin = tmp_path / "k.cu", tmp_path / "k.fatbin"
    source.write_text('extern "C" __global__ void k(float* x) { x[threadIdx.x] += 1.f; }\n')
    flags = [
        "-gencode",
        f"arch=compute_{arch[3:]},code={arch}",
        "-gencode",
        "arch=compute_80,code=compute_80",
    ]
    subprocess.run([nvcc.path, "--fatbin", *flags, "-o", fatbin, source], check=True)
    assert archs_in(fatbin) == sorted([arch, "compute_80"], key=lambda a: (a.split("_")[1], a.startswith("c")))
    wrapped = tmp_path / "library"
    wrapped.write_bytes(b"\x7fELF" + bytes(1001) + fatbin.read_bytes() + bytes(99))
    assert archs_in(wrapped) == archs_in(fatbin)


def test_fatbin_reader_finds_nothing_in_other_files(tmp_path: Path) -> None:
    path = tmp_path / "library"
    path.write_bytes(bytes(range(256)) * 8)
    assert archs_in(path) == []
    path.write_bytes(b"\x50\xed\x55\xba\x01\x00\x10\x00" + b"\xff" * 8)
    assert archs_in(path) == [], "a header without entries"
