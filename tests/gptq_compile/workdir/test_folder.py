# SPDX-License-Identifier: Apache-2.0
"""The work folder: what survives a kill, damage, a full disk, and a second process."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptq_compile.errors import OutputError
from gptq_compile.workdir.folder import ENTRIES, JOURNAL, LOCK, SETTINGS, WorkFolder

ROOT = Path(__file__).resolve().parents[3]
SETTING = {"wbits": 4, "group_size": 128, "sizes": (1, 2)}


def filled(path: Path) -> Path:
    with WorkFolder(path) as folder:
        folder.depend("settings", SETTING)
        folder.keep("solve a", b"one")
        folder.keep("solve b, c", b"two" * 100)
    return path


def entry_file(path: Path, part: str) -> Path:
    [file] = [p for p in (path / ENTRIES).iterdir() if part in p.name]
    return file


def test_what_was_kept_is_there_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "deep" / "work")
    with WorkFolder(path, resume=True) as folder:
        folder.depend("settings", {"group_size": 128, "sizes": [1, 2], "wbits": 4})
        assert folder.read("solve a") == b"one" and folder.read("solve b, c") == b"two" * 100
        assert "solve a" in folder and folder.read("solve d") is None
        assert folder.names("solve") == ["solve a", "solve b, c"]
        folder.keep("solve a", b"again")
    with WorkFolder(path, resume=True) as folder:
        assert folder.read("solve a") == b"again"


def test_names_that_look_alike_as_files_are_different_entries(tmp_path: Path) -> None:
    names = ["a/b", "a b", "a_b", "x" * 200, "x" * 201, "../up"]
    with WorkFolder(tmp_path / "work") as folder:
        for name in names:
            folder.keep(name, name.encode())
    with WorkFolder(tmp_path / "work", resume=True) as folder:
        assert [folder.read(n) for n in names] == [n.encode() for n in names]
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = filled(tmp_path / "work")
    with WorkFolder(path, resume=True) as folder, pytest.raises(OutputError) as refused:
        folder.depend("settings", {**SETTING, "wbits": 3, "group_size": None, "new": "x"})
    assert "wbits was 4, is 3; group_size was 128, is not set; new was not set, is x." in str(refused.value)
    assert "sizes" not in str(refused.value)


def test_an_earlier_run_is_not_overwritten_without_resume(tmp_path: Path) -> None:
    path = filled(tmp_path / "work")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != LOCK}
    with pytest.raises(OutputError, match=r"earlier run \(2 finished pieces\). Pass --resume"), WorkFolder(path):
        pass
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != LOCK}


def test_resuming_nothing_starts(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work", resume=True) as folder:
        folder.depend("settings", SETTING)
        assert folder.names() == []


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with (
            pytest.raises(OutputError, match=r"did not write \(thesis.tex\)"),
            WorkFolder(tmp_path, resume=resume) as folder,
        ):
            folder.keep("a", b"")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_folder_in_which_nothing_was_begun_disappears(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work"):
        assert (tmp_path / "work").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_told_who_works_there(tmp_path: Path) -> None:
    path = filled(tmp_path / "work")
    code = (
        "import sys; from gptq_compile.workdir.folder import WorkFolder\n"
        "with WorkFolder(sys.argv[1], resume=True): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with (
            pytest.raises(OutputError, match=rf"Another process \(pid {other.pid}\) is working in"),
            WorkFolder(path, resume=True),
        ):
            pass
        other.kill()
    with WorkFolder(path, resume=True) as folder:  # the lock of a killed process is no lock
        assert folder.read("solve a") == b"one"


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_journal_line_that_was_cut_short_is_dropped(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path / "work")
    journal = path / JOURNAL
    os.truncate(journal, journal.stat().st_size - cut)
    with WorkFolder(path, resume=True) as folder:
        assert folder.names() == ["solve a"] and folder.read("solve a") == b"one"
        folder.keep("solve b, c", b"again")
    with WorkFolder(path, resume=True) as folder:
        assert folder.read("solve b, c") == b"again" and folder.read("solve a") == b"one"


def test_a_file_without_a_journal_line_is_no_entry(tmp_path: Path) -> None:
    path = filled(tmp_path / "work")
    os.truncate(path / JOURNAL, 0)
    (path / ENTRIES / "half.writing").write_bytes(b"ha")
    with WorkFolder(path, resume=True) as folder:
        assert folder.read("solve a") is None
        assert not (path / ENTRIES / "half.writing").exists()


@pytest.mark.parametrize("damage", ["flip", "shorten", "lengthen", "remove"])
def test_a_damaged_entry_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = filled(tmp_path / "work")
    file = entry_file(path, "solve_b")
    content = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
        case "shorten":
            file.write_bytes(content[:-1])
        case "lengthen":
            file.write_bytes(content + b"x")
        case "remove":
            file.unlink()
    with WorkFolder(path, resume=True) as folder, caplog.at_level(logging.WARNING):
        assert folder.read("solve b, c") is None and "solve b, c" not in folder
        assert "is damaged" in caplog.text and "done again" in caplog.text
        assert folder.read("solve a") == b"one"
        folder.keep("solve b, c", b"mended")
        assert folder.read("solve b, c") == b"mended"


def test_a_damaged_journal_line_costs_one_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(tmp_path / "work")
    first, second = (path / JOURNAL).read_bytes().splitlines(keepends=True)
    (path / JOURNAL).write_bytes(b"\0" * (len(first) - 1) + b"\n" + second)
    with caplog.at_level(logging.WARNING), WorkFolder(path, resume=True) as folder:
        assert folder.names() == ["solve b, c"] and "Line 1 of" in caplog.text


def test_unreadable_settings_are_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "work")
    (path / SETTINGS).write_text("{")
    with pytest.raises(OutputError, match="Delete the folder"), WorkFolder(path, resume=True):
        pass
    (path / SETTINGS).write_text('{"format": "gptq-compile work", "schema_version": 99}')
    with pytest.raises(OutputError, match="schema 99"), WorkFolder(path, resume=True):
        pass


class FailingDisk:
    """Makes the n-th call that writes, renames or syncs fail as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        for name in ("fsync", "replace", "truncate", "open"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, call: Any) -> Any:
        def failing(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return failing


def test_a_failure_of_any_call_leaves_what_was_finished(tmp_path: Path) -> None:
    """Every system call that a run of three entries makes fails once; a resumed run completes it."""
    contents = {f"solve {i}": bytes([i]) * 50 for i in range(3)}
    for at in range(1, 100):
        path, kept = tmp_path / str(at), []
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = FailingDisk(monkeypatch, at)
            try:
                with WorkFolder(path) as folder:
                    folder.depend("settings", SETTING)
                    for name, content in contents.items():
                        folder.keep(name, content)
                        kept.append(name)
            except OutputError as e:
                assert "cannot be written: No space left on device" in str(e) and "--resume" in str(e)
            else:
                assert disk.left > 0  # every call has failed once
                break
        with WorkFolder(path, resume=True) as folder:
            folder.depend("settings", SETTING)
            assert [folder.read(name) for name in kept] == [contents[name] for name in kept]
            for name, content in contents.items():
                folder.keep(name, content)
        with WorkFolder(path, resume=True) as folder:
            assert [folder.read(name) for name in contents] == list(contents.values())
    else:
        pytest.fail("the run never succeeded")
    assert at > 10


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        done = []
        with pytest.raises(OutputError, match="No space left on device"), WorkFolder(disk / "work") as folder:
            folder.depend("settings", SETTING)
            for i in range(100):
                folder.keep(f"solve {i}", bytes([i]) * 3000)
                done.append(i)
        assert 3 < len(done) < 30
        with WorkFolder(disk / "work", resume=True) as folder:  # still full
            assert all(folder.read(f"solve {i}") == bytes([i]) * 3000 for i in done)
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        with WorkFolder(disk / "work", resume=True) as folder:
            for i in range(len(done), 100):
                folder.keep(f"solve {i}", bytes([i]) * 3000)
            assert all(folder.read(f"solve {i}") == bytes([i]) * 3000 for i in range(100))
    finally:
        subprocess.run(["umount", disk], check=True)
