# SPDX-License-Identifier: Apache-2.0
"""Pages against a plain model of who holds them and what was written into them."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from gptq_compile.runtime.pages import PagePool

PAGES, SIZE = 6, 2


class Pool(RuleBasedStateMachine):
    """Texts of few different tokens, so that beginnings coincide; ``content`` is what each page holds."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, SIZE)
        self.content: dict[int, tuple[int, ...]] = {}  # page -> the whole text up to its end
        self.held: list[list[int]] = []

    @rule(target=holders, ids=st.lists(st.integers(0, 1), min_size=1, max_size=9), known=st.booleans())
    def admit(self, ids: list[int], known: bool) -> tuple[list[int], list[int]]:
        """Takes pages for a text as the cache does; sometimes it dies before its pages are filled."""
        shared = self.pool.find(ids)
        for i, page in enumerate(shared):
            assert self.content[page] == tuple(ids[: (i + 1) * SIZE])  # what is found is what was asked for
        need = -(-len(ids) // SIZE) - len(shared)
        if need > self.pool.available - self.pool.unheld(shared):
            return [], []
        self.pool.share(shared)
        fresh = self.pool.take(need)
        assert not set(fresh) & {p for pages in self.held for p in pages}, "a page that somebody has was handed out"
        pages = shared + fresh
        self.held.append(pages)
        for page in fresh:
            self.content.pop(page, None)
        if known:
            for i in range(len(ids) // SIZE):
                self.content[pages[i]] = tuple(ids[: (i + 1) * SIZE])
            self.pool.record(ids, pages)
        return ids, pages

    @rule(holder=consumes(holders))
    def release(self, holder: tuple[list[int], list[int]]) -> None:
        _, pages = holder
        if pages:
            self.held.remove(pages)
            self.pool.release(pages)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert self.pool.kept == 0

    @invariant()
    def every_page_is_held_or_available(self) -> None:
        held = {p for pages in self.held for p in pages}
        assert len(held) + self.pool.available == PAGES


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def test_the_longest_unused_page_goes_first_and_a_text_loses_its_end_first() -> None:
    pool = PagePool(4, SIZE)
    first, second = [1, 2, 3, 4], [5, 6, 7, 8]
    for ids in (first, second):
        pages = pool.take(2)
        pool.record(ids, pages)
        pool.release(pages)
    assert (pool.available, pool.kept) == (4, 4)
    shared = pool.find(first)
    pool.share(shared)
    pool.release(shared)  # now the second is the one that was not used for longest
    pool.take(1)
    assert len(pool.find(second)) == 1 and len(pool.find(first)) == 2
    pool.take(1)
    assert len(pool.find(second)) == 0 and len(pool.find(first)) == 2


def test_a_page_that_is_not_full_is_not_found() -> None:
    pool = PagePool(4, SIZE)
    pool.record([1, 2, 3], pages := pool.take(2))
    assert pool.find(np.array([1, 2, 3, 4])) == pages[:1]
    assert pool.find([1]) == pool.find([2, 1]) == []
