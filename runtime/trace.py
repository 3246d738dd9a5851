# SPDX-License-Identifier: Apache-2.0
"""What a program did when, as a file for Perfetto (ui.perfetto.dev) or chrome://tracing.

The format is Chrome's `Trace Event Format`_, as an array of events. Each write leaves the file whole, so that it can be
opened while the program runs and whatever ended it.

.. _Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUOOFPYfDQWhY_nXjjYZSb2pJhYI
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

_END = b"\n]"


class Trace:
    """Rows, in each of which one thing follows another. Without a file it does nothing. Safe to use from any thread.

    Attributes:
        on: whether anything is written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Replaces the file.

        Args:
            path: the file; None to write nothing.

        Raises:
            OSError: it cannot be written.
        """
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._rows: dict[str, int] = {}  # name -> number
        self._doing: dict[str, tuple[str, float, dict[str, Any]]] = {}
        self._ended: dict[str, float] = {}  # row -> where its last span ends
        self._file = -1
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.write(self._file, b"[" + _END)
            self._size = 1  # without the end

    @property
    def on(self) -> bool:
        return self._file >= 0

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def enter(self, row: str, name: str | None, /, **details: Any) -> None:
        """Ends what a row was doing and begins something else, or nothing.

        Args:
            row: its name, as the file shows it.
            name: what begins; None if nothing does.
            details: plain values that are shown with it.
        """
        if not self.on:
            return
        now = time.perf_counter()
        with self._lock:
            self._leave(row, now)
            if name is not None:
                self._number(row)
                self._doing[row] = (name, now, details)

    @contextmanager
    def span(self, row: str, name: str, /, **details: Any) -> Iterator[None]:
        """Something that a row does for the time of a block."""
        self.enter(row, name, **details)
        try:
            yield
        finally:
            self.enter(row, None)

    def did(self, row: str, name: str, seconds: float, /, **details: Any) -> None:
        """Something that took so long and ended now; it begins where the row's last thing ended, if that is later."""
        if not self.on:
            return
        now = time.perf_counter()
        with self._lock:
            self._span(row, name, max(now - seconds, self._ended.get(row, 0.0)), now, details)

    def mark(self, row: str, name: str, /, **details: Any) -> None:
        """A moment."""
        if not self.on:
            return
        with self._lock:
            moment = {"ph": "i", "s": "t", "ts": self._microseconds(time.perf_counter())}
            self._event(row, name, moment, details)

    def close(self) -> None:
        """Ends what the rows are doing, and the file."""
        with self._lock:
            for row in list(self._doing):
                self._leave(row, time.perf_counter())
            if self.on:
                os.ftruncate(self._file, self._size + len(_END))  # Ctrl-C may have come between a write and its count
                os.close(self._file)
            self._file = -1

    def _leave(self, row: str, now: float) -> None:
        if row in self._doing:
            name, began, details = self._doing.pop(row)
            self._span(row, name, began, now, details)

    def _span(self, row: str, name: str, began: float, ended: float, details: dict[str, Any]) -> None:
        self._ended[row] = ended
        times = {"ts": self._microseconds(began), "dur": round(1e6 * (ended - began), 3)}
        self._event(row, name, {"ph": "X", **times}, details)

    def _microseconds(self, moment: float) -> float:
        return round(1e6 * (moment - self._began), 3)

    def _event(self, row: str, name: str, fields: dict[str, Any], details: dict[str, Any]) -> None:
        self._append({"name": name, **fields, "pid": 1, "tid": self._number(row), "args": details})

    def _number(self, row: str) -> int:
        """The number that stands for a row; rows are shown in the order in which they are first asked for."""
        if row not in self._rows:
            number = self._rows[row] = len(self._rows) + 1
            for what, value in (("thread_name", {"name": row}), ("thread_sort_index", {"sort_index": number})):
                self._append({"ph": "M", "name": what, "pid": 1, "tid": number, "args": value})
        return self._rows[row]

    def _append(self, event: dict[str, Any]) -> None:
        """Writes an event over the end, and the end after it."""
        if not self.on:
            return
        text = json.dumps(event, allow_nan=False, default=str).encode()
        data = (b",\n" if self._size > 1 else b"\n") + text
        try:
            if os.pwrite(self._file, data + _END, self._size) < len(data + _END):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # A program that can do its work goes on with it.
            log.error("The trace ends here: %s.", error.strerror or error)
            os.ftruncate(self._file, self._size)
            os.pwrite(self._file, _END, self._size)
            os.close(self._file)
            self._file = -1
            return
        self._size += len(data)
