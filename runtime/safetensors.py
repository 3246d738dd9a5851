# SPDX-License-Identifier: Apache-2.0
"""A strict reader of the safetensors format: JSON header, then one flat buffer, memory-mapped.

Format: 8 bytes little-endian header length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}``, data.
Everything is validated before the first tensor is touched; nothing is unpickled or executed.
"""

from __future__ import annotations

import json
import math
import pathlib
import threading
from ctypes import CDLL, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptq_compile.runtime.errors import ArtifactError

# BF16 has no numpy type: its bits are handed out as uint16.
NUMPY_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "uint16",
    "I64": "int64",
    "I32": "int32",
    "U32": "uint32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# What the same bytes are called in the manifest and by TVM.
TENSOR_DTYPES = {**NUMPY_DTYPES, "BF16": "bfloat16"}
MAX_HEADER_BYTES = 100 << 20
# Larger files take longer to compute with than to map, and may be larger than the memory.
AHEAD_BYTES = 1 << 30
_POPULATE_READ = 22  # MADV_POPULATE_READ (Linux 5.14, madvise(2)); older ones refuse it


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: its name in the manifest, such as ``float16`` or ``bfloat16``.
        numpy_dtype: the numpy type of the array that holds its bits.
        shape: its dimensions.
        begin: offset of its first byte from the start of the file.
        nbytes: its size in bytes.
    """

    dtype: str
    numpy_dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsFile:
    """One memory-mapped file; ``array(name)`` is a copy-on-write view into it."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads and validates the header.

        Raises:
            ArtifactError: naming the file, and the tensor where there is one.
        """
        self.path = path
        self.tensors = read_header(path)
        # Mode "c" (copy on write) instead of "r": DLPack refuses read-only arrays, and nobody may change the file.
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c")

    def array(self, name: str) -> np.ndarray:
        """Returns the tensor as a numpy array (bfloat16 as uint16) that shares the mapped memory."""
        info = self.tensors.get(name)
        if info is None:
            raise ArtifactError(f"{self.path} has no tensor {name!r}, which the manifest lists.")
        data = self._bytes[info.begin : info.begin + info.nbytes]
        if info.begin % np.dtype(info.numpy_dtype).itemsize:
            data = data.copy()
        return np.asarray(data).view(info.numpy_dtype).reshape(info.shape)

    def map_ahead(self) -> threading.Thread | None:
        """Has the system map the file's pages while this thread goes on, instead of at the first use of each.

        Returns:
            The thread that waits for it, without Python's lock; None for a file of more than `AHEAD_BYTES`.
        """
        mapped = self._bytes
        if mapped.nbytes > AHEAD_BYTES:
            return None
        madvise = CDLL(None).madvise
        madvise.argtypes = (c_void_p, c_size_t, c_int)
        begin = mapped.ctypes.data

        def wait(kept: np.ndarray = mapped) -> None:
            madvise(begin, kept.nbytes, _POPULATE_READ)

        thread = threading.Thread(target=wait, name="map weights", daemon=True)
        thread.start()
        return thread


def read_header(path: pathlib.Path) -> dict[str, TensorInfo]:
    """Reads and validates a safetensors header against the file's size.

    Raises:
        ArtifactError: if anything about it is not as the format demands.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            prefix = f.read(8)
            if len(prefix) < 8:
                raise ArtifactError(f"{path} is truncated: it has {size} bytes, less than a safetensors header.")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise ArtifactError(f"{path} is not a safetensors file: its header would be {length} bytes long.")
            if 8 + length > size:
                raise ArtifactError(
                    f"{path} is truncated: its header needs {length} bytes and the file ends after {size - 8}."
                )
            raw = f.read(length)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} has a header that is not valid JSON: {error}.") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} has a header that is not a JSON object.")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, start, size - start) for name, entry in header.items()}
    _check_layout(path, tensors, start, size)
    return tensors


def _tensor_info(path: pathlib.Path, name: str, entry: Any, start: int, available: int) -> TensorInfo:
    where = f"{path}, tensor {name!r}"
    if not isinstance(entry, dict):
        raise ArtifactError(f"{where}: its header entry is not an object.")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise ArtifactError(f"{where}: dtype {dtype!r} is not one of {', '.join(NUMPY_DTYPES)}.")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(_is_size(d) for d in shape):
        raise ArtifactError(f"{where}: shape {shape!r} is not a list of non-negative integers.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise ArtifactError(f"{where}: data_offsets {offsets!r} is not a pair of non-negative integers.")
    begin, end = offsets
    numpy_dtype = NUMPY_DTYPES[dtype]
    expected = math.prod(shape) * np.dtype(numpy_dtype).itemsize
    if end - begin != expected:
        raise ArtifactError(
            f"{where}: data_offsets span {end - begin} bytes, but shape {shape} of {dtype} needs {expected}."
        )
    if end > available:
        raise ArtifactError(f"{where}: the file is truncated; the tensor ends at byte {end} of {available}.")
    return TensorInfo(TENSOR_DTYPES[dtype], numpy_dtype, tuple(shape), start + begin, expected)


def _check_layout(path: pathlib.Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """Tensors must tile the data exactly: no overlap, no hole, no trailing bytes (as the format's reference does)."""
    position, previous = start, None
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin < position:
            raise ArtifactError(f"{path}, tensor {name!r}: its data overlap those of tensor {previous!r}.")
        if info.begin > position:
            raise ArtifactError(f"{path}, tensor {name!r}: {info.begin - position} unused bytes lie before it.")
        position, previous = info.begin + info.nbytes, name
    if position != size:
        raise ArtifactError(f"{path}: {size - position} bytes after the last tensor belong to nothing.")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {key!r} appears twice")
        result[key] = value
    return result
