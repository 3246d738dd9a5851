# SPDX-License-Identifier: Apache-2.0
"""Where log records go: warnings to stderr as lines, more with -v; other libraries stay quiet."""

from __future__ import annotations

import logging
import os
import sys

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _Lines(logging.Formatter):
    """``warning: words``; with -v also the module."""

    def __init__(self, verbose: bool) -> None:
        super().__init__()
        self._verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        origin = f" [{record.name.removeprefix('gptq_compile.')}]" if self._verbose else ""
        text = f"{record.levelname.lower()}:{origin} {record.getMessage()}"
        if record.exc_info and self._verbose:
            text += "\n" + self.formatException(record.exc_info)
        return text


def set_up_logging(verbosity: int) -> None:
    """Sends this project's log records to stderr.

    Args:
        verbosity: 0 warnings, 1 what is done, 2 everything.
    """
    logger = logging.getLogger("gptq_compile")
    for handler in list(logger.handlers):
        if isinstance(handler, logging.StreamHandler) and isinstance(handler.formatter, _Lines):
            logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(verbosity > 0))
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[min(verbosity, 2)])
    logger.propagate = False
    # Their advice is about their own API; errors still arrive as exceptions. A user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
