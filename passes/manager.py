# SPDX-License-Identifier: Apache-2.0
"""Runs a list of passes over a program: verifies, validates, times, dumps and reports."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from gptq_compile.errors import GptqCompileError, PassError
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.program import Program
from gptq_compile.passes.text import to_text
from gptq_compile.passes.verify import verify

log = logging.getLogger(__name__)

_VALIDATE_TOKENS = 12


class Pass:
    """One rewrite of the program, in place.

    Class attributes:
        name: snake_case, the file's name.
        preserves: whether the program computes the same logits before and after, so that translation validation
            applies; ``tolerance`` is the allowed NMSE between the two.
    """

    name: ClassVar[str]
    preserves: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-9

    def requires(self, program: Program) -> None:
        """Raises PassError if the program is not one this pass can take."""

    def run(self, program: Program) -> bool:
        """Rewrites the program and returns whether it changed."""
        raise NotImplementedError

    def ensures(self, program: Program) -> None:
        """Raises PassError if the rewrite did not establish what later passes rely on."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    seconds: float
    modified: bool
    nodes_before: int
    nodes_after: int
    nmse: float | None


@dataclass
class PassManager:
    """Runs passes in order.

    Args:
        passes: the pipeline.
        validate: run the program's reference before and after every meaning-preserving pass on the same tokens and
            compare the logits. Costs two short forward passes a pass.
        dump_ir: folder for ``NN_after_<pass>.txt`` dumps (and ``00_input.txt``).
        first_index: passes that ran before, so that dumps are numbered on.
        stop_after: name of the last pass to run.
        reproducer: folder to write when a pass fails: the IR before it, the error and the pipeline.
        on_pass: called with the name of each pass before it starts.
        on_text: called after each pass with its record and the program's text before and after.
    """

    passes: Sequence[Pass]
    validate: bool = True
    dump_ir: Path | None = None
    first_index: int = 0
    stop_after: str | None = None
    reproducer: Path | None = None
    on_pass: Callable[[str], None] | None = None
    on_text: Callable[[PassRecord, str, str], None] | None = None
    records: list[PassRecord] = field(default_factory=list)

    def run(self, program: Program) -> Program:
        """Runs the pipeline on ``program`` in place and returns it.

        Raises:
            PassError: if a pass breaks the IR's rules or changes the meaning; names the pass.
            GptqCompileError: what a pass raised itself.
        """
        if self.stop_after is not None and self.stop_after not in (known := [p.name for p in self.passes]):
            raise PassError(f"There is no pass called {self.stop_after!r}. The pipeline has: {', '.join(known)}.")
        verify(program)
        text = self._text(program)
        if self.first_index == 0:
            self._dump(text, 0, "input")
        logits = self._logits(program)
        for index, step in enumerate(self.passes, self.first_index + 1):
            if self.on_pass:
                self.on_pass(step.name)
            before = text
            nodes = len(program.graph.nodes)
            start = time.perf_counter()
            try:
                step.requires(program)
                modified = step.run(program)
                step.ensures(program)
                verify(program)
                seconds = time.perf_counter() - start
                nmse = None
                if modified and self.validate:
                    after = self._logits(program)
                    nmse = self._compare(step, logits, after)
                    logits = after
            except Exception as e:
                self._write_reproducer(step, before, e)
                if isinstance(e, GptqCompileError):
                    raise
                raise PassError(f"Pass {step.name} failed: {type(e).__name__}: {e}") from e
            self.records.append(PassRecord(step.name, seconds, modified, nodes, len(program.graph.nodes), nmse))
            log.info("pass %-20s %6.2f s  %s", step.name, seconds, "changed" if modified else "no change")
            text = self._text(program)
            self._dump(text, index, f"after_{step.name}")
            if self.on_text:
                self.on_text(self.records[-1], before, text)
            if step.name == self.stop_after:
                break
        return program

    def _logits(self, program: Program) -> torch.Tensor | None:
        if not self.validate:
            return None
        generator = torch.Generator().manual_seed(0)
        count = min(_VALIDATE_TOKENS, program.info.context_length)
        return evaluate(program, torch.randint(0, program.info.vocab_size, (count,), generator=generator))

    def _compare(self, step: Pass, before: torch.Tensor | None, after: torch.Tensor | None) -> float | None:
        if before is None or after is None:
            return None
        if not torch.isfinite(after).all():
            raise PassError(f"After pass {step.name} the program's logits are not finite.")
        nmse = float(
            (after.double() - before.double()).square().sum() / before.double().square().sum().clamp_min(1e-30)
        )
        if step.preserves and nmse > step.tolerance:
            raise PassError(
                f"Pass {step.name} changed what the program computes: logits differ by NMSE {nmse:.2e}, "
                f"allowed {step.tolerance:.0e}."
            )
        return nmse

    def _text(self, program: Program) -> str:
        """The program as text, if anybody is to see it."""
        wanted = self.dump_ir is not None or self.reproducer is not None or self.on_text is not None
        return to_text(program) if wanted else ""

    def _dump(self, text: str, index: int, what: str) -> None:
        if self.dump_ir is not None:
            self.dump_ir.mkdir(parents=True, exist_ok=True)
            (self.dump_ir / f"{index:02d}_{what}.txt").write_text(text)

    def _write_reproducer(self, step: Pass, before: str, error: Exception) -> None:
        if self.reproducer is None:
            return
        self.reproducer.mkdir(parents=True, exist_ok=True)
        (self.reproducer / "before.txt").write_text(before)
        (self.reproducer / "error.txt").write_text("".join(traceback.format_exception(error)))
        summary: dict[str, Any] = {
            "failed": step.name,
            "ran": [r.name for r in self.records],
            "torch": torch.__version__,
        }
        (self.reproducer / "pipeline.json").write_text(json.dumps(summary, indent=2))
