# SPDX-License-Identifier: Apache-2.0
"""The report is one file that loads nothing, says what was measured, and cannot be broken by names."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptq_compile.api import CompileResult, Plan, Silent
from gptq_compile.passes.gptq_quantize import LinearReport
from gptq_compile.passes.manager import PassRecord
from gptq_compile.report import record
from gptq_compile.report.page import page, write_report
from gptq_compile.report.plots import Series, plot
from gptq_compile.report.record import Recorder, Sample

_VOID = {"meta", "img", "link"}


def load_module(name: str, path: Path) -> ModuleType:
    """A module that lies in no package."""
    spec = importlib.util.spec_from_file_location(f"gptq_compile_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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


def test_a_compilation_writes_its_report_into_the_artifact(compiled: Any) -> None:
    text = (compiled.artifact / "report.html").read_text()
    found = read(text)
    data = json.loads(found.data)
    told = [e for e in compiled.events if e["event"] == "linear"]
    *linears, head = data["linears"]
    assert [x["name"] for x in linears] == [e["name"] for e in told]
    assert [x["error"] for x in linears] == [e["error"] for e in told]
    assert (head["name"], head["bits"], head["error"]) == ("lm_head.weight", 8, None)
    assert data["seconds"] == compiled.events[-1]["seconds"] and data["settings"]["wbits"] == 4
    rows = {row[0]: row for row in found.rows}
    for e in told:
        shape = " x ".join(map(str, e["shape"]))
        assert rows[e["name"]][1:6] == [shape, "4", "32", f"{e['error']:.3g}", f"{e['error_rtn']:.3g}"]
    assert text.count("<circle") == 3 * len(told) + 1  # error, error of rounding, bits; of the head bits
    assert data["peak_memory"] > 50e6 and len(data["memory"]) > 3
    assert data["solved_at"] == sorted(data["solved_at"]) and len(data["solved_at"]) == len(told)


def test_kernels_refusals_and_passes_are_told(compiled: Any) -> None:
    text = (compiled.artifact / "report.html").read_text()
    rows = read(text).rows
    manifest = json.loads((compiled.artifact / "manifest.json").read_text())
    for chosen in manifest["kernels"].values():
        mine = [row for row in rows if len(row) == 5 and row[1] == chosen["kernel"]]
        assert mine, chosen
        for kernel, reason in chosen["refused"].items():
            assert any(kernel in row[4] and reason in row[4] for row in mine)
    # Seven linears in each of two layers and the head, and any number of rows is not what the fastest kernel is for.
    [prefill] = [row for row in rows if row[:2] == ["quant_linear", "cpu.quant_linear.panel"]]
    assert prefill[2] == "15 in forward" and "not symbolic" in prefill[4]
    assert ["aten.embedding.default", "1 in forward, decode_1, 2"] in rows
    done = compiled.events[-1]
    summaries = [
        re.sub("<[^>]*>", " ", row) for row in re.findall(r"<(?:summary|div)><span>.*?</(?:summary|div)>", text)
    ]
    for told in done["passes"]:
        line = next(s for s in summaries if s.split()[0] == told["name"] and f"{told['seconds']:.2f} s" in s)
        assert ("no change" in line) == (told["nodes_before"] == told["nodes_after"] and not told["modified"])
    steps = text[text.index("Steps of the build") :]
    assert "LegalizeOps" in steps and "linking" in steps and "AttachGlobalSymbol" in steps
    assert any(s.split()[0] == "generating" for s in summaries)
    unfolded = re.search(r"<summary><span>gptq_quantize.*?<pre>(.*?)</pre>", text, re.DOTALL)
    assert unfolded is not None
    for tag, sign, op in (("del", "-", "aten.linear"), ("ins", "+", "gptq_compile.quant_linear")):
        assert re.search(rf"<{tag}>\{sign}%[^<]*{op}", unfolded[1])


def test_the_trace_has_stages_passes_linears_and_steps_of_the_build(compiled: Any) -> None:
    events = json.loads(compiled.trace.read_text())
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for e in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        assert not rows[names[e["tid"]]] or rows[names[e["tid"]]][-1]["ts"] <= e["ts"]
        rows[names[e["tid"]]].append(e)
    told = compiled.events
    done = told[-1]
    assert [e["name"] for e in rows["stages"]] == [e["name"] for e in told if e["event"] == "stage"]
    assert [e["name"] for e in rows["passes"]] == [p["name"] for p in done["passes"]]
    assert [e["name"] for e in rows["linears"]] == [e["name"] for e in told if e["event"] == "linear"]
    assert [e["args"]["error"] for e in rows["linears"]] == [e["error"] for e in told if e["event"] == "linear"]
    assert {"LegalizeOps", "generating code", "linking"} <= {e["name"] for e in rows["build"]}
    for row in rows.values():  # nothing overlaps, and viewers can draw it
        for a, b in itertools.pairwise(row):
            assert a["ts"] + a["dur"] <= b["ts"] + 0.01
    stage = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in rows["stages"]}
    assert all(stage["build"][0] <= e["ts"] <= stage["build"][1] for e in rows["build"])
    assert abs(rows["stages"][0]["dur"] / 1e6 - done["seconds"]["open"]) < 0.2


def test_the_artifact_holds_no_times(compiled: Any) -> None:
    manifest = (compiled.artifact / "manifest.json").read_text()
    assert "seconds" not in manifest and str(time.gmtime().tm_year) not in re.sub(r'"[0-9a-f]{64}"', "", manifest)


def result(name: str, reports: list[LinearReport]) -> CompileResult:
    plan = Plan(name, "llama", 10, 8, len(reports), 10, 20, 5, 4.0, 1000, {"calibration": name, "buckets": [1, 2]})
    return CompileResult(Path("out"), plan, {"open": 1.0, "build": 2.0}, reports)


def report(name: str, error: float | None, note: str | None = None) -> LinearReport:
    return LinearReport(name, (4, 8), 4, 8, "gptq", error, error, 0.01, 0, note, 0.5)


def test_a_browser_shows_it(compiled: Any, tmp_path: Path) -> None:
    module = load_module("browser", Path(__file__).parents[1] / "serve" / "browser.py")
    program = module.find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine")
    browser = module.Browser(program, tmp_path / "profile")
    try:
        address = (compiled.artifact / "report.html").as_uri()
        browser.call("Page.navigate", url=address)
        browser.wait("document.readyState === 'complete' && document.title.includes('tiny')")
        assert browser.requested == [address] and browser.complaints == []
        quantize = "[...document.querySelectorAll('summary')].find(s => s.innerText.includes('gptq_quantize'))"
        shown = f"{quantize}.parentNode.querySelector('pre').checkVisibility()"
        assert not browser.evaluate(shown)
        browser.evaluate(f"{quantize}.click()")
        assert browser.evaluate(shown)
        # Bars are drawn in proportion, and nothing is wider than the page.
        widths = "[...document.querySelectorAll('.bars i')].map(i => i.getBoundingClientRect().width)"
        assert browser.evaluate(f"Math.max(...{widths})") > 50 * browser.evaluate(f"Math.min(...{widths})")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        picture = Path(os.environ.get("GPTQ_COMPILE_REPORT_SCREENSHOT", tmp_path / "report.png"))
        browser.screenshot(picture)
        assert picture.stat().st_size > 5000
    finally:
        browser.close()


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script><img src=x>&\"'$title"
    with Recorder(Silent()) as run:
        run.note(bad)
        for _ in range(2):
            run.linear(report(bad, 0.1, bad), 1, 2)
        ended = PassRecord(bad, 0.5, True, 1, 2, None)
        run.pass_ends(ended, "the same\n", f"{bad}\n")
    made = replace(result(bad, [report(bad, 0.1, bad), report(bad, None, bad)]), passes=[ended])
    paths = [tmp_path / "deep" / "r.html", tmp_path / "copy.html"]
    write_report(paths, page(made, run))
    assert paths[1].read_bytes() == paths[0].read_bytes()
    found = read((tmp_path / "deep" / "r.html").read_text())
    assert json.loads(found.data)["model"] == bad
    rows = [row for row in found.rows if row[0] == bad]
    assert [row[4] for row in rows] == ["0.1", "not measured"] and rows[0][-1] == bad
    write_report(paths, page(made, run))
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
