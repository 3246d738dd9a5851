# SPDX-License-Identifier: Apache-2.0
"""Finds the machine-code compilers: the host C compiler, nvcc, and the CUDA libraries TVM's code generator needs.

TVM's CUDA code generator lives behind ``libtvm_runtime_cuda.so``, which is linked to the driver library
``libcuda.so.1``. On a machine without a GPU that library does not exist, TVM then packages CUDA *source* and never
runs ptxas. A stub with the nine driver symbols makes cross-compiling possible there (DESIGN section 9).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_compile.errors import BuildError

logger = logging.getLogger(__name__)

CUDART = "libcudart.so.13"
ARM_TRIPLE = "aarch64-linux-gnu"
DEFAULT_CUDA_ROOT = Path("/usr/local/cuda")

# Every driver symbol libtvm_runtime_cuda.so imports. CUresult 3 is CUDA_ERROR_NOT_INITIALIZED: nothing may believe
# that there is a device behind the stub.
STUB_SYMBOLS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
STUB_SOURCE = "".join(f"int {name}(void) {{ return 3; }}\n" for name in STUB_SYMBOLS)


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that answered.

    Attributes:
        path: The program.
        version: ``(major, minor)`` of the toolkit.
        archs: Real architectures it can emit, such as ``sm_90``; empty if the toolkit is too old to list them.
    """

    path: Path
    version: tuple[int, int]
    archs: frozenset[str]

    def check(self, archs: Sequence[str]) -> None:
        """Checks that machine code for all of ``archs`` can be emitted.

        Raises:
            BuildError: naming the architectures this nvcc does not know.
        """
        missing = [arch for arch in archs if self.archs and arch not in self.archs]
        if missing:
            raise BuildError(
                f"nvcc {self.version[0]}.{self.version[1]} at {self.path} cannot emit code for {', '.join(missing)}; "
                f"it knows {', '.join(sorted(self.archs))}. Install another CUDA toolkit and name its nvcc in CUDACXX, "
                f"or drop these architectures from --target."
            )


def find_cc() -> Path | None:
    """Returns the C compiler: ``$CC`` if set, else gcc, cc or clang on PATH, else None."""
    for name in (os.environ.get("CC", ""), "gcc", "cc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found)
    return None


def require_cc(arm: bool = False) -> Path:
    """Returns the C compiler that links ``model.so``, for aarch64 if ``arm``.

    Raises:
        BuildError: if there is none.
    """
    cross = f"{ARM_TRIPLE}-gcc"
    if arm and platform.machine() != "aarch64":
        found = shutil.which(cross)
        if found is None:
            raise BuildError(
                f"{cross} was not found, which links model.so for aarch64. Install it (Debian: apt-get install "
                f"gcc-{ARM_TRIPLE}), or build model.a, an archive of objects, and link it there."
            )
        return Path(found)
    cc = find_cc()
    if cc is None:
        raise BuildError(
            "No C compiler was found to link model.so. Install gcc (Debian: apt-get install gcc), "
            "or name a compiler in the environment variable CC."
        )
    return cc


def require_ar() -> Path:
    """Returns the program that makes archives of objects.

    Raises:
        BuildError: if there is none.
    """
    found = shutil.which("ar")
    if found is None:
        raise BuildError("ar was not found, which makes archives. Install binutils (Debian: apt-get install binutils).")
    return Path(found)


def _cuda_roots() -> Iterator[Path]:
    """Yields toolkit folders, the most explicit first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    yield DEFAULT_CUDA_ROOT


def find_nvcc() -> Path | None:
    """Returns nvcc from CUDACXX, CUDA_HOME or CUDA_PATH, PATH, or /usr/local/cuda, in this order; None if absent."""
    candidates: list[str] = []
    if os.environ.get("CUDACXX"):
        candidates.append(os.environ["CUDACXX"])
    roots = list(_cuda_roots())
    candidates += [str(root / "bin" / "nvcc") for root in roots[:-1]]
    candidates += ["nvcc", str(roots[-1] / "bin" / "nvcc")]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return Path(found)
    return None


def require_nvcc(archs: Sequence[str]) -> Nvcc:
    """Returns an nvcc that can emit code for every architecture in ``archs``.

    Raises:
        BuildError: if nvcc is missing, does not run, or does not know one of ``archs``.
    """
    path = find_nvcc()
    if path is None:
        raise BuildError(
            "nvcc was not found in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, and building for a cuda "
            "target needs it. Install the CUDA toolkit (no GPU is needed to compile), or use --target cpu."
        )
    nvcc = _query_nvcc(path)
    nvcc.check(archs)
    return nvcc


@functools.lru_cache(maxsize=4)
def _query_nvcc(path: Path) -> Nvcc:
    try:
        about = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        codes = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"{path} was taken for nvcc but does not run ({error}). Point CUDACXX at a working nvcc."
        ) from error
    match = re.search(r"release (\d+)\.(\d+)", about)
    if match is None:
        raise BuildError(f"{path} does not say its version as nvcc does. Point CUDACXX at a working nvcc.")
    known = frozenset(re.findall(r"^sm_\w+", codes, re.MULTILINE))
    # --list-gpu-code leaves out the architecture-specific names before CUDA 12.9; the 'a' variants of Hopper and of
    # the Blackwells exist in every toolkit that knows the plain one.
    known |= {arch + "a" for arch in known if arch[3:].isdigit() and int(arch[3:]) >= 90}
    return Nvcc(path, (int(match[1]), int(match[2])), known)


def cache_dir() -> Path:
    """Returns this program's per-user cache folder (XDG base directory specification); it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "gptq-compile"


def build_libcuda_stub(folder: Path) -> Path:
    """Builds the stub driver library in ``folder`` unless it is there, and returns its path.

    The library is linked under another name and renamed into place, so that several processes may do this at once
    and none ever sees half a file.

    Raises:
        BuildError: if there is no C compiler or it fails.
        OSError: if ``folder`` cannot be written.
    """
    key = hashlib.sha256(STUB_SOURCE.encode()).hexdigest()[:12]
    library = folder / f"libcuda-stub-{key}" / "libcuda.so.1"
    if library.is_file():
        return library
    cc = require_cc()
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, scratch = tempfile.mkstemp(prefix="libcuda.", suffix=".part", dir=library.parent)
    os.close(descriptor)
    try:
        command = [str(cc), "-x", "c", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", scratch, "-"]
        done = subprocess.run(command, input=STUB_SOURCE, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{cc} could not build the stub of libcuda.so.1: {done.stderr.strip()[-2000:]}")
        os.chmod(scratch, 0o755)
        os.replace(scratch, library)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return library


def load_driver() -> str | None:
    """Loads ``libcuda.so.1`` into this process: the real one, else the stub.

    Returns:
        None if CUDA code can be generated now, else a sentence that says why not.
    """
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        return None
    except OSError:
        logger.debug("no libcuda.so.1 on this machine; loading a stub so that CUDA code can be cross-compiled")
    try:
        _load_stub()
    except (BuildError, OSError) as error:
        return f"This machine has no libcuda.so.1 and a stub for it could not be made. {error}"
    return None


def _load_stub() -> None:
    try:
        ctypes.CDLL(str(build_libcuda_stub(cache_dir())), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        # A read-only home, a full disk or a cache on a noexec mount: once loaded, the file is no longer needed.
        logger.debug("the cache folder is unusable (%s); building the libcuda stub in a temporary folder", error)
        with tempfile.TemporaryDirectory(prefix="gptq-compile-") as folder:
            ctypes.CDLL(str(build_libcuda_stub(Path(folder))), mode=ctypes.RTLD_GLOBAL)


def find_cudart() -> Path | None:
    """Returns ``libcudart.so.13`` (what TVM's wheel is linked to) from the toolkit or a pip package, else None."""
    folders = [root / sub for root in _cuda_roots() for sub in ("lib64", "lib", "targets/x86_64-linux/lib")]
    nvcc = find_nvcc()
    if nvcc is not None:
        folders += [nvcc.resolve().parent.parent / sub for sub in ("lib64", "lib", "targets/x86_64-linux/lib")]
    folders += [Path(entry) / "nvidia" / "cu13" / "lib" for entry in sys.path if entry]
    for folder in folders:
        if (folder / CUDART).is_file():
            return (folder / CUDART).resolve()
    return None


def load_cudart() -> str | None:
    """Loads ``libcudart.so.13`` into this process.

    Returns:
        None if it is loaded, else a sentence that says why not.
    """
    try:
        ctypes.CDLL(CUDART, mode=ctypes.RTLD_GLOBAL)
        return None
    except OSError:
        path = find_cudart()
    if path is None:
        return (
            f"{CUDART} was not found, which TVM's CUDA code generator is linked to. Install the CUDA 13 toolkit or "
            f"the package nvidia-cuda-runtime, and set CUDA_HOME if it is not in /usr/local/cuda."
        )
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"{path} could not be loaded ({error}). Reinstall the CUDA 13 runtime."
    return None
