# SPDX-License-Identifier: Apache-2.0
"""What a process that generates on the CPU holds: the cache as it fills up, and nothing that grows with prompts."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import ArtifactError
from gptq_compile.runtime.ffi import ffi, load_runtime


def _resident() -> int:
    """Bytes of this process in memory."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def test_a_cache_takes_memory_as_it_is_written(artifact: pathlib.Path) -> None:
    load_runtime(artifact / "lib", cuda=False)
    device = CpuDevice()
    layers, size = 60, 6 << 20
    before = _resident()
    tensors = [device.zeros((16, size // 64), "float32") for _ in range(layers)]
    assert all(t.data_ptr() % 64 == 0 for t in tensors)
    assert _resident() - before < 4 << 20
    row = np.ones((1, size // 64), "float32")
    for tensor in tensors:
        device.upload(_first(device, tensor, row.shape[1]), row)
    written = layers * row.nbytes
    # With pages of 2 MiB it would be 120 MiB and more.
    assert _resident() - before < written + (4 << 20)
    assert all(device.download(t).sum() == row.size for t in tensors[:3])


@pytest.mark.parametrize(("room", "calls"), [(8, [8, 8, 4]), (4096, [20])])
def test_calls_are_no_longer_than_the_artifact_has_room_for(copy: pathlib.Path, room: int, calls: list[int]) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["entries"]["forward_tokens"] = room
    path.write_text(json.dumps(manifest))
    ids = list(range(40, 60))
    with Engine.load(copy) as engine:
        seen: list[int] = []
        forward = engine._model.forward

        def listening(*arguments: Any) -> Any:
            seen.append(arguments[0].shape[0])
            return forward(*arguments)

        engine._model.forward = listening
        text = engine.generate(ids, 8, eos_token_id=[])
    assert seen == calls
    manifest["entries"]["forward_tokens"] = 0
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"entries\.forward_tokens is 0"):
        Engine.load(copy)
    assert len(text) > 0


def _first(device: CpuDevice, tensor: object, count: int) -> object:
    """The first row of a tensor."""
    return device._view(tensor, ffi().Shape([1, count]), ffi().dtype("float32"), 0)
