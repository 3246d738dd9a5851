# SPDX-License-Identifier: Apache-2.0
"""The reader agrees with the format, and refuses handmade bad files by name."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import resource
from typing import Any

import numpy as np
import pytest

from gptq_compile.runtime import safetensors
from gptq_compile.runtime.errors import ArtifactError
from gptq_compile.runtime.safetensors import SafetensorsFile


def raw(path: pathlib.Path, header: Any, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    """Writes a file with this header (JSON text or an object) and these data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_every_dtype(tmp_path: pathlib.Path) -> None:
    arrays = {
        "F32": np.array([[1.5, -2.0]], "float32"),
        "F16": np.array([0.5, 3.0], "float16"),
        "BF16": np.array([0x3F80, 0xC000], "uint16"),
        "I64": np.array([-(2**40)], "int64"),
        "I32": np.array([[-7], [8]], "int32"),
        "U32": np.array([2**32 - 1], "uint32"),
        "I8": np.array([-128, 5, 6], "int8"),
        "U8": np.array([255], "uint8"),
        "BOOL": np.array([True, False]),
    }
    header, data = {"__metadata__": {"made": "here"}}, b""
    for name, array in arrays.items():
        offsets = (len(data), len(data) + array.nbytes)
        header[name.lower()] = entry(name, array.shape, offsets)  # type: ignore[assignment]
        data += array.tobytes()
    file = SafetensorsFile(raw(tmp_path / "all.safetensors", header, data))
    for name, array in arrays.items():
        got = file.array(name.lower())
        assert got.dtype == array.dtype and got.shape == array.shape
        np.testing.assert_array_equal(got, array)
    assert file.tensors["bf16"].dtype == "bfloat16"


def test_agrees_with_the_reference_library(tmp_path: pathlib.Path) -> None:
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {"b": rng.standard_normal((3, 5)).astype("float16"), "a": rng.integers(0, 9, (7,)).astype("uint8")}
    arrays["empty"] = np.zeros((0, 4), "float32")
    arrays["scalar"] = np.array(2.5, "float32")
    safetensors_numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"a": "b"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.array(name), array)


def test_writing_to_an_array_does_not_change_the_file(tmp_path: pathlib.Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"t": entry()}, b"\0" * 8)
    SafetensorsFile(path).array("t")[:] = 1
    assert path.read_bytes().endswith(b"\0" * 8)


def test_pages_that_were_mapped_ahead_cost_nothing_later(tmp_path: pathlib.Path) -> None:
    size = 32 << 20
    path = raw(tmp_path / "x.safetensors", {"t": entry("U8", (size,), (0, size))}, os.urandom(1 << 20) * 32)

    def faults(ahead: bool) -> int:
        file = SafetensorsFile(path)
        if ahead:
            waiting = file.map_ahead()
            assert waiting is not None
            waiting.join()
        pages = file.array("t")[::4096]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pages.max()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    plain, ahead = faults(False), faults(True)
    if tuple(map(int, platform.release().split(".")[:2])) < (5, 14):
        pytest.skip("this system's madvise cannot populate")
    assert plain >= 4 and ahead < plain // 4, (plain, ahead)


def test_a_file_too_large_to_map_ahead(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = raw(tmp_path / "x.safetensors", {"t": entry()}, b"\0" * 8)
    monkeypatch.setattr(safetensors, "AHEAD_BYTES", 8)
    assert SafetensorsFile(path).map_ahead() is None


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not json": (b"{nope", b"", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "a list": ([], b"", "not a JSON object"),
    "deep nesting": (b"[" * 200_000, b"", "not valid JSON"),
    "duplicate name": (b'{"t": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}, "t": {}}', b"\0", "twice"),
    "entry not an object": ({"t": 3}, b"", "tensor 't': its header entry"),
    "no dtype": ({"t": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "tensor 't': dtype None"),
    "unknown dtype": ({"t": entry("F8_E4M3", (8,))}, b"\0" * 8, "tensor 't': dtype 'F8_E4M3'"),
    "dtype a list": ({"t": entry(["F32"])}, b"\0" * 8, "tensor 't': dtype"),  # type: ignore[arg-type]
    "negative dimension": ({"t": entry(shape=(-2,))}, b"\0" * 8, "tensor 't': shape"),
    "shape of floats": ({"t": entry(shape=(2.0,))}, b"\0" * 8, "tensor 't': shape"),
    "shape of booleans": ({"t": entry(shape=(True, 2))}, b"\0" * 8, "tensor 't': shape"),
    "shape overflows": ({"t": entry(shape=(1 << 61, 1 << 61))}, b"\0" * 8, "tensor 't': data_offsets span"),
    "one offset": ({"t": entry(offsets=(0,))}, b"\0" * 8, "tensor 't': data_offsets"),
    "negative offset": ({"t": entry(offsets=(-8, 0))}, b"\0" * 8, "tensor 't': data_offsets"),
    "end before begin": ({"t": entry(offsets=(8, 0))}, b"\0" * 8, "tensor 't': data_offsets span -8"),
    "span not the shape's": ({"t": entry(offsets=(0, 4))}, b"\0" * 8, "tensor 't': data_offsets span 4"),
    "data truncated": ({"t": entry()}, b"\0" * 7, "tensor 't': the file is truncated"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "tensor 'b': its data overlap"),
    "same place": ({"a": entry(), "b": entry()}, b"\0" * 8, "overlap"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20, "tensor 'b': 4 unused bytes"),
    "trailing bytes": ({"t": entry()}, b"\0" * 9, "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_refuses_bad_headers_by_name(tmp_path: pathlib.Path, name: str) -> None:
    header, data, message = BAD_HEADERS[name]
    path = raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ArtifactError, match=r"bad\.safetensors") as error:
        SafetensorsFile(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x01\0\0", "truncated"),
        ((100).to_bytes(8, "little") + b"{}", "truncated"),
        (b"\xff" * 8 + b"{}", "not a safetensors file"),
    ],
)
def test_refuses_bad_prefixes(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        SafetensorsFile(path)


def test_missing_tensor_is_named(tmp_path: pathlib.Path) -> None:
    file = SafetensorsFile(raw(tmp_path / "x.safetensors", {"t": entry()}, b"\0" * 8))
    with pytest.raises(ArtifactError, match="no tensor 'u'"):
        file.array("u")
