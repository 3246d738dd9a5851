# SPDX-License-Identifier: Apache-2.0
"""The one place that loads TVM's runtime libraries and says through what they are called.

For the CPU that is `abi`, our own few lines over tvm-ffi's C ABI. A GPU and a process that has imported ``tvm_ffi``
use that package. It imports torch whenever it is installed (for its own tensor exchange, which we do not use); that
costs seconds and hundreds of megabytes, so torch is hidden while tvm_ffi is imported, unless the process already has
it.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from gptq_compile.runtime import abi
from gptq_compile.runtime.errors import ArtifactError, DeviceError

_lock = threading.Lock()
# How often a thread of TVM's pool yields before it sleeps: 15 ms, for which no step of a model leaves it idle. TVM's
# own number is 150 ms and more, and for so long the end of the process waits for it.
_SPINS = ("TVM_THREAD_POOL_SPIN_COUNT", "30000")
# Handles stay referenced for the life of the process: unloading a library whose functions are registered is fatal.
_handles: list[ctypes.CDLL] = []
# What the first call took. It stays: objects of one are no arguments of the other.
_chosen: list[Any] = []


def ffi(libraries: pathlib.Path | None = None, gpu: bool = False) -> Any:
    """Returns `abi` or ``tvm_ffi``, the same for the life of the process.

    Args:
        libraries: the folder of the artifact's ``libtvm_ffi.so``; only the first call of a process needs it.
        gpu: whether the first artifact runs on one.
    """
    if not _chosen:
        with _lock:
            if not _chosen:
                _chosen.append(_choose(libraries, gpu))
    return _chosen[0]


def _choose(libraries: pathlib.Path | None, gpu: bool) -> Any:
    module = sys.modules.get("tvm_ffi")
    if module is not None and hasattr(module, "get_global_func"):
        return module
    if libraries is not None and not gpu:
        path = _installed_library() or libraries / "libtvm_ffi.so"
        _require(path)
        try:
            if abi.open_library(path):
                return abi
        except OSError as error:
            raise ArtifactError(f"The runtime library {path} does not load: {error}.") from error
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    try:
        import tvm_ffi
    finally:
        if hide:
            sys.modules.pop("torch", None)
    return tvm_ffi


def _installed_library() -> pathlib.Path | None:
    """The library of an installed ``tvm_ffi``: a later import of it in this process must find the same registry."""
    try:
        found = importlib.util.find_spec("tvm_ffi")
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None:
        return None
    path = pathlib.Path(found.origin).parent / "lib" / "libtvm_ffi.so"
    return path if path.is_file() else None


def function(name: str) -> Callable[..., Any]:
    """Returns a function of the TVM runtime by its registered name.

    Raises:
        ArtifactError: if the loaded runtime does not have it.
    """
    found = ffi().get_global_func(name, allow_missing=True)
    if found is None:
        raise ArtifactError(
            f"The TVM runtime in this process has no function {name!r}, so it is not the version this artifact was "
            "built with. Start a fresh process without another tvm imported."
        )
    return found


def load_runtime(folder: pathlib.Path, cuda: bool) -> None:
    """Loads ``libtvm_runtime.so`` (and its CUDA side) from ``folder`` unless the process has them.

    Args:
        folder: the artifact's ``lib`` folder; its files' hashes have been checked by the caller.
        cuda: whether the CUDA device API is needed as well.

    Raises:
        ArtifactError: if a library is missing or does not load.
        DeviceError: if the CUDA side cannot find the CUDA runtime library.
    """
    os.environ.setdefault(*_SPINS)
    module = ffi(folder, cuda)
    has = lambda name: module.get_global_func(name, allow_missing=True) is not None  # noqa: E731
    with _load_lock:
        if not has("device_api.cpu"):
            _load(folder / "libtvm_runtime.so")
        if cuda and not has("device_api.cuda"):
            _load_cudart(folder)
            _load(folder / "libtvm_runtime_cuda.so")


_load_lock = threading.Lock()


def _require(path: pathlib.Path) -> None:
    if not path.is_file():
        raise ArtifactError(
            f"The runtime library {path} is missing. Copy the whole artifact folder, its lib subfolder included."
        )


def _load(path: pathlib.Path) -> None:
    _require(path)
    try:
        _handles.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    except OSError as error:
        raise ArtifactError(f"The runtime library {path} does not load: {error}.") from error


def _load_cudart(folder: pathlib.Path) -> None:
    """Makes ``libcudart.so.13`` loadable: system, artifact, pip's nvidia packages, then /usr/local."""
    name = "libcudart.so.13"
    candidates = [name, str(folder / name)]
    for root in sys.path:
        candidates += glob.glob(os.path.join(glob.escape(root), "nvidia", "*", "lib", name))
    candidates += sorted(glob.glob(f"/usr/local/cuda*/lib64/{name}"), reverse=True)
    for candidate in candidates:
        try:
            _handles.append(ctypes.CDLL(candidate, ctypes.RTLD_GLOBAL))
            return
        except OSError:
            continue
    raise DeviceError(
        f"The CUDA runtime library {name} was not found. Install it with `pip install nvidia-cuda-runtime` "
        "(CUDA 13) or set LD_LIBRARY_PATH to the folder that has it."
    )
