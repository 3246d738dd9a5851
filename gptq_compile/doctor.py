# SPDX-License-Identifier: Apache-2.0
"""What a machine needs to compile and run models, what it has, and how to mend the difference."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptq_compile.errors import BuildError
from gptq_compile.kernels import toolchain
from gptq_compile.kernels.target import Target

_MIN_PYTHON = (3, 11)
_DISK_LOW = 5_000_000_000  # a 7B model in four bits and its build
_MEMORY_LOW = 4_000_000_000
# Distribution -> (lowest version, first version that is too new), as in pyproject.toml.
RUNTIME_PACKAGES = {
    "numpy": ("2.0", None),
    "apache-tvm-ffi": ("0.1.15", "0.2"),
    "tokenizers": ("0.22", None),
    "rich": ("13", None),
}
COMPILE_PACKAGES = {
    "torch": ("2.11", None),
    "transformers": ("5.17", "6"),
    "apache-tvm": ("0.27", "0.28"),
    "safetensors": ("0.6", None),
    "gguf": ("0.17", None),
}
# Without these, only models with a SentencePiece tokenizer and data sets from the hub are out of reach.
OPTIONAL_PACKAGES = {"sentencepiece": ("0.2", None), "datasets": ("4", None)}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what. ``found``: what was found, in words.
        status: ``"ok"``, ``"warning"`` (something will not work or be slow) or ``"missing"`` (something needed).
        mend: what to do; empty if there is nothing to do.
    """

    name: str
    status: str
    found: str
    mend: str = ""


def examine(target: Target | None, folder: Path) -> list[Finding]:
    """Looks at this machine.

    Args:
        target: what is to be compiled; None to run compiled models only.
        folder: where artifacts will be written.

    Returns:
        Findings in a fixed order; those with status ``"missing"`` keep the target from working.
    """
    findings = [_python(), _system()]
    findings += [_package(name, limits, True) for name, limits in RUNTIME_PACKAGES.items()]
    if target is not None:
        cuda = target.kind == "cuda"
        findings += [_package(name, limits, True) for name, limits in COMPILE_PACKAGES.items()]
        findings += [_package(name, limits, False) for name, limits in OPTIONAL_PACKAGES.items()]
        findings += [_not_the_other_tvm(), _c_compiler(), _nvcc(target.archs if cuda else None), _cudart(cuda)]
    findings += [*_gpu(), _memory(), _disk(folder)]
    return findings


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info >= _MIN_PYTHON:
        return Finding("python", "ok", f"{version} at {sys.executable}")
    return Finding("python", "missing", version, "Use Python 3.11 or newer.")


def _system() -> Finding:
    found = f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores"
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return Finding("system", "ok", found)
    return Finding("system", "missing", found, "Use Linux on x86_64: apache-tvm's wheels exist for nothing else here.")


def _package(name: str, limits: tuple[str, str | None], needed: bool) -> Finding:
    low, high = limits
    wanted = f"{name}>={low}" + (f",<{high}" if high else "")
    install = "pip install gptq-compile" if name in RUNTIME_PACKAGES else "pip install 'gptq-compile[compile]'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        status = "missing" if needed else "warning"
        return Finding(name, status, "not installed", f"{install}, or pip install '{wanted}'.")
    number = release(version)
    if number < release(low) or (high is not None and number >= release(high)):
        return Finding(name, "missing" if needed else "warning", version, f"pip install '{wanted}'.")
    return Finding(name, "ok", version)


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version: ``2.13.0+cpu`` -> (2, 13, 0), ``0.27.0.post1`` -> (0, 27, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _not_the_other_tvm() -> Finding:
    try:
        version = importlib.metadata.version("tvm")
    except importlib.metadata.PackageNotFoundError:
        return Finding("no other tvm", "ok", "the package `tvm`, which is something else, is not installed")
    mend = "pip uninstall tvm, then pip install --force-reinstall apache-tvm: the two overwrite each other's files."
    return Finding("no other tvm", "missing", f"tvm {version} from PyPI is installed", mend)


def _c_compiler() -> Finding:
    cc = toolchain.find_cc()
    if cc is None:
        mend = "Install gcc (Debian: apt-get install gcc), or name a compiler in the environment variable CC."
        return Finding("C compiler", "missing", "none of $CC, gcc, cc, clang", mend)
    try:
        done = subprocess.run([cc, "--version"], capture_output=True, text=True, timeout=20, check=True)
        return Finding("C compiler", "ok", f"{cc}: {done.stdout.splitlines()[0]}")
    except (OSError, subprocess.SubprocessError, IndexError) as e:
        return Finding("C compiler", "missing", f"{cc} does not run ({e})", "Point CC at a working C compiler.")


def _nvcc(archs: tuple[str, ...] | None) -> Finding:
    """nvcc and whether it knows ``archs`` (None: only the CPU is asked for)."""
    try:
        nvcc = toolchain.require_nvcc(archs or ())
    except BuildError as e:
        if archs is None:
            mend = "To compile for cuda, install the CUDA toolkit; no GPU is needed for that."
            return Finding("nvcc", "warning", "not found or not working", mend)
        return Finding("nvcc", "missing", str(e).split(". ")[0] + ".", "Install the CUDA 13 toolkit, or set CUDACXX.")
    known = [a for a in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120") if a in nvcc.archs]
    return Finding("nvcc", "ok", f"{nvcc.version[0]}.{nvcc.version[1]} at {nvcc.path}, knows {', '.join(known)}")


def _cudart(needed: bool) -> Finding:
    path = toolchain.find_cudart()
    if path is not None:
        return Finding("CUDA runtime", "ok", str(path))
    mend = "Install the CUDA 13 toolkit or pip install nvidia-cuda-runtime; set CUDA_HOME if it is elsewhere."
    return Finding("CUDA runtime", "missing" if needed else "warning", f"{toolchain.CUDART} was not found", mend)


def _gpu() -> Iterator[Finding]:
    """The driver and the GPUs, asked through the driver API so that neither torch nor CUDA's toolkit is needed."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        cuda.cuInit  # noqa: B018  the compiler's stub, if this process has loaded it, lacks this symbol
    except (OSError, AttributeError):
        mend = "Nothing to mend to compile, or to run on the CPU. To run on a GPU, install NVIDIA's driver."
        yield Finding("GPU driver", "warning", "libcuda.so.1 was not found", mend)
        return
    code = cuda.cuInit(0)
    if code != 0:
        mend = "Check `nvidia-smi`; in a container, pass the GPU through (docker run --gpus all)."
        yield Finding("GPU driver", "warning", f"the driver does not start (CUDA error {code})", mend)
        return
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    major, minor = version.value // 1000, version.value % 1000 // 10
    if major < 13:
        yield Finding(
            "GPU driver", "warning", f"supports CUDA {major}.{minor}",
            "Update NVIDIA's driver to 580 or newer: artifacts carry the CUDA 13 runtime.",
        )  # fmt: skip
    else:
        yield Finding("GPU driver", "ok", f"supports CUDA {major}.{minor}")
    if count.value == 0:
        yield Finding("GPU", "warning", "none is visible", "Check CUDA_VISIBLE_DEVICES and `nvidia-smi`.")
    for device in range(count.value):
        yield _device(cuda, device)


def _device(cuda: ctypes.CDLL, device: int) -> Finding:
    name, total = ctypes.create_string_buffer(128), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, 128, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    major, minor = (_attribute(cuda, which, device) for which in (75, 76))  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
    found = f"{name.value.decode(errors='replace')}, sm_{major}{minor}, {total.value / 1e9:.0f} GB"
    if major < 8:
        return Finding(f"GPU {device}", "warning", found, "The kernels need sm_80 (Ampere) or newer; use --target cpu.")
    return Finding(f"GPU {device}", "ok", found)


def _attribute(cuda: ctypes.CDLL, which: int, device: int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return value.value


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _meminfo("MemAvailable") or total
    found = f"{available / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    if available < _MEMORY_LOW:
        return Finding(
            "memory", "warning", found, "Close other programs; models of a billion weights need 4 GB and up."
        )
    return Finding("memory", "ok", found)


def _meminfo(key: str) -> int | None:
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _disk(folder: Path, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage) -> Finding:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = usage(place)[2]
    found = f"{free / 1e9:.1f} GB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "missing", f"{place} is not writable", "Choose another output folder.")
    if free < _DISK_LOW:
        return Finding("disk", "warning", found, "Free some space or choose an output folder on another disk.")
    return Finding("disk", "ok", found)
