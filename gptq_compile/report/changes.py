# SPDX-License-Identifier: Apache-2.0
"""What a pass did to the IR, short enough to read: a unified diff in which layers that are alike stand once."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence

MARK = "\u22ee"  # begins the lines that stand for left out ones
_CONTEXT = 2
_MOST = 400
# Numbers that differ from layer to layer: the suffix of a value's name and the index of a module. Sizes stay.
_SUFFIX, _INDEX, _PLACE = re.compile(r"_\d+\b"), re.compile(r"\.\d+(?=\.|$)"), re.compile(r"^@@.*")


def changes(before: str, after: str, most: int = _MOST) -> tuple[str, ...]:
    """The lines of a unified diff of two programs' texts; none if they are equal.

    Args:
        before: as :func:`gptq_compile.passes.text.to_text` writes it. ``after``: likewise.
        most: lines to keep; a last one says how many are missing.
    """
    old, new = before.splitlines(), after.splitlines()
    lines = folded(list(difflib.unified_diff(old, new, n=_CONTEXT, lineterm=""))[2:])
    if len(lines) > most:
        lines[most:] = [f"{MARK} {len(lines) - most} more lines; --dump-ir DIR writes the programs whole"]
    return tuple(lines)


def folded(lines: Sequence[str]) -> list[str]:
    """Leaves out what repeats: blocks of lines that are equal but for numbers in names stand once, with a count."""
    keys = [_PLACE.sub("@@", _SUFFIX.sub("", _INDEX.sub(".#", line))) for line in lines]
    places: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        places[key].append(i)
    out: list[str] = []
    i = 0
    while i < len(lines):
        period, times = _repetition(keys, i, places[keys[i]])
        if period * (times - 1) > 1:
            out += lines[i : i + period]
            what = "this line" if period == 1 else f"these {period} lines"
            out.append(f"{MARK} {what} {times - 1} more times, with other numbers in the names")
            i += period * times
        else:
            out.append(lines[i])
            i += 1
    return out


def _repetition(keys: Sequence[str], start: int, places: Sequence[int]) -> tuple[int, int]:
    """(lines of a block, how often it stands at ``start``) such that as many lines as possible are left out."""
    best, saved = (1, 1), 0
    for place in places:
        period = place - start
        if period <= 0:
            continue
        same = 0
        while place + same < len(keys) and keys[start + same] == keys[place + same]:
            same += 1
        times = 1 + same // period
        if period * (times - 1) > saved:
            best, saved = (period, times), period * (times - 1)
    return best
