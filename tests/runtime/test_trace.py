# SPDX-License-Identifier: Apache-2.0
"""A trace is valid JSON at any moment, its spans do not overlap, and it never stops the program."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.sampling import SamplingSettings
from gptq_compile.runtime.trace import Trace

ROOT = pathlib.Path(__file__).resolve().parents[2]


def spans(events: list[dict[str, Any]]) -> dict[str, list[tuple[str, float, float]]]:
    """Row -> (name, begin, end) of its spans in order of time, all within microseconds of one clock."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    found: dict[str, list[tuple[str, float, float]]] = {name: [] for name in names.values()}
    for e in events:
        if e["ph"] == "X":
            found[names[e["tid"]]].append((e["name"], e["ts"], e["ts"] + e["dur"]))
    return {row: sorted(of, key=lambda s: s[1]) for row, of in found.items()}


def test_rows_do_one_thing_after_another(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    with Trace(path) as trace:
        assert json.loads(path.read_text()) == []
        trace.enter("a", "first", size=3, name="x")
        trace.enter("b", "other")
        time.sleep(0.01)
        trace.enter("a", "second")
        trace.mark("a", 'odd "name"\n', token=7)
        with trace.span("c", "block"):
            assert [e["name"] for e in json.loads(path.read_text()) if e["ph"] == "X"] == ["first"]
        trace.did("d", "long", 0.005)
        trace.did("d", "longer than there was time", 9.0)
    events = json.loads(path.read_text())
    rows = spans(events)
    assert [[s[0] for s in rows[r]] for r in "abcd"] == [
        ["first", "second"], ["other"], ["block"], ["long", "longer than there was time"],
    ]  # fmt: skip
    assert rows["a"][0][2] - rows["a"][0][1] >= 9e3 and rows["a"][0][2] <= rows["a"][1][1] + 0.01
    assert rows["d"][1][1] >= rows["d"][0][2] - 0.01
    [first] = [e for e in events if e["name"] == "first"]
    assert first["args"] == {"size": 3, "name": "x"}
    [mark] = [e for e in events if e["ph"] == "i"]
    assert mark["name"] == 'odd "name"\n' and mark["args"] == {"token": 7}


def test_without_a_file_nothing_is_kept() -> None:
    trace = Trace()
    trace.enter("a", "first")
    trace.mark("a", "moment")
    trace.did("a", "second", 1.0)
    trace.close()
    assert not trace.on and vars(trace)["_doing"] == {} == vars(trace)["_rows"]


def test_many_threads_write_one_file(tmp_path: pathlib.Path) -> None:
    with Trace(tmp_path / "t.json") as trace:

        def work(row: str) -> None:
            for i in range(200):
                with trace.span(row, str(i)):
                    pass

        threads = [threading.Thread(target=work, args=(f"row {i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = spans(json.loads((tmp_path / "t.json").read_text()))
    assert {row: [s[0] for s in of] for row, of in rows.items()} == {
        f"row {i}": list(map(str, range(200))) for i in range(4)
    }


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_file_is_whole_however_the_program_ends(tmp_path: pathlib.Path, how: signal.Signals) -> None:
    path = tmp_path / "trace.json"
    code = (
        "import sys, itertools, signal\nfrom gptq_compile.runtime.trace import Trace\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs of a shell ignore it
        "with Trace(sys.argv[1]) as trace:\n"
        "    trace.enter('whole', 'run')\n"
        "    for i in itertools.count():\n"
        "        with trace.span('steps', 'step', number=i): pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while not path.exists() or path.stat().st_size < 50_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        process.wait(30)
    finally:
        process.kill()
    rows = spans(json.loads(path.read_text()))
    assert len(rows["steps"]) > 100
    assert [s[0] for s in rows["whole"]] == (["run"] if how == signal.SIGINT else [])


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    write = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        return write(file, data[:10], at) if at + len(data) > 2000 and len(data) > 10 else write(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with Trace(path) as trace:
        for i in range(100):
            trace.mark("a", str(i))
        assert not trace.on
    assert 5 < len(json.loads(path.read_text())) < 40


def test_every_request_has_a_row(
    artifact: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    monkeypatch.setattr("gptq_compile.runtime.scheduler.GROWTH_TOKENS", 1)  # so that pages run out on the way
    prompts = [[7 * i % 256 for i in range(n)] for n in (5, 40, 5, 5, 9)]  # one more than run at once
    with Engine.load(artifact, max_batch=4, cache_tokens=96) as engine, Trace(path) as trace:
        engine.scheduler.trace = trace
        settings = {"eos_token_id": [], "return_dict_in_generate": True, "do_sample": True}
        results = engine.generate(prompts, 30, seed=list(range(5)), **settings)
        counters = engine.scheduler.counters
        stopped = engine.request([1, 2, 3], SamplingSettings(50, eos_token_ids=()))
        engine.scheduler.submit(stopped)
        engine.scheduler.step()
        engine.scheduler.cancel(stopped)
    events = json.loads(path.read_text())
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows = spans(events)
    assert set(rows) == {"model", *(f"request {i + 1}" for i in range(6))}
    marks: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    for e in events:
        if e["ph"] == "i":
            marks[names[e["tid"]]].append(e)
    for number, result in enumerate(results, 1):
        row = f"request {number}"
        phases = [name for name, _, _ in rows[row]]
        assert phases[:3] == ["queue", "prefill", "decode"] and phases[-1] == "decode"
        assert all(abs(a[2] - b[1]) < 0.01 for a, b in itertools.pairwise(rows[row]))
        *tokens, end = marks[row]
        assert [t["args"]["id"] for t in tokens] == result.token_ids
        assert (end["name"], end["args"]) == ("length", {"tokens": 30})
    assert counters.preempted == sum(name == "queue" for of in rows.values() for name, _, _ in of) - 6 > 0
    assert marks["request 6"][-1]["name"] == "cancelled" and len(stopped.tokens) == 1
    model = [e for e in events if e["ph"] == "X" and names[e["tid"]] == "model"]
    assert sum(e["args"]["tokens"] for e in model if e["name"] == "prefill") == counters.prefilled
    assert 30 <= sum(e["name"] == "decode" for e in model) <= counters.steps
    for a, b in itertools.pairwise(rows["model"]):
        assert a[2] <= b[1] + 0.01


def test_a_place_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError) as raised:
        Trace(tmp_path / "not there" / "trace.json")
    assert raised.value.errno == errno.ENOENT and raised.value.filename is not None
