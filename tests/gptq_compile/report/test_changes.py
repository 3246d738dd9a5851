# SPDX-License-Identifier: Apache-2.0
"""Diffs of programs: what is folded is what repeats, and what is folded can be told from what is shown."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from gptq_compile.report.changes import MARK, changes, folded


def layers(count: int, op: str) -> str:
    lines = ["%x: f32[1, n, 8] = embedding(table)"]
    for i in range(count):
        suffix = f"_{i}" if i else ""
        lines += [
            f"%norm{suffix}: f32[1, n, 8] = rms_norm(%x)  # layers.{i}.norm",
            f"%gate{suffix}: f32[1, n, 16] = {op}(%norm{suffix}, layers.{i}.gate.weight)  # layers.{i}",
            f"%down{suffix}: f32[1, n, 8] = {op}(%gate{suffix}, layers.{i}.down.weight)  # layers.{i}",
        ]
    return "\n".join([*lines, "return %x"])


def test_equal_programs_have_no_changes() -> None:
    assert changes(layers(3, "linear"), layers(3, "linear")) == ()


def test_layers_that_are_alike_stand_once() -> None:
    few, many = (changes(layers(n, "linear"), layers(n, "quant_linear")) for n in (3, 90))
    assert len(many) == len(few)
    assert sum(line.startswith("-") for line in many) == sum(line.startswith("+") for line in many) == 2
    [mark] = [line for line in many if line.startswith(MARK)]
    assert "89 more times" in mark


def test_a_layer_that_differs_is_shown() -> None:
    before = layers(40, "linear")
    after = before.replace("layers.17.gate.weight", "layers.17.gate.other")
    lines = changes(before, after)
    assert any("gate.other" in line and line.startswith("+") for line in lines) and len(lines) < 10
    wider = before.replace("%gate_17: f32[1, n, 16]", "%gate_17: f32[1, n, 32]")
    assert sum("n, 32]" in line for line in folded(wider.splitlines())) == 1  # sizes are not numbers of layers


def test_long_changes_are_cut() -> None:
    words = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(300)]
    lines = changes("", "\n".join(words), most=100)
    assert len(lines) == 101 and lines[-1].startswith(f"{MARK} 201 more lines")  # 300 and the head of the hunk


@given(st.lists(st.sampled_from(["a_1", "a_2", "b_7", "c.3.d", "c.4.d", "e"]), max_size=40))
def test_folding_keeps_every_line_in_number(lines: list[str]) -> None:
    total, block = 0, 0
    for line in folded(lines):
        if line.startswith(MARK):
            match = re.search(r"(this line|these (\d+) lines) (\d+) more times", line)
            assert match is not None
            total += int(match[2] or 1) * int(match[3])
            assert int(match[2] or 1) <= block
            continue
        block, total = block + 1, total + 1
    assert total == len(lines)
