# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile inspect``: what is in a compiled model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gptq_compile.cli.output import json_line, show, size
from gptq_compile.cli.parser import Parser
from gptq_compile.inspect_artifact import Inspection, counted, inspect_artifact
from gptq_compile.report.stored import REPORT

# Sections of the manifest that are told in other words.
_LISTS = ("weights", "files", "kernels", "refused_together", "translated")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    p = Parser(prog="gptq-compile inspect", description="What a compiled model is made of. Nothing in it is executed.")
    p.add_argument("artifact", metavar="OUT", help="the folder that gptq-compile wrote")
    p.add_argument(
        "--layers", type=int, default=10, metavar="N", help="show the N worst layers, 0 for all (default: 10)"
    )
    p.add_argument("--verify", action="store_true", help="check the sha256 of every file")
    p.add_argument("--json", action="store_true", help="everything as one JSON object")
    arguments = p.parse_args(argv)
    found = inspect_artifact(arguments.artifact, verify=arguments.verify)
    if arguments.json:
        json_line(as_json(found))
        return 0
    _print(found, arguments.layers, verified=arguments.verify)
    return 0


def as_json(found: Inspection) -> dict[str, Any]:
    """The inspection as plain values, with the manifest's sections but its per-file lists."""
    raw = {k: v for k, v in found.manifest.raw.items() if k not in _LISTS}
    raw["quantization"] = {k: v for k, v in raw.get("quantization", {}).items() if k != "layers"}
    return {
        "folder": str(found.folder),
        "size": found.size,
        "sizes": dict(found.sizes),
        "dtypes": {k: {"tensors": n, "bytes": b} for k, (n, b) in found.dtypes.items()},
        "cache_bytes_per_token": found.cache_bytes_per_token,
        "layers": [dataclasses.asdict(layer) for layer in found.layers],
        "kernels": {k: list(v) for k, v in found.kernels.items()},
        "refused": {k: dict(v) for k, v in found.refused.items()},
        "choices": [dataclasses.asdict(choice) for choice in found.choices],
        "refused_together": [dataclasses.asdict(choice) for choice in found.together],
        "translated": {k: dict(v) for k, v in found.translated.items()},
        "passes": [dataclasses.asdict(step) for step in found.passes],
        "build": dict(found.build),
        "manifest": raw,
    }


def _print(found: Inspection, shown: int, verified: bool) -> None:
    m, raw = found.manifest, found.manifest.raw
    model = raw["model"]
    chat = "yes" if m.chat else "no"
    about = {
        "model": f"{m.name} ({model.get('model_type', '?')}) from {model.get('source', '?')}",
        "target": f"{m.target_kind}: {', '.join(m.archs)}; activations {m.dtype}",
        "quantization": _settings(raw.get("quantization", {})),
        "context": f"{m.context_length} tokens, vocabulary {m.vocab_size}, chat template: {chat}",
        "KV cache": f"{size(found.cache_bytes_per_token)} a token ({m.cache_dtype}, pages of {m.page_size})",
        "decode batches": ", ".join(map(str, sorted(m.decode))),
        "size": f"{size(found.size)}: " + ", ".join(f"{k} {size(v)}" for k, v in found.sizes.items()),
        "weights": ", ".join(f"{n} {k} ({size(b)})" for k, (n, b) in found.dtypes.items()),
        "made by": ", ".join(f"{k} {v}" for k, v in raw.get("versions", {}).items() if v),
        "files": f"{len(m.files)}, all there" + (", every sha256 as written" if verified else ""),
    }
    _table("", (), list(about.items()))
    _print_layers(found, shown)
    if found.choices:
        chosen = [(c.op, c.name, c.where or "not counted", "\n".join(c.why)) for c in found.choices]
        _table("kernels", ("op", "kernel", "calls", "faster ones that refused"), chosen)
    if found.together:
        _table("not computed together", ("op", "refused"), [(c.op, "\n".join(c.why)) for c in found.together])
    if found.translated:
        others = [(op, counted(calls)) for op, calls in found.translated.items()]
        _table("ops that TVM makes kernels for", ("op", "times"), others)
    _print_times(found)


def _print_times(found: Inspection) -> None:
    if not found.passes:
        print(f"No pass times: {found.folder / REPORT} is not there, or of an earlier version.")
        return
    rows = [
        (p.name, f"{p.seconds:.2f} s", f"{p.nodes[0]} to {p.nodes[1]}" if p.changed else "no change")
        for p in found.passes
    ]
    _table("passes", ("pass", "time", "nodes"), rows)
    slowest = sorted(found.build.items(), key=lambda step: -step[1])[:5]
    _table("slowest steps of the build", ("step", "time"), [(name, f"{t:.2f} s") for name, t in slowest])
    print(f"What each pass changed: {found.folder / REPORT}")


def _print_layers(found: Inspection, shown: int) -> None:
    measured = [(x.error, x) for x in found.layers if x.error is not None]
    if not measured:
        print(f"{len(found.layers)} linears, rounded without measuring an error.\n")
        return
    mean = sum(error for error, _ in measured) / len(measured)
    baseline = [x.error_rtn for _, x in measured if x.error_rtn is not None]
    rounding = sum(baseline) / max(1, len(baseline))
    worst = sorted(measured, key=lambda pair: -pair[0])
    worst = worst[:shown] if shown > 0 else worst
    rows = [
        (
            x.name, "x".join(map(str, x.shape)), str(x.bits), str(x.group_size), x.method, f"{error:.3g}",
            "" if x.error_rtn is None else f"{x.error_rtn:.3g}", "" if x.damp is None else f"{x.damp:g}", x.note or "",
        )
        for error, x in worst
    ]  # fmt: skip
    title = f"{len(worst)} worst of {len(found.layers)} linears; mean error {mean:.3g}, of rounding {rounding:.3g}"
    _table(title, ("linear", "shape", "bits", "group", "method", "error", "rounding", "damp", "note"), rows)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False,
        show_header=bool(headings),
    )  # fmt: skip
    for heading in headings or ("", ""):
        table.add_column(heading, overflow="fold")
    for row in rows:
        # Text, because names and notes may hold brackets, which rich would take for markup.
        table.add_row(*(Text(cell) for cell in row))
    show(table)


def _settings(q: dict[str, Any]) -> str:
    group = q.get("group_size")
    words = [
        f"{q['budget']['bits_per_weight']:.3f} bits a weight on average"
        if "budget" in q
        else f"{q.get('wbits', '?')} bits",
        "one group per row" if group == -1 else f"groups of {group}",
        "symmetric" if q.get("sym") else "asymmetric",
        str(q.get("method", "?")).upper(),
    ]
    if q.get("method") == "gptq":
        words += ["act-order"] if q.get("act_order") else []
        words += [f"damp {q.get('damp')}", f"sequential {q.get('sequential')}"]
        words += [f"calibrated on {q.get('nsamples')} x {q.get('seqlen')} tokens of {q.get('calibration')}"]
        if (tuning := q.get("tuning")) and not tuning["kept_untuned"]:
            words += [
                f"scales tuned in {tuning['epochs']} epochs, divergence {tuning['divergence_before']:.3g} -> "
                f"{tuning['divergence_after']:.3g} nats a token"
            ]
    return ", ".join(words)
