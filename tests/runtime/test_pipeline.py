# SPDX-License-Identifier: Apache-2.0
"""The CUDA path's order of work, on a device that runs late: launches wait in a queue until somebody needs them.

``LateDevice`` keeps a CPU's memory but a stream's semantics: graph replays and token copies are queued and run, in
order, only when a result is awaited or something else is enqueued directly. What the host does too early shows.
"""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gptq_compile.runtime import engine as engine_module
from gptq_compile.runtime.decode import WARM_UP_STEPS
from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import LogitsError

PROMPTS = ["a", "The quick brown fox", "x" * 40, "été", "0123456789abcdef", "Z" * 17]


class LateGraph:
    """Replays by calling again; outputs land in the tensors of the capture, as a CUDA graph's do."""

    nodes = 1

    def __init__(self, device: LateDevice, run: Callable[[], Any]) -> None:
        self._device, self._run = device, run
        self.keep: list[Any] = [(None, device.tensor(np.zeros(8, "int32")), None)]
        self.closed = False

    def launch(self, stream: Any) -> None:
        assert not self.closed

        def replay() -> None:
            tokens = self._run()[1]
            ctypes.memmove(self.keep[0][1].data_ptr(), tokens.data_ptr(), 4 * tokens.numel())

        self._device.launches += 1
        self._device.queue.append(replay)

    def close(self) -> None:
        self.closed = True


class LateRing:
    def __init__(self, device: LateDevice, depth: int, width: int) -> None:
        self._device = device
        self._rows: list[np.ndarray | None] = [None] * depth

    def push(self, row: int, device_pointer: int, count: int, reused: bool) -> None:
        def copy() -> None:
            memory = (ctypes.c_int32 * count).from_address(device_pointer)
            self._rows[row] = np.array(memory, "int32")

        self._rows[row] = None
        # What was not captured has already run, as everything in a CPU's program order has.
        self._device.queue.append(copy)
        if len(self._device.queue) == 1:
            self._device.synchronize()
        self._device.deepest = max(self._device.deepest, sum(r is None for r in self._rows))

    def wait(self, row: int, count: int) -> np.ndarray:
        while self._rows[row] is None:
            self._device.queue.pop(0)()
        values = self._rows[row]
        assert values is not None
        return values[:count]

    def close(self) -> None:
        assert not self._device.queue


class LateDevice(CpuDevice):
    depth = 4

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Callable[[], None]] = []
        self.launches = self.deepest = 0
        self.captures: list[LateGraph] = []
        self.capturable = True

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def upload(self, tensor: Any, array: np.ndarray) -> None:
        self.synchronize()
        super().upload(tensor, array)

    def download(self, tensor: Any, dtype: str | None = None) -> np.ndarray:
        self.synchronize()
        return super().download(tensor, dtype)

    def ring(self, depth: int, width: int) -> Any:
        return LateRing(self, depth, width)

    def capture(self, run: Callable[[], Any]) -> Any:
        if not self.capturable:
            return None
        self.captures.append(LateGraph(self, run))
        return self.captures[-1]


@pytest.fixture
def late(artifact: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, LateDevice]]:
    made: list[LateDevice] = []

    def opened() -> LateDevice:
        made.append(LateDevice())
        return made[-1]

    def open_device(*_: Any) -> Any:
        return "cpu", opened

    monkeypatch.setattr(engine_module, "open_device", open_device)
    with Engine.load(artifact, cache_tokens=400) as engine:
        yield engine, made[0]
        assert engine.cache.free_pages == 25
    assert all(g.closed for g in made[0].captures)


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "seed": 5}, {"repetition_penalty": 1.4}, {"eos_token_id": list(range(0, 256, 5))}],
)
def test_steps_in_flight_change_nothing(
    engine: Engine, late: tuple[Engine, LateDevice], settings: dict[str, Any]
) -> None:
    late_engine, device = late
    expected = engine.generate(PROMPTS, 33, return_dict_in_generate=True, **settings)
    got = late_engine.generate(PROMPTS, 33, return_dict_in_generate=True, **settings)
    assert [(r.text, r.token_ids, r.finish_reason) for r in got] == [
        (r.text, r.token_ids, r.finish_reason) for r in expected
    ]
    assert device.captures and device.launches > 0
    assert 1 < device.deepest <= device.depth


def test_a_graph_for_each_bucket_penalty_and_step_in_flight(late: tuple[Engine, LateDevice]) -> None:
    engine, device = late
    for _ in range(3):
        engine.generate("one", 12, eos_token_id=[])
    assert len(device.captures) == device.depth
    # Every step runs once: the first token comes from prefill, the first call's warm-up runs directly.
    assert device.launches == 3 * 11 - WARM_UP_STEPS
    engine.generate("one", 12, eos_token_id=[], repetition_penalty=2.0)
    assert len(device.captures) == 2 * device.depth
    engine.generate(PROMPTS[:4], 12, eos_token_id=[])
    assert len(device.captures) == 3 * device.depth


def test_stop_strings_and_streaming_with_steps_in_flight(engine: Engine, late: tuple[Engine, LateDevice]) -> None:
    late_engine, _ = late
    text = engine.generate("stop strings", 40, eos_token_id=[])
    stop = text[12:15]
    assert (
        "".join(late_engine.generate("stop strings", 40, eos_token_id=[], stop=stop, stream=True))
        == text[: text.index(stop)]
    )
    stream = late_engine.generate("left early", 40, eos_token_id=[], stream=True)
    next(stream)
    stream.close()
    assert late_engine.generate(PROMPTS, 20) == engine.generate(PROMPTS, 20)


def test_without_capture_steps_run_directly(engine: Engine, late: tuple[Engine, LateDevice]) -> None:
    late_engine, device = late
    device.capturable = False
    assert late_engine.generate(PROMPTS, 20) == engine.generate(PROMPTS, 20)
    assert device.launches == 0
    np.testing.assert_array_equal(late_engine.logits([1, 2, 3], step=True), engine.logits([1, 2, 3], step=True))


def test_no_step_goes_beyond_the_page_table(late: tuple[Engine, LateDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = late
    advance = engine._model.advance
    highest = []

    def checked(tokens: Any, table: Any, ids: Any, positions: Any, slots: Any) -> Any:
        result = advance(tokens, table, ids, positions, slots)
        memory = (ctypes.c_int32 * positions.numel()).from_address(positions.data_ptr())
        highest.append(max(memory))
        return result

    monkeypatch.setattr(engine._model, "advance", checked)
    prompts = [[1] * 70, [2] * 80, [3] * 9, [4] * 95]
    results = engine.generate(prompts, 500, eos_token_id=[], return_dict_in_generate=True)
    assert [len(r.token_ids) for r in results] == [26, 16, 87, 1]
    assert max(highest) == 95


def test_invalid_logits_are_seen_through_a_graph(
    late: tuple[Engine, LateDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, device = late
    sample = engine._model.sample

    def spoiled(logits: Any, *columns: Any) -> Any:
        tokens = sample(logits, *columns)
        position = ctypes.c_int32.from_address(columns[-1].data_ptr()).value
        if position == 12:
            ctypes.c_int32.from_address(tokens.data_ptr()).value = -1
        return tokens

    monkeypatch.setattr(engine._model, "sample", spoiled)
    with pytest.raises(LogitsError, match="after 13 tokens"):
        engine.generate([1, 2, 3], 40, eos_token_id=[])
    assert device.launches > 0
