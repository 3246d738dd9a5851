# SPDX-License-Identifier: Apache-2.0
"""Who holds which page of the KV cache, and which pages still hold the beginning of some text.

A page is free, held by one or more sequences, or kept: nobody holds it, but it can be found by its content until it is
needed for something else, least recently used first. Content is a full page of tokens and everything before it, as a
chain of (page before it, tokens): the same text always finds the same pages, and another text never does (automatic
prefix caching as in vLLM, without hashes that could collide).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

_ROOT = 0  # the serial number of what is before a text's first page


class PagePool:
    """Pages 1 to ``pages``, by number; page 0 is not handed out."""

    def __init__(self, pages: int, page_size: int) -> None:
        self._size = page_size
        self._free = list(range(pages, 0, -1))
        self._holders = [0] * (pages + 1)
        self._kept: OrderedDict[int, None] = OrderedDict()  # pages that nobody holds, least recently used first
        self._page_of: dict[tuple[int, bytes], int] = {}  # (serial of the page before, tokens) -> page
        self._key_of: dict[int, tuple[int, bytes]] = {}
        self._serial = [_ROOT] * (pages + 1)  # of the page's content; never used again for another
        self._next_serial = _ROOT + 1

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that nobody holds and whose content can still be found."""
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """Takes pages; at most ``available``. Kept content goes where free pages run out."""
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _nothing = self._kept.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def find(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The pages that hold the longest known beginning of ``ids``; nothing is taken."""
        pages: list[int] = []
        before = _ROOT
        for key in self._blocks(ids):
            page = self._page_of.get((before, key))
            if page is None:
                break
            pages.append(page)
            before = self._serial[page]
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Takes pages that ``find`` returned, beside whoever has them."""
        for page in pages:
            self._holders[page] += 1
            self._kept.pop(page, None)

    def unheld(self, pages: Iterable[int]) -> int:
        """How many of these pages are kept, so that sharing them makes fewer available."""
        return sum(page in self._kept for page in pages)

    def record(self, ids: Sequence[int] | np.ndarray, pages: Sequence[int]) -> None:
        """Says that ``pages`` hold ``ids`` from the beginning; a last page that is not full is left out."""
        before = _ROOT
        for key, page in zip(self._blocks(ids), pages, strict=False):
            known = self._page_of.setdefault((before, key), page)
            if known == page and page not in self._key_of:
                self._key_of[page] = (before, key)
                self._serial[page] = self._next_serial
                self._next_serial += 1
            before = self._serial[known]

    def release(self, pages: Sequence[int]) -> None:
        """Gives pages back. The end of a text is forgotten before its beginning."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Makes every kept page free."""
        for page in self._kept:
            del self._page_of[self._key_of.pop(page)]
            self._free.append(page)
        self._kept.clear()

    def _blocks(self, ids: Sequence[int] | np.ndarray) -> Iterable[bytes]:
        array = np.asarray(ids, "int32")
        for begin in range(0, len(array) - self._size + 1, self._size):
            yield array[begin : begin + self._size].tobytes()
