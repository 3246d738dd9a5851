# SPDX-License-Identifier: Apache-2.0
"""The report is one file that loads nothing, says what was measured, and cannot be broken by names."""

from __future__ import annotations

import json
import math
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptq_compile.api import CompileResult, Plan, Silent
from gptq_compile.passes.gptq_quantize import LinearReport
from gptq_compile.report import record
from gptq_compile.report.page import page, write_report
from gptq_compile.report.plots import Series, plot
from gptq_compile.report.record import Recorder, Sample

_VOID = {"meta", "img", "link"}


class Page(HTMLParser):
    """Tags in balance, cells of tables, and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: list[dict[str, str | None]] = []
        self.data = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [str(values[k]) for k in ("src", "href", "action", "data", "srcset") if k in values]
        if tag == "script":
            self.scripts.append(values)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "script":
            self.data += data


def read(text: str) -> Page:
    found = Page(text)
    assert found.loads == [] and "@import" not in text and "url(" not in text and "://" not in text
    assert [s.get("type") for s in found.scripts] == ["application/json"]
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        for element in ElementTree.fromstring(svg).iter():
            for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
                assert -1 <= float(element.get(key, 0)) <= 861
    return found


def test_a_compilation_writes_its_report_beside_the_artifact(compiled: Any) -> None:
    text = (compiled.artifact.parent / f"{compiled.artifact.name}.report.html").read_text()
    found = read(text)
    data = json.loads(found.data)
    told = [e for e in compiled.events if e["event"] == "linear"]
    assert [x["name"] for x in data["linears"]] == [e["name"] for e in told]
    assert [x["error"] for x in data["linears"]] == [e["error"] for e in told]
    assert data["seconds"] == compiled.events[-1]["seconds"] and data["settings"]["wbits"] == 4
    rows = {row[0]: row for row in found.rows}
    for e in told:
        shape = " x ".join(map(str, e["shape"]))
        assert rows[e["name"]][1:6] == [shape, "4", "32", f"{e['error']:.3g}", f"{e['error_rtn']:.3g}"]
    assert text.count("<circle") == 3 * len(told)  # error, error of rounding, bits
    assert data["peak_memory"] > 50e6 and len(data["memory"]) > 3
    assert data["solved_at"] == sorted(data["solved_at"]) and len(data["solved_at"]) == len(told)


def test_the_artifact_holds_no_times(compiled: Any) -> None:
    manifest = (compiled.artifact / "manifest.json").read_text()
    assert "seconds" not in manifest and str(time.gmtime().tm_year) not in re.sub(r'"[0-9a-f]{64}"', "", manifest)


def result(name: str, reports: list[LinearReport]) -> CompileResult:
    plan = Plan(name, "llama", 10, 8, len(reports), 10, 20, 5, 4.0, 1000, {"calibration": name, "buckets": [1, 2]})
    return CompileResult(Path("out"), plan, {"open": 1.0, "build": 2.0}, reports)


def report(name: str, error: float | None, note: str | None = None) -> LinearReport:
    return LinearReport(name, (4, 8), 4, 8, "gptq", error, error, 0.01, 0, note, 0.5)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script><img src=x>&\"'$title"
    with Recorder(Silent()) as run:
        run.note(bad)
        for _ in range(2):
            run.linear(report(bad, 0.1, bad), 1, 2)
    made = result(bad, [report(bad, 0.1, bad), report(bad, None, bad)])
    write_report(tmp_path / "deep" / "r.html", made, run)
    found = read((tmp_path / "deep" / "r.html").read_text())
    assert json.loads(found.data)["model"] == bad
    rows = [row for row in found.rows if row[0] == bad]
    assert [row[4] for row in rows] == ["0.1", "not measured"] and rows[0][-1] == bad
    write_report(tmp_path / "deep" / "r.html", made, run)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.html"]


def test_a_run_that_measured_nothing_has_a_report() -> None:
    with Recorder(Silent()) as run:
        pass
    text = page(result("m", [report("w", None)]), run)
    read(text)
    assert text.count("nothing was measured") == 2  # errors, time


@pytest.mark.parametrize("values", [[0.0], [1e-7], [3.2, 1e9], [1e-300, 1.0], [math.nan, 2.0], [0.0, 0.0]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_plotted(values: list[float], log: bool) -> None:
    text = plot([Series("a", list(enumerate(values)))], "x", "y", log=log)
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    assert text.count("<circle") == len(shown)
    if shown:
        places = [float(y) for y in re.findall(r'cy="([^"]+)"', text)]
        assert all(12 <= y <= 206 for y in places)  # inside the axes
        assert [shown[i] for i in sorted(range(len(shown)), key=lambda i: -places[i])] == sorted(shown)


def test_samples_are_thinned_and_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_EVERY", 1e-4)
    monkeypatch.setattr(record, "_SAMPLES", 16)
    with Recorder(Silent()) as run:
        time.sleep(0.3)
    assert 2 <= len(run.samples) <= 16
    times = [s.seconds for s in run.samples]
    assert times == sorted(times) and times[0] < 0.05 and times[-1] > 0.1
    assert all(isinstance(s, Sample) and s.resident > 1e6 for s in run.samples)
