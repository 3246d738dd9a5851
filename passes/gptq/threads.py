# SPDX-License-Identifier: Apache-2.0
"""CPU threads of a stretch of small operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Run torch's CPU operations on one thread inside, where `wanted`.

    A thread barrier costs more than a small operation, and milliseconds where the cores are contended: on two busy
    cores a 576 x 576 linear took 2.8 s with two threads and 0.3 s with one.
    """
    before = torch.get_num_threads()
    if not wanted or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
