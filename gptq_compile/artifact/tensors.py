# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files one tensor at a time, so that weights never have to be in memory together.

Format: 8 bytes little-endian header length, JSON header ``{name: {dtype, shape, data_offsets}}``, data without gaps.
The header precedes data whose extent is not known before it is written, so room is reserved and filled in at the end;
the format allows spaces after the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from gptq_compile.artifact.files import create
from gptq_compile.errors import OutputError

ALIGNMENT = 64  # of every tensor of an artifact, so that a memory map can be used in place
_PADDING = "__padding__"
HEADER_BYTES = 64 << 10
_CHUNK = 8 << 20
# numpy and torch names -> safetensors' names.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def as_bytes(name: str, tensor: Any) -> tuple[str, tuple[int, ...], memoryview]:
    """A tensor's dtype name, shape and little-endian bytes.

    Args:
        name: for messages.
        tensor: a numpy array or a torch tensor on the CPU.

    Raises:
        OutputError: for a dtype that safetensors does not have.
    """
    if isinstance(tensor, np.ndarray):
        array, dtype = np.ascontiguousarray(tensor).reshape(tensor.shape), tensor.dtype.name
    else:
        import torch

        tensor = tensor.detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        array = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    if dtype not in _DTYPES:
        raise OutputError(f"The tensor {name!r} has dtype {dtype}, which safetensors files cannot hold.")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return dtype, tuple(array.shape), array.reshape(-1).view(np.uint8).data


class TensorWriter:
    """One safetensors file, written front to back; a context manager."""

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        reserve: int = HEADER_BYTES,
        alignment: int = ALIGNMENT,
    ) -> None:
        """Creates the file.

        Args:
            path: a file that does not exist.
            metadata: kept in the header.
            reserve: bytes for the header; a larger one moves the data once.
            alignment: of every tensor, by tensors of padding (1: none).
        """
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._start = -(-(8 + reserve) // ALIGNMENT) * ALIGNMENT
        self._alignment = alignment
        self._position = 0
        self._context = create(path)
        self._file: IO[bytes] = self._context.__enter__()
        self._file.seek(self._start)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as e:
            self._context.__exit__(type(e), e, e.__traceback__)
            raise
        self._context.__exit__(kind, error, tb)

    def add(self, name: str, tensor: Any) -> dict[str, Any]:
        """Appends a tensor.

        Returns:
            ``{"name", "shape", "dtype"}`` as the manifest lists it.

        Raises:
            OutputError: for a name that is taken or a dtype that does not exist in the format.
        """
        if name in self._header:
            raise OutputError(f"The tensor {name!r} would be written twice.")
        dtype, shape, data = as_bytes(name, tensor)
        if padding := -self._position % self._alignment:
            # The format has no gaps, so the filling is a tensor too.
            self._append(f"{_PADDING}.{len(self._header)}", "U8", (padding,), memoryview(bytes(padding)))
        self._append(name, _DTYPES[dtype], shape, data)
        return {"name": name, "shape": list(shape), "dtype": dtype}

    def _append(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        for i in range(0, len(data), _CHUNK):
            self._file.write(data[i : i + _CHUNK])
        end = self._position + len(data)
        self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._position, end]}
        self._position = end

    def _finish(self) -> None:
        text = json.dumps(self._header, separators=(",", ":")).encode()
        start = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
        if start > self._start:
            self._move(start)
        length = self._start - 8
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + text.ljust(length))

    def _move(self, start: int) -> None:
        """Moves the data towards the end of the file, last piece first."""
        self._file.flush()
        with open(self._file.name, "rb") as source:
            for end in range(self._position, 0, -_CHUNK):
                begin = max(0, end - _CHUNK)
                source.seek(self._start + begin)
                piece = source.read(end - begin)
                self._file.seek(start + begin)
                self._file.write(piece)
                self._file.flush()
        self._start = start
