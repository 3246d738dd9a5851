# SPDX-License-Identifier: Apache-2.0
"""Folders that appear whole or not at all: written beside their place, synced, and renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from gptq_compile.errors import OutputError

log = logging.getLogger(__name__)

_CHUNK = 4 << 20
# What a failed write says; other errors of the operating system are not about the output's disk.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def human(size: float) -> str:
    """A number of bytes for people: ``1.5 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def sha256(path: Path) -> str:
    """The hex sha256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def available_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write on the disk of a path (or of its first parent that exists)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class StagedFolder:
    """A folder that is filled in a sibling and takes its place at once when :meth:`commit` is called.

    Used as a context manager: leaving without a commit, by an error or by Ctrl-C, removes what was written. The
    sibling is locked while its writer lives, so the next run removes what a killed one left.

    Attributes:
        out: the place. ``path``: where files are written meanwhile.
    """

    def __init__(
        self, out: str | os.PathLike[str], *, overwrite: Callable[[Path], bool] | None = None, disk_needed: int = 0
    ) -> None:
        """Describes the folder; nothing is touched before the context is entered.

        Args:
            out: the place; it must not exist or be an empty folder.
            overwrite: says whether an existing non-empty folder may be replaced (None: never).
            disk_needed: bytes that will be written, compared with the disk's free space before anything is.
        """
        self.out = Path(out).expanduser().absolute()
        self.disk_needed = disk_needed
        self._overwrite = overwrite
        self._made_parents: list[Path] = []
        self._lock: int | None = None
        self.path = self.out.with_name(f".{self.out.name}.partial-{os.getpid()}")

    def __enter__(self) -> StagedFolder:
        """Checks the place and the disk, and creates the sibling.

        Raises:
            OutputError: the folder exists, cannot be created, or the disk has too little space.
        """
        self.check()
        try:
            for parent in reversed([p for p in self.out.parents if not p.exists()]):
                parent.mkdir()
                self._made_parents.append(parent)
            self._remove_leftovers()
            self.path.mkdir()
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._abandon()
            raise OutputError(f"The output folder {self.out} cannot be created: {e.strerror or e}.") from e
        return self

    def check(self) -> None:
        """Checks the place and the disk without touching either.

        Raises:
            OutputError: the folder exists and is not empty, is a file, or the disk has too little space.
        """
        self._check_place()
        free = available_bytes(self.out)
        if self.disk_needed > free:
            raise OutputError(
                f"The output folder {self.out} needs {human(self.disk_needed)}, and its disk has {human(free)} free."
            )

    def _check_place(self) -> None:
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise OutputError(f"The output {self.out} exists and is not a folder; choose another name.")
        if self.out.is_dir() and any(self.out.iterdir()):
            if self._overwrite is None:
                raise OutputError(
                    f"The output folder {self.out} exists and is not empty; choose another or pass --overwrite."
                )
            if not self._overwrite(self.out):
                raise OutputError(
                    f"The output folder {self.out} holds something that gptq-compile did not write, so it is not "
                    "overwritten; choose another."
                )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._lock is None:
            return
        try:
            self._abandon()
        except BaseException:  # a signal that comes late must not keep half of the folder
            self._abandon()
            raise
        if isinstance(error, OSError) and error.errno in _DISK:
            raise self.failure(error) from error

    def failure(self, error: OSError) -> OutputError:
        """The sentence for a failed write."""
        needed = f"it needs {human(self.disk_needed)} in all, and " if self.disk_needed else ""
        return OutputError(
            f"Writing {self.out} failed: {error.strerror or error} ({needed}its disk has "
            f"{human(available_bytes(self.out.parent))} free). Nothing was left behind."
        )

    def place(self, name: str) -> Path:
        """The path of a file to be written, with its parent folders made.

        Raises:
            OutputError: if the name leads out of the folder or is taken.
        """
        target = self.path / name
        if not name or target == self.path or os.path.isabs(name) or ".." in Path(name).parts:
            raise OutputError(f"{name!r} is not the name of a file inside the output folder.")
        if target.exists():
            raise OutputError(f"The file {name} would be written twice into {self.out}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def add(self, content: Path | bytes, name: str) -> None:
        """Copies a file (following links) or writes bytes."""
        with create(self.place(name)) as f:
            if isinstance(content, bytes):
                f.write(content)
            else:
                with content.open("rb") as source:
                    shutil.copyfileobj(source, f, _CHUNK)

    def files(self) -> list[str]:
        """Names of the files written so far, sorted, with forward slashes."""
        return sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())

    def commit(self) -> None:
        """Syncs everything and moves the folder to its place.

        Raises:
            OutputError: if somebody else filled the place meanwhile.
        """
        for folder, _, _ in os.walk(self.path):
            sync(Path(folder))
        old = None
        if self.out.exists():
            self._check_place()
            old = self.out.with_name(f".{self.out.name}.replaced-{os.getpid()}")
            os.rename(self.out, old)
        try:
            os.rename(self.path, self.out)
        except BaseException:
            if old is not None:
                os.rename(old, self.out)
            raise
        self._made_parents.clear()
        self._release()
        sync(self.out.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _abandon(self) -> None:
        self._release()
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in reversed(self._made_parents):
            with contextlib.suppress(OSError):
                parent.rmdir()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_leftovers(self) -> None:
        for leftover in self.out.parent.iterdir():
            if not leftover.name.startswith(f".{self.out.name}.partial-"):
                continue
            try:
                descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                log.info("Removing %s, which an interrupted run left.", leftover)
                shutil.rmtree(leftover, ignore_errors=True)
            except OSError:
                pass
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def create(path: Path) -> Iterator[IO[bytes]]:
    """Opens a new file for writing and syncs it when all is written."""
    with path.open("xb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


def sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
