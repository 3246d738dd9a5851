# SPDX-License-Identifier: Apache-2.0
"""The shared libraries a built model needs at run time, for an artifact's ``lib/`` folder.

Every one of them has RUNPATH ``$ORIGIN`` and names the others by soname, so a folder with all of them can be moved
anywhere. They do not need Python, torch or TVM's compiler; the driver (``libcuda.so.1``) comes with the machine.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from gptq_compile.errors import BuildError, OutputError
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.toolchain import find_cudart

logger = logging.getLogger(__name__)


def runtime_libraries(target: Target) -> list[Path]:
    """Lists the libraries that ``model.so`` for ``target`` runs on, in the order to load them.

    Returns:
        ``libtvm_ffi.so``, ``libtvm_runtime.so`` and, for CUDA, ``libcudart.so.13`` (NVIDIA's licence names it as
        redistributable) and ``libtvm_runtime_cuda.so``.

    Raises:
        BuildError: if one is missing from the installation.
    """
    import importlib.util

    import tvm_ffi.libinfo

    if target.is_arm:
        raise BuildError(
            "An artifact for aarch64 would need TVM's runtime libraries for it, which no wheel here has. "
            "gptq_compile.passes.build makes model.a for it, an archive of objects."
        )
    tvm_package = importlib.util.find_spec("tvm")
    if tvm_package is None or not tvm_package.submodule_search_locations:
        raise BuildError("TVM is not installed, so its runtime libraries cannot be copied. pip install apache-tvm.")
    folder = Path(next(iter(tvm_package.submodule_search_locations))) / "lib"
    libraries = [Path(tvm_ffi.libinfo.find_libtvm_ffi()), folder / "libtvm_runtime.so"]
    if target.kind == "cuda":
        cudart = find_cudart()
        if cudart is None:
            raise BuildError(
                "libcudart.so.13 was not found, and TVM's CUDA runtime is linked to it. Install the CUDA 13 toolkit "
                "or pip install nvidia-cuda-runtime, and set CUDA_HOME if it is not in /usr/local/cuda."
            )
        libraries += [cudart, folder / "libtvm_runtime_cuda.so"]
    missing = [str(library) for library in libraries if not library.is_file()]
    if missing:
        raise BuildError(
            f"These TVM runtime libraries are missing: {', '.join(missing)}. Reinstall apache-tvm and apache-tvm-ffi."
        )
    return libraries


def soname(library: Path) -> str:
    """Returns the file name other libraries ask for: ``libcudart.so.13`` for ``libcudart.so.13.0.96``."""
    stem, _, version = library.name.partition(".so")
    return f"{stem}.so{'.' + version.split('.')[1] if version else ''}"


def copy_runtime_libraries(target: Target, folder: Path) -> list[Path]:
    """Copies the runtime libraries of ``target`` into ``folder`` (made if missing) and returns the copies.

    Raises:
        BuildError: if a library is missing from the installation.
        OutputError: if ``folder`` cannot be written.
    """
    copies = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for library in runtime_libraries(target):
            copy = folder / soname(library)
            shutil.copyfile(library, copy)
            copy.chmod(0o755)
            copies.append(copy)
    except OSError as error:
        raise OutputError(
            f"The runtime libraries could not be copied to {folder}: {error.strerror or error}. "
            f"Free some space there, or choose another output folder."
        ) from error
    logger.debug("copied %d runtime libraries to %s", len(copies), folder)
    return copies
