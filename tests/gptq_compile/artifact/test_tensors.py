# SPDX-License-Identifier: Apache-2.0
"""Streamed safetensors files are what the reference library would read, whatever the header's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gptq_compile.artifact import tensors
from gptq_compile.artifact.tensors import TensorWriter
from gptq_compile.errors import OutputError
from gptq_compile.runtime.safetensors import SafetensorsFile

DTYPES = ["float32", "float16", "int64", "int32", "int8", "uint8", "uint32", "bool"]
ARRAYS = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8)


@settings(max_examples=40, deadline=None)
@given(specs=ARRAYS, reserve=st.sampled_from([0, 100, 4096]), alignment=st.sampled_from([1, 64]))
def test_round_trip(tmp_path_factory, specs, reserve, alignment):
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": np.asarray(rng.integers(0, 2, shape)).astype(dtype) for i, (dtype, shape) in enumerate(specs)}
    with TensorWriter(path, reserve=reserve, alignment=alignment) as writer:
        for name, array in arrays.items():
            assert writer.add(name, array) == {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}
    ours = SafetensorsFile(path)
    read = load_file(path)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and np.array_equal(read[name], array)
        assert np.array_equal(ours.array(name), array) and ours.array(name).shape == array.shape
        assert ours.tensors[name].begin % alignment == 0


def test_header_larger_than_reserved_moves_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_CHUNK", 1000)  # several pieces, moved by less than their size
    arrays = {f"a_rather_long_name_{i}": np.random.default_rng(i).normal(size=97) for i in range(30)}
    with TensorWriter(tmp_path / "x.safetensors", {"k": "v"}, reserve=0) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    read = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(read[name], array) for name, array in arrays.items())


def test_views_and_byte_orders(tmp_path):
    with TensorWriter(tmp_path / "x.safetensors") as writer:
        writer.add("transposed", torch.arange(6).reshape(2, 3).T)
        writer.add("strided", np.arange(10)[::3])
        writer.add("big", np.arange(3, dtype=">i4"))
        writer.add("scalar", np.array(3, np.float32))
    read = load_file(tmp_path / "x.safetensors")
    assert np.array_equal(read["transposed"], [[0, 3], [1, 4], [2, 5]])
    assert np.array_equal(read["strided"], [0, 3, 6, 9])
    assert np.array_equal(read["big"], [0, 1, 2])
    assert read["scalar"].shape == () and read["scalar"] == 3


def test_unknown_dtype(tmp_path):
    with pytest.raises(OutputError, match="'a' has dtype complex64"), TensorWriter(tmp_path / "x") as writer:
        writer.add("a", np.ones(1, np.complex64))


def test_an_error_leaves_no_valid_file(tmp_path):
    with pytest.raises(ValueError), TensorWriter(tmp_path / "x.safetensors") as writer:
        writer.add("a", np.ones(3))
        raise ValueError
    with pytest.raises(Exception, match="header"):
        load_file(tmp_path / "x.safetensors")
