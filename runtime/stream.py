# SPDX-License-Identifier: Apache-2.0
"""Text as it is generated, and what it amounted to when it is over."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from collections.abc import Sequence as Ids
from typing import Any

from gptq_compile.runtime.errors import RequestError
from gptq_compile.runtime.sequence import GenerationResult, Sequence


class TextStream(Iterator[Any]):
    """Iterator of text (or of (index, text) for a list of prompts).

    Leaving it unread holds nothing; dropping or closing it in the middle cancels its sequences.
    """

    def __init__(self, pieces: Generator[tuple[int, str], None, None], sequences: Ids[Sequence], single: bool) -> None:
        self._pieces, self._sequences, self._single = pieces, sequences, single

    def __next__(self) -> Any:
        piece = next(self._pieces)
        return piece[1] if self._single else piece

    def close(self) -> None:
        """Cancels what is still running."""
        self._pieces.close()

    @property
    def results(self) -> list[GenerationResult]:
        """One result a prompt, once the stream has ended.

        Raises:
            RequestError: while it runs.
        """
        if any(s.finish_reason is None for s in self._sequences):
            raise RequestError("The stream has not ended, so it has no results yet. Read it to its end first.")
        return [s.result() for s in self._sequences]
