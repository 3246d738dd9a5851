# SPDX-License-Identifier: Apache-2.0
"""A folder of finished work that survives ``kill -9``, a full disk and a power cut at any moment.

Layout::

    lock              held (flock) while a process works here; holds its process id
    settings.json     what the work depends on, in sections; written to a sibling and renamed
    journal.jsonl     one line a finished entry: {"entry", "file", "sha256", "size"}; only ever appended to
    entries/NAME      the entries

An entry is written to a temporary name, synced, renamed, its folder synced, and only then named in the journal, so
whatever the journal names was whole. It is hashed again when it is read: an entry that was damaged later is dropped
with a warning and its work is done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gptq_compile.artifact.files import available_bytes, create, human, sync
from gptq_compile.errors import OutputError

log = logging.getLogger(__name__)

LOCK, SETTINGS, JOURNAL, ENTRIES = "lock", "settings.json", "journal.jsonl", "entries"
SCHEMA_VERSION = 1
_TEMPORARY = ".writing"


class WorkFolder:
    """Finished entries under names, and the settings they depend on; a context manager that holds the lock.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        """Describes the folder; nothing is touched before the context is entered.

        Args:
            path: made if it does not exist.
            resume: go on with what is there; otherwise a folder with finished work is refused.
        """
        self.path = Path(path).expanduser().absolute()
        self.resume = resume
        self._lock: int | None = None
        self._settings: dict[str, dict[str, Any]] = {}
        self._entries: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> WorkFolder:
        """Takes the lock and reads what is there.

        Raises:
            OutputError: another process works here, the folder holds work and ``resume`` is not set, it holds
                something else, or it cannot be written.
        """
        with self._writing():
            self._take_lock()
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release()

    def __contains__(self, name: str) -> bool:
        """Whether the journal names an entry; :meth:`read` says whether it is still whole."""
        return name in self._entries

    def names(self, beginning: str = "") -> list[str]:
        """Entries whose name begins so, in the order they were first kept."""
        return [name for name in self._entries if name.startswith(beginning)]

    def depend(self, section: str, values: Mapping[str, Any]) -> None:
        """Says what all entries depend on; the first run writes it down, later ones must say the same.

        Args:
            section: known at one time, such as "settings"; each section is compared as a whole.
            values: plain values by the names that messages use.

        Raises:
            OutputError: naming each value that is another one now.
        """
        now = json.loads(json.dumps(dict(values)))  # tuples become lists, as in what is read back
        before = self._settings.get(section)
        if before is not None:
            changed = [
                f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
                for name in [*now, *(n for n in before if n not in now)]
                if before.get(name) != now.get(name)
            ]
            if changed:
                raise OutputError(
                    f"The work in {self.path} cannot be gone on with: {'; '.join(changed)}. Run the command it was "
                    "made with, or choose another --work-dir."
                )
            return
        self._settings[section] = now
        document = {"format": "gptq-compile work", "schema_version": SCHEMA_VERSION, **self._settings}
        self._put(self.path / SETTINGS, json.dumps(document, indent=1).encode())

    def keep(self, name: str, content: bytes) -> None:
        """Makes an entry durable; it is there, whole, when this returns.

        Raises:
            OutputError: it cannot be written; everything kept before is still there.
        """
        file = f"{ENTRIES}/{_file_name(name)}"
        self._put(self.path / file, content)
        line = {"entry": name, "file": file, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        self._append(line)
        self._entries[name] = line

    def read(self, name: str) -> bytes | None:
        """An entry's content, or None if it was not kept or is damaged (which is logged)."""
        if name not in self._entries:
            return None
        line = self._entries[name]
        content, damage = b"", ""
        try:
            content = (self.path / line["file"]).read_bytes()
        except OSError as e:
            damage = e.strerror or str(e)
        if not damage and len(content) != line["size"]:
            damage = f"it has {len(content)} bytes instead of {line['size']}"
        if not damage and hashlib.sha256(content).hexdigest() != line["sha256"]:
            damage = "its content is not what was written"
        if damage:
            log.warning("%s in %s is damaged (%s), so its work is done again.", line["file"], self.path, damage)
            del self._entries[name]
            return None
        return content

    # -- what is on the disk

    def _open(self) -> None:
        if foreign := self._foreign():
            raise OutputError(
                f"The work folder {self.path} holds something that gptq-compile did not write ({foreign[0]}); choose "
                "an empty one or one that does not exist."
            )
        self._settings = self._read_settings()
        self._entries, length = self._read_journal()
        if self._settings and not self.resume:
            raise OutputError(
                f"The work folder {self.path} holds the work of an earlier run ({len(self._entries)} finished pieces). "
                "Pass --resume to go on with it, or delete the folder to start again."
            )
        with self._writing():
            if (self.path / JOURNAL).exists():
                os.truncate(self.path / JOURNAL, length)  # a line that a kill cut short
            for leftover in self.path.rglob(f"*{_TEMPORARY}"):
                leftover.unlink()

    def _foreign(self) -> list[str]:
        own = {LOCK, SETTINGS, JOURNAL, ENTRIES}
        names = sorted(p.name for p in self.path.iterdir())
        return [n for n in names if n not in own and not n.endswith(_TEMPORARY)]

    def _read_settings(self) -> dict[str, dict[str, Any]]:
        try:
            document = json.loads((self.path / SETTINGS).read_bytes())
            found = (document.pop("format"), document.pop("schema_version"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise OutputError(
                f"{self.path / SETTINGS} cannot be read ({e}), so it is not known what the work there is. Delete the "
                "folder to start again."
            ) from e
        if found != ("gptq-compile work", SCHEMA_VERSION):
            raise OutputError(
                f"The work in {self.path} was written by another version of gptq-compile (schema {found[1]}, this one "
                f"writes {SCHEMA_VERSION}). Delete the folder to start again."
            )
        return document

    def _read_journal(self) -> tuple[dict[str, dict[str, Any]], int]:
        """Entries by name (a later line replaces an earlier one), and the bytes of the journal that are whole lines."""
        try:
            content = (self.path / JOURNAL).read_bytes()
        except FileNotFoundError:
            return {}, 0
        entries = {}
        whole = content[: content.rfind(b"\n") + 1]
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
                wanted = (line["entry"], f"{ENTRIES}/{_file_name(line['entry'])}", str(line["sha256"]), line["size"])
                if wanted[1] != line["file"]:
                    raise ValueError("the file is not the entry's")
                entries[wanted[0]] = line
            except (ValueError, KeyError, TypeError) as e:
                log.warning("Line %d of %s is damaged (%s) and ignored.", number, self.path / JOURNAL, e)
        return entries, len(whole)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._writing():
            new = not (self.path / JOURNAL).exists()
            # Unbuffered: a buffer would write its rest again when the file is closed after a failure.
            with (self.path / JOURNAL).open("ab", buffering=0) as f:
                end = f.seek(0, os.SEEK_END)
                data = json.dumps(dict(line)).encode() + b"\n"
                try:
                    while data:
                        data = data[f.write(data) :]
                    os.fsync(f.fileno())
                except BaseException:
                    with contextlib.suppress(OSError):
                        f.truncate(end)
                    raise
            if new:
                sync(self.path)

    def _put(self, target: Path, content: bytes) -> None:
        """Writes a file so that it is there whole or not at all, also after a power cut."""
        temporary = target.with_name(target.name + _TEMPORARY)
        with self._writing():
            target.parent.mkdir(exist_ok=True)
            try:
                temporary.unlink(missing_ok=True)
                with create(temporary) as f:
                    f.write(content)
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
            sync(target.parent)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            free = human(available_bytes(self.path))
            raise OutputError(
                f"The work folder {self.path} cannot be written: {e.strerror or e} (its disk has {free} free). What "
                "was finished is kept there; mend this and run the same command with --resume."
            ) from e

    # -- the lock

    def _take_lock(self) -> None:
        while self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # another process has just removed the folder it had made in vain
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
                self._close()
                raise OutputError(
                    f"Another process{f' (pid {holder})' if holder else ''} is working in {self.path}. Wait for it, "
                    "stop it, or choose another --work-dir."
                ) from None
            if not os.fstat(self._lock).st_nlink:
                self._close()  # likewise
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _release(self) -> None:
        if self._lock is None:
            return
        if not self._settings:  # nothing was begun, and nothing that was there is touched
            with contextlib.suppress(OSError):
                if [p.name for p in self.path.iterdir()] == [LOCK]:
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
        self._close()

    def _close(self) -> None:
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None


def holds_work(path: Path) -> bool:
    """Whether a work folder has something to go on with."""
    return (path.expanduser() / SETTINGS).is_file()


def _file_name(entry: str) -> str:
    """A file name that is readable, safe, short, and different for every entry."""
    safe = re.sub(r"[^\w.-]+", "_", entry)[:80].strip(".")
    return f"{safe}-{hashlib.sha256(entry.encode()).hexdigest()[:12]}"


def _short(value: Any) -> str:
    """A value in a message; long ones (hashes) by their beginning."""
    text = "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
