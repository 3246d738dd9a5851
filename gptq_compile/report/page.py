# SPDX-License-Identifier: Apache-2.0
"""The report: settings, sizes, stages, passes and what they changed, kernels, every linear, plots.

Wall-clock times live here and not in the files that the manifest lists, whose bytes are to depend on the inputs alone.
The figures are also in the page as JSON, under the id ``data``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from time import gmtime, strftime
from typing import TYPE_CHECKING, Any

from gptq_compile.artifact.files import create, human
from gptq_compile.inspect_artifact import Inspection, counted
from gptq_compile.report.changes import MARK
from gptq_compile.report.plots import Series, plot
from gptq_compile.report.record import Recorder

if TYPE_CHECKING:
    from gptq_compile.api import CompileResult
    from gptq_compile.passes.manager import PassRecord

_PAGE = Template("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #6a737d; --line: #d8dee4; --page: #ffffff;
  --a: #0b69c7; --b: #c2570c; --c: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #8b949e; --line: #30363d; --page: #0d1117;
  --a: #58a6ff; --b: #f0883e; --c: #56d364; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .2rem .7rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; } .none, figcaption, .soft { color: var(--soft); }
figure { margin: .5rem 0; } svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } polyline { fill: none; stroke-width: 1.6; }
.s0 { fill: var(--a); stroke: var(--a); color: var(--a); } .s1 { fill: var(--b); stroke: var(--b); color: var(--b); }
.s2 { fill: var(--c); stroke: var(--c); color: var(--c); } polyline { fill: none !important; }
.bars { font-size: .85rem; } .bars summary, .bars div { display: grid; column-gap: .8rem; align-items: center;
  grid-template-columns: 15rem 1fr 4.5rem 21rem; padding: .2rem 0; border-bottom: 1px solid var(--line); }
.bars summary { cursor: pointer; } .bars summary > :first-child::before { content: "\\25B8 "; color: var(--soft); }
.bars details[open] > summary > :first-child::before { content: "\\25BE "; }
.bars div > :first-child { padding-left: .95em; } .bars > * > * { overflow-wrap: anywhere; }
.bars i { display: block; height: .6rem; background: var(--a); min-width: 1px; }
.bars b { font-weight: normal; text-align: right; font-variant-numeric: tabular-nums; }
pre { font: 12px/1.4 ui-monospace, monospace; overflow: auto; max-height: 34rem; margin: .3rem 0 .8rem; padding: .5rem;
  border: 1px solid var(--line); } pre ins, pre del, pre em { text-decoration: none; font-style: normal; }
pre ins { color: var(--c); } pre del { color: var(--b); } pre em { color: var(--a); }
</style></head><body>
<h1>$title</h1>
<p class="soft">$subtitle</p>
$notes
$sizes
<h2>Error of every linear</h2>
<p class="soft">Squared output error on the calibration tokens, relative to the output's own energy; a logarithmic
scale, linears in graph order. Rounding is plain rounding to nearest on the same grid settings.</p>
$errors
<h2>Bits of every linear</h2>
$bits
<h2>Time</h2>
$time
<h2>Memory</h2>
$memory
<h2>Stages</h2>
$stages
<h2>Passes</h2>
<p class="soft">A click shows what a pass changed in the program, as a unified diff in which layers that are alike
stand once. Times are without validation.</p>
$passes
$kernels
<h2>Settings</h2>
$settings
<h2>Linears</h2>
<div class="wide">$linears</div>
<script type="application/json" id="data">$data</script>
</body></html>
""")

_KIND = {"artifact": "artifact", "onnx": "export"}


def write_report(paths: Iterable[Path], text: str) -> None:
    """Writes a page to each of some files; one that is there is replaced whole.

    Raises:
        OSError: it cannot be written.
    """
    for path in paths:
        path = path.expanduser().absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with create(temporary) as f:
                f.write(text.encode())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def page(result: CompileResult, run: Recorder, made: Inspection | None = None) -> str:
    """The report as HTML; ``made`` is the artifact, if it is one."""
    plan, reports = result.plan, result.reports
    peak = max((s.resident for s in run.samples), default=0)
    device = max((s.device for s in run.samples), default=0)
    names = [r.name for r in reports]
    both = [r for r in reports if r.error is not None and r.error_rtn is not None]
    worse = sum(r.error > r.error_rtn * 1.0001 for r in both)  # type: ignore[operator]
    subtitle = [
        f"{plan.model_type}, {plan.parameters / 1e6:,.1f} million parameters, {plan.linears} linears quantized",
        f"{_KIND.get(result.format, 'checkpoint')} {human(result.size)} in {result.out.name if result.out else None}",
        strftime("%Y-%m-%d %H:%M UTC", gmtime(run.began)),
    ]
    if both:
        mean, rtn = (sum(getattr(r, k) for r in both) / len(both) for k in ("error", "error_rtn"))
        subtitle.insert(1, f"mean error {mean:.3g} against {rtn:.3g} of rounding, {worse} linears worse than rounding")
    memory = [Series("process, in memory (GB)", [(s.seconds, s.resident / 1e9) for s in run.samples], line=True)]
    if device:
        memory.append(Series("tensors on the GPU (GB)", [(s.seconds, s.device / 1e9) for s in run.samples], line=True))
    return _PAGE.substitute(
        title=escape(f"gptq-compile: {plan.name}"),
        subtitle=escape("; ".join(subtitle)),
        notes="".join(f"<p>{escape(n)}</p>" for n in run.notes if "calibration tokens" not in n),
        errors=plot(
            [
                Series("as quantized", _points(r.error for r in reports), _labels(names, [r.error for r in reports])),
                Series(
                    "rounding", _points(r.error_rtn for r in reports), _labels(names, [r.error_rtn for r in reports])
                ),
            ],
            "linear",
            "relative error",
            log=True,
        ),
        bits=plot(
            [Series("bits of a code", _points(r.bits for r in reports), _labels(names, [r.bits for r in reports]))],
            "linear",
            "bits",
        ),
        time=plot(
            [Series("linears finished", [(t, i + 1) for i, t in enumerate(run.solved)], line=True)],
            "seconds",
            "linears",
        ),
        memory=plot(memory, "seconds", "GB")
        + f'<p class="soft">Peak {human(peak)} in memory{f", {human(device)} on the GPU" if device else ""} '
        + f"(sampled); predicted for the quantization: {human(plan.memory)}.</p>",
        sizes="" if made is None else _sizes(made),
        stages=_bars(Bar(n, s) for n, s in result.seconds.items()),
        passes=_passes(result.passes, run),
        kernels="" if made is None else _kernels(made, run.build),
        settings=_table(["setting", "value"], ([k, _plain(v)] for k, v in plan.settings.items())),
        linears=_table(
            [
                "linear",
                "shape",
                "#bits",
                "#group",
                "#error",
                "#rounding",
                "#damp",
                "#dead",
                "method",
                "#seconds",
                "note",
            ],
            (
                [
                    r.name,
                    " x ".join(map(str, r.shape)),
                    str(r.bits),
                    str(r.group_size),
                    _figure(r.error),
                    _figure(r.error_rtn),
                    f"{r.damp:g}",
                    str(r.dead_columns),
                    r.method,
                    f"{r.seconds:.3f}",
                    r.note or "",
                ]
                for r in reports
            ),
        ),
        data=_data(result, run, peak, device),
    )


def _sizes(made: Inspection) -> str:
    weights = ", ".join(f"{count} {name} ({human(size)})" for name, (count, size) in made.dtypes.items())
    rows = [[part, human(size), weights if part == "weights" else ""] for part, size in made.sizes.items()]
    cache = ["KV cache", human(made.cache_bytes_per_token), "a token, in memory while it runs"]
    return "<h2>Sizes</h2>" + _table(["part", "#size", "tensors"], [*rows, ["all files", human(made.size), ""], cache])


@dataclass(frozen=True)
class Bar:
    """A time with what there is to say about it: ``lines`` are shown when it is unfolded."""

    name: str
    seconds: float
    words: str = ""
    lines: Sequence[str] = ()


def _bars(bars: Iterable[Bar]) -> str:
    """A list of times, as bars on one scale."""
    bars = list(bars)
    longest = max((b.seconds for b in bars), default=0.0) or 1.0
    out = []
    for bar in bars:
        row = f'<span>{escape(bar.name)}</span><i style="width:{100 * bar.seconds / longest:.1f}%"></i>'
        row += f"<b>{bar.seconds:.2f} s</b><span>{escape(bar.words)}</span>"
        text = "\n".join(map(_coloured, bar.lines))
        out.append(f"<details><summary>{row}</summary><pre>{text}</pre></details>" if text else f"<div>{row}</div>")
    return f'<section class="bars">{"".join(out)}</section>'


def _coloured(line: str) -> str:
    tag = {"+": "ins", "-": "del", "@": "em", MARK: "em"}.get(line[:1])
    return escape(line) if tag is None else f"<{tag}>{escape(line)}</{tag}>"


def _passes(records: Sequence[PassRecord], run: Recorder) -> str:
    bars = []
    for record, lines in zip(records, run.changes, strict=True):
        words = (
            f"{record.nodes_before} to {record.nodes_after} nodes"
            if lines
            else f"{record.nodes_after} nodes, no change"
        )
        if record.nmse is not None:
            words += f", logits differ by NMSE {record.nmse:.0e}" if record.nmse else ", same logits"
        bars.append(Bar(record.name, record.seconds, words, lines))
    texts = {"before": "The program as it was traced", "after": "The program after the last pass"}
    programs = [
        f"<details><summary>{texts[which]}</summary><pre>{escape(chr(10).join(lines))}</pre></details>"
        for which, lines in run.texts.items()
    ]
    return _bars(bars) + "".join(programs)


def _kernels(made: Inspection, build: Mapping[str, float]) -> str:
    heads = ["op", "kernel", "calls", "#cases", "faster ones that refused"]
    rows = [[c.op, c.name, c.where, str(len(c.cases)), _sentences(c.why)] for c in made.choices]
    apart = [[c.op, str(len(c.cases)), _sentences(c.why)] for c in made.together]
    rest = [[op, counted(calls)] for op, calls in made.translated.items()]
    out = [
        '<h2>Kernels</h2><p class="soft">Every op takes the first kernel of its list that does not refuse; '
        "cases are combinations of shapes, types and rows.</p>",
        _wide(_table(heads, rows)),
    ]
    if apart:
        out.append('<h2>Not computed together</h2><p class="soft">One kernel could have computed several ops here; it ')
        out.append("refused, and they have a kernel each.</p>" + _wide(_table(["op", "#cases", "refused"], apart)))
    if rest:
        out.append('<h2>Ops that TVM makes kernels for</h2><p class="soft">They are fused with their neighbours.</p>')
        out.append(_wide(_table(["op", "times"], rest)))
    return "".join((*out, "<h2>Steps of the build</h2>", _steps(build)))


def _steps(build: Mapping[str, float]) -> str:
    """The steps of a build, the short ones together."""
    short = [name for name, seconds in build.items() if seconds < 0.01 * sum(build.values())]
    bars = [Bar(name, seconds) for name, seconds in build.items() if name not in short]
    if short:
        lines = [f"{build[name]:6.2f} s  {name}" for name in short]
        bars.append(Bar(f"{len(short)} others", sum(build[name] for name in short), "less than 1 % each", lines))
    return _bars(bars)


def _sentences(parts: Iterable[str]) -> str:
    return " ".join(f"{part.rstrip('.')}." for part in parts)


def _wide(table: str) -> str:
    return f'<div class="wide">{table}</div>'


def _data(result: CompileResult, run: Recorder, peak: int, device: int) -> str:
    """All figures as JSON that cannot end the element it stands in."""
    document = {
        "model": result.plan.name,
        "settings": result.plan.settings,
        "seconds": result.seconds,
        "predicted_memory": result.plan.memory,
        "peak_memory": peak,
        "peak_device_memory": device,
        "notes": run.notes,
        "passes": [asdict(p) for p in result.passes],
        "build": run.build,
        "linears": [asdict(r) for r in result.reports],
        "solved_at": [round(t, 3) for t in run.solved],
        "memory": [[round(s.seconds, 2), s.resident, s.device] for s in run.samples],
    }
    return json.dumps(document, default=str).replace("<", "\\u003c")


def _points(values: Iterable[float | None]) -> list[tuple[float, float]]:
    return [(i + 1, math.nan if v is None else v) for i, v in enumerate(values)]


def _labels(names: list[str], values: Iterable[float | None]) -> list[str]:
    return [f"{name}: {_figure(value)}" for name, value in zip(names, values, strict=True)]


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A table; columns whose head starts with # hold numbers."""
    kinds = [' class="n"' if h.startswith("#") else "" for h in heads]
    out = ["<table><thead><tr>"]
    out += [f"<th{kind}>{escape(h.removeprefix('#'))}</th>" for h, kind in zip(heads, kinds, strict=True)]
    out.append("</tr></thead><tbody>")
    for row in rows:
        out.append("<tr>" + "".join(f"<td{k}>{escape(c)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>")
    out.append("</tbody></table>")
    return "".join(out)
