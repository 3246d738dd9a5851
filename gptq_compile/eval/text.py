# SPDX-License-Identifier: Apache-2.0
"""Texts to evaluate on: files and data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptq_compile.errors import ConfigError

_SEPARATOR = "\n\n"  # WikiText's documents are joined like this in every GPTQ paper


def read_text(file: str) -> str:
    """The text of a UTF-8 file; of a ``.jsonl`` file the ``text`` fields, joined with blank lines.

    Raises:
        ConfigError: if it cannot be read or holds no text.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}). Convert it first.") from e
    except OSError as e:
        raise ConfigError(f"The text {path} cannot be read: {e.strerror or e}.") from e
    if path.suffix == ".jsonl":
        text = _SEPARATOR.join(_field(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line)
    if not text.strip():
        raise ConfigError(f"The text {path} is empty.")
    return text


def _field(line: str, number: int, path: Path) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f'Line {number} of {path} is not a JSON object with a "text" field.') from e
    return str(text)


def dataset_text(spec: str, split: str = "test") -> str:
    """The text of a ``datasets`` name, as ``NAME[:CONFIG][:SPLIT]``, joined with blank lines.

    Args:
        spec: the data set; a local folder works too.
        split: the split if the spec names none.

    Raises:
        ConfigError: if it cannot be loaded or has no text column.
    """
    name, _, rest = spec.partition(":")
    config, _, chosen = rest.partition(":")
    try:
        import datasets
    except ImportError as e:
        raise ConfigError(
            "Data sets need the datasets package: pip install datasets. Or give a file with --text."
        ) from e
    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(name, config or None, split=chosen or split)
    except Exception as e:  # network, hub, name, config and split each raise their own class
        lines = [line for line in str(e).splitlines() if line.strip()]
        raise ConfigError(
            f"The data set {spec} cannot be loaded: {lines[0].strip().rstrip('.') if lines else type(e).__name__}. "
            "Write it as NAME[:CONFIG][:SPLIT], or give a file with --text."
        ) from e
    columns = [c for c, f in rows.features.items() if getattr(f, "dtype", None) in ("string", "large_string")]
    if not columns:
        raise ConfigError(f"The data set {spec} has no text column; it has {', '.join(rows.features)}.")
    text = _SEPARATOR.join(rows["text" if "text" in columns else columns[0]])
    if not text.strip():
        raise ConfigError(f"The data set {spec} has no text.")
    return text
