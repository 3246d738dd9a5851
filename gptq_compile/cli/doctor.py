# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile doctor``: what this machine can do, and how to mend what it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gptq_compile.cli.output import json_line, show
from gptq_compile.cli.parser import Parser
from gptq_compile.doctor import Finding, examine
from gptq_compile.kernels.target import Target

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "missing": ("MISSING", "bold red")}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 0, or 1 if something needed is missing."""
    p = Parser(
        prog="gptq-compile doctor",
        description="Looks at this machine. Exit code 1 if something is missing that the target needs.",
    )
    p.add_argument("--target", default="cpu", metavar="T", help="what is to be compiled (default: cpu)")
    p.add_argument("--runtime-only", action="store_true", help="look only at what running compiled models needs")
    p.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where artifacts will go (default: here)")
    p.add_argument("--json", action="store_true", help="findings as JSON lines")
    arguments = p.parse_args(argv)
    target = Target.parse(arguments.target)
    findings = examine(None if arguments.runtime_only else target, arguments.folder)
    missing = [f for f in findings if f.status == "missing"]
    if arguments.json:
        for finding in findings:
            json_line(dataclasses.asdict(finding))
    else:
        _print(findings)
        purpose = "run compiled models" if arguments.runtime_only else f"compile for {target}"
        if missing:
            print(f"This machine cannot {purpose} yet: {', '.join(f.name for f in missing)}.")
        else:
            print(f"This machine can {purpose}.")
    return 1 if missing else 0


def _print(findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.status]
        words = Text(finding.found)
        if finding.mend:
            words.append(f"\n-> {finding.mend}", style="italic")
        table.add_row(Text(mark, style=style), finding.name, words)
    show(table)
