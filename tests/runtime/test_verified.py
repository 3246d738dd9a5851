# SPDX-License-Identifier: Apache-2.0
"""Large files are hashed once, and again as soon as anything about them changes."""

from __future__ import annotations

import os
import pathlib
import time
from types import ModuleType

import pytest

from gptq_compile.runtime import verified
from gptq_compile.runtime.artifact import Artifact
from gptq_compile.runtime.errors import ArtifactError

WEIGHTS = "weights.safetensors"


def age(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file as old as notes are made for, by moving the clock."""
    later = max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) + 3_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)


@pytest.fixture
def settled(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """An artifact whose weights count as large, which was loaded once; notes are in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SMALLEST", 1000)
    age(copy / WEIGHTS, monkeypatch)
    Artifact(copy)
    return copy


def notes(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    folder = tmp_path / "cache" / "gptq-compile" / "verified"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def damage_keeping_times(path: pathlib.Path) -> None:
    """Flips a bit in place and puts the time of modification back; the time of change cannot be put back."""
    info = path.stat()
    with path.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read(1)[0]
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_weights_are_read_once(settled: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = Artifact(settled).manifest.files[WEIGHTS].sha256
    note = next(n for n in notes(tmp_path) if n.name.startswith(digest))
    assert note.stat().st_mode & 0o077 == 0
    path = settled / WEIGHTS
    # As a disk that forgets would do it: the bytes change and nothing else does.
    damage_keeping_times(path)
    note.write_text(f"{path.stat().st_size} {path.stat().st_mtime_ns} {path.stat().st_ctime_ns}\n")
    Artifact(settled)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is not the file"):
        Artifact(settled, again=True)


def test_a_touched_file_is_read_again(settled: pathlib.Path) -> None:
    damage_keeping_times(settled / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is not the file"):
        Artifact(settled)


def test_another_file_in_its_place_is_read(settled: pathlib.Path) -> None:
    data = bytearray((settled / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (settled / "new").write_bytes(bytes(data))
    (settled / "new").rename(settled / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is not the file"):
        Artifact(settled)


def test_a_truncated_file_is_refused_by_its_size(settled: pathlib.Path) -> None:
    os.truncate(settled / WEIGHTS, 1000)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors has 1000 bytes"):
        Artifact(settled, verify=False)


def test_libraries_and_small_files_get_no_notes(settled: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = Artifact(settled).manifest.files
    assert files["model.so"].size > 1000 and len(notes(tmp_path)) == sum(
        entry.size >= 1000 and not name.endswith(".so") for name, entry in files.items()
    )


def test_a_young_file_gets_no_note(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SMALLEST", 1000)
    (copy / WEIGHTS).touch()
    Artifact(copy)
    assert not any(verified.is_known(copy / WEIGHTS, n.name.split("-")[0]) for n in notes(tmp_path))


def test_without_a_home_everything_is_read(
    copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch, toy: ModuleType
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(verified, "SMALLEST", 1000)
    age(copy / WEIGHTS, monkeypatch)
    digest = Artifact(copy).manifest.files[WEIGHTS].sha256
    assert not verified.is_known(copy / WEIGHTS, digest)


def test_a_cache_that_cannot_be_written_is_no_error(
    copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(verified, "SMALLEST", 1000)
    age(copy / WEIGHTS, monkeypatch)
    Artifact(copy)
