# SPDX-License-Identifier: Apache-2.0
"""Giving freed host memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``, or None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def trim_heap(device: torch.device) -> None:
    """Gives back what glibc keeps of freed blocks below 32 MB, where values live on the CPU."""
    if device.type == "cpu" and (trim := _trim()) is not None:
        trim(0)
