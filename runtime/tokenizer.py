# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back, incrementally."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Sequence
from ctypes import CDLL
from typing import Any

from gptq_compile.runtime.errors import ArtifactError

_SENTENCEPIECE_BLANK = "\u2581"
_INCOMPLETE = "\ufffd"  # what a decoder prints for bytes that are not (yet) a character


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level BPE: printable bytes are themselves, the others follow from 256 on.

    Radford et al. 2019 (GPT-2), ``bytes_to_unicode``.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """``tokenizer.json`` with the artifact's rule for the first token."""

    def __init__(self, path: pathlib.Path, bos_token_id: int | None, add_bos: bool) -> None:
        """Loads the tokenizer.

        Raises:
            ArtifactError: if the file does not load.
        """
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ArtifactError(f"{path} does not load as a tokenizer: {error}.") from error
        _give_back_memory()
        # Files saved from a training run may carry truncation or padding; a prompt must arrive whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._first = bos_token_id if add_bos else None
        self._special = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self._byte_level = "ByteLevel" in repr(self._tokenizer.decoder)

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Tokens of a prompt; the beginning-of-sequence token is put first where the model wants it, once.

        ``begin`` False leaves it out: the text continues another.
        """
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if begin and self._first is not None and ids[:1] != [self._first]:
            ids.insert(0, self._first)
        return ids

    def definition(self) -> str:
        """The tokenizer as the text of a ``tokenizer.json``."""
        return str(self._tokenizer.to_str())

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; those of its name if it is special. Empty for an unused id."""
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._special:
            return str(name).encode()
        if self._byte_level and all(c in _BYTE_OF for c in name):
            return bytes(_BYTE_OF[c] for c in name)
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
        if byte:
            return bytes([int(byte[1], 16)])
        return str(name).replace(_SENTENCEPIECE_BLANK, " ").encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class IncrementalDecoder:
    """Turns tokens into text as they come, never splitting a character.

    Only a short window is decoded again for every token: the tokens of the last piece, for decoders that treat the
    first token of a text differently, and those that are still incomplete.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0  # tokens of the window whose text is out

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is now certain."""
        self._window.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """Returns what is left; bytes that never became a character come out as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        if self._tokenizer is None:
            return ""
        before = self._tokenizer.decode(self._window[: self._emitted])
        after = self._tokenizer.decode(self._window)
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return ""
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return after[len(before) :]


class StopScanner:
    """Holds back text that may be the beginning of a stop string, and ends at the first complete one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Adds text and returns what can be shown; sets ``stopped`` when a stop string is complete."""
        if self.stopped:
            return ""
        self._pending += text
        found = [i for i in (self._pending.find(s) for s in self._stops) if i >= 0]
        if found:
            self.stopped = True
            text, self._pending = self._pending[: min(found)], ""
            return text
        hold = max((_overlap(self._pending, s) for s in self._stops), default=0)
        cut = len(self._pending) - hold
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text

    def flush(self) -> str:
        """Returns what was held back."""
        text, self._pending = self._pending, ""
        return text


def _give_back_memory() -> None:
    """Returns what parsing a large file needed and has freed: 11 MiB for 49,152 tokens. Where the C library can."""
    with contextlib.suppress(AttributeError):
        CDLL(None).malloc_trim(0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
