# SPDX-License-Identifier: Apache-2.0
"""Where an artifact's report is, and the figures that can be read back from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

REPORT = "report.html"
_DATA = re.compile(rb'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def stored_figures(folder: Path) -> dict[str, Any]:
    """The figures of a report in an artifact's folder; none if there is no such report.

    The manifest does not list the report, since times differ from run to run, so it may be missing or anything else.
    """
    try:
        found = _DATA.search((folder / REPORT).read_bytes())
        figures = json.loads(found.group(1)) if found else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return figures if isinstance(figures, dict) else {}
