# SPDX-License-Identifier: Apache-2.0
"""Remembers which large files had the right hash, so that loading a model does not read all of it.

A note in the user's cache folder is named ``<sha256>-<device>-<inode>`` and holds the file's size and its times of
modification and change in nanoseconds. Whoever writes to the file, or puts another in its place, changes one of them,
and then it is read again. What a note cannot see is a disk that forgets by itself; ``gptq-compile inspect OUT
--verify`` reads everything. The C++ runtime (``runtime/cpp/verified.cpp``) keeps the same notes.
"""

from __future__ import annotations

import logging
import os
import pathlib
import time

log = logging.getLogger(__name__)

SMALLEST = 8 << 20  # bytes; what is smaller is hashed in milliseconds
# A file written again within one tick of the file system's clock keeps its times, so a young one gets no note.
_SETTLED_NS = 2_000_000_000


def is_known(path: pathlib.Path, sha256: str) -> bool:
    """Whether a file has been found to have this hash and was not touched since."""
    try:
        note = _note(path, sha256)
        if note is None or os.stat(note).st_uid != os.geteuid():
            return False
        return note.read_text("ascii") == _state(os.stat(path))
    except (OSError, ValueError):
        return False


def remember(path: pathlib.Path, sha256: str, before: os.stat_result) -> None:
    """Notes that a file has this hash; failures are only logged, since nothing depends on it.

    Args:
        path: the file.
        sha256: what its bytes hashed to, 64 hexadecimal digits.
        before: its state when the hashing began.
    """
    import tempfile  # not above: it imports half the standard library, and most loads have nothing to note

    try:
        note = _note(path, sha256)
        if note is None or _state(os.stat(path)) != _state(before):
            return
        if time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) < _SETTLED_NS:
            return
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(prefix=".note-", dir=note.parent)
        with os.fdopen(descriptor, "w", encoding="ascii") as f:
            f.write(_state(before))
        os.replace(scratch, note)
    except OSError as error:
        log.debug("that %s was checked could not be noted: %s", path, error)


def _note(path: pathlib.Path, sha256: str) -> pathlib.Path | None:
    """Where a file's note lies (XDG base directory specification); None if the user has no place for it."""
    base, home = os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", "")
    if not base.startswith("/"):
        if not home.startswith("/"):
            return None
        base = f"{home}/.cache"
    info = os.stat(path)
    return pathlib.Path(base, "gptq-compile", "verified", f"{sha256}-{info.st_dev:x}-{info.st_ino:x}")


def _state(info: os.stat_result) -> str:
    return f"{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}\n"
