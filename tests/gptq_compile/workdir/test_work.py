# SPDX-License-Identifier: Apache-2.0
"""The command line with a work folder: interrupted, refused by name, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptq_compile.cli.main import main
from gptq_compile.workdir.folder import WorkFolder
from gptq_compile.workdir.work import Work

TEXT = "the quick brown fox jumps over the lazy dog; " * 12


@pytest.fixture(scope="module")
def interrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a calibration text and the work of a run that Ctrl-C ended in the third solve."""
    from gptq_compile.passes.gptq import world

    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(tiny_model, folder / "model")
    (folder / "text.txt").write_text(TEXT)
    solve, count = world.solve, 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "solve", stop)
        assert main(command(folder)) == 130
    return folder


def command(folder: Path, *more: str) -> list[str]:
    return [
        str(folder / "model"), "--target", "cpu:x86-64-v3", "--calibration", str(folder / "text.txt"),
        "--nsamples", "2", "--seqlen", "32", "--group-size", "32", "--no-validate", "--stop-after", "gptq_quantize",
        "--work-dir", str(folder / "work"), "-o", str(folder / "out"), *more,
    ]  # fmt: skip


def copied(interrupted: Path, tmp_path: Path) -> Path:
    """The same run in a place of its own; the path of the text is among its settings."""
    for name in ("model", "work"):
        shutil.copytree(interrupted / name, tmp_path / name)
    shutil.copy(interrupted / "text.txt", tmp_path / "text.txt")
    settings = tmp_path / "work" / "settings.json"
    settings.write_text(settings.read_text().replace(str(interrupted), str(tmp_path)))
    return tmp_path


def test_an_interrupted_run_says_how_to_go_on_and_does(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(interrupted, tmp_path)
    assert main(command(folder)) == 2
    assert "Pass --resume to go on with it" in capsys.readouterr().err
    assert main(command(folder, "--resume", "--json")) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    notes = [e["text"] for e in events if e["event"] == "note"]
    assert "4 linears were finished by an earlier run and are taken over." in notes  # q, k, v and o
    assert [e["index"] for e in events if e["event"] == "linear"] == list(range(1, 15))


def test_scales_are_tuned_from_kept_solves_as_from_new_ones(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tuning is not a part of the work: a run that was started without it may end with it."""
    folder = copied(interrupted, tmp_path)
    tuned = ["--tune-epochs", "1", "--stop-after", "tune_scales", "--json"]
    said = []
    for more in (["--resume"], ["--work-dir", str(tmp_path / "other")]):
        assert main(command(folder, *tuned, *more)) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        notes = [e["text"] for e in events if e["event"] == "note"]
        said.append([n for n in notes if n.startswith("tuning:")])
        assert any("taken over" in n for n in notes) == ("--resume" in more)
    assert len(said[0]) == 3 and said[0] == said[1]


def test_text_to_tune_on_is_written_once(interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gptq_compile import self_text

    folder = copied(interrupted, tmp_path)
    tuned = ["--tune-epochs", "1", "--tune-nsamples", "10", "--stop-after", "tune_scales", "--json", "--resume"]
    said = []
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):  # the second run takes the solves and the text over
            assert main(command(folder, *tuned)) == 0
            events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            said.append([e["text"] for e in events if e["event"] == "note" and e["text"].startswith("tuning:")])
            patch.setattr(self_text, "_sample", lambda *_: pytest.fail("written again"))
    assert said[0] == said[1] and len(said[0]) == 3
    with WorkFolder(folder / "work", resume=True) as work:
        sizes = [len(work.read(name) or b"") for name in work.names("text ")]
    assert sizes == [8 * 8 * 31, 8 * 2 * 31]  # 8 sequences at a time, the first token of each is given


def test_what_changed_is_named(interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(interrupted, tmp_path)
    assert main(command(folder, "--resume", "--wbits", "3", "--damp", "0.2")) == 2
    assert "wbits was 4, is 3; damp was 0.1, is 0.2. Run the command" in capsys.readouterr().err
    (folder / "text.txt").write_text(TEXT.replace("fox", "cat"))
    assert main(command(folder, "--resume")) == 2
    said = capsys.readouterr().err
    assert "calibration token ids was sha256" in said and "wbits" not in said
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert main(command(folder, "--resume")) == 2
    assert "model file config.json was sha256" in capsys.readouterr().err


def test_resume_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--resume"]) == 2
    assert "--work-dir DIR" in capsys.readouterr().err


def test_a_dry_run_leaves_no_work_folder(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--group-size", "32", "--dry-run", "--work-dir", str(tmp_path / "work")]
    assert main([str(tiny_model), *arguments, "-o", str(tmp_path / "out")]) == 0
    assert list(tmp_path.iterdir()) == []


def test_calibration_text_is_written_once(tmp_path: Path) -> None:
    asked = []

    def generate(prompts: np.ndarray, count: int, seed: int) -> np.ndarray:
        asked.append(seed)
        return np.full((len(prompts), count), seed, np.int64)

    prompts = np.zeros((3, 1), np.int64)
    for _ in range(2):
        with WorkFolder(tmp_path / "work", resume=True) as folder:
            folder.depend("settings", {})
            kept = Work(folder).remember(generate)
            assert all((kept(prompts, 5, seed) == seed).all() for seed in (7, 15))
            assert kept(prompts, 5, 7).shape == (3, 5)
    assert asked == [7, 15]
    assert Work(None).remember(generate) is generate


def test_only_claimed_outputs_may_be_replaced(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work") as folder:
        folder.depend("settings", {})
        work = Work(folder)
        assert not work.claimed(tmp_path / "out")
        work.claim(tmp_path / "out")
    with WorkFolder(tmp_path / "work", resume=True) as folder:
        assert Work(folder).claimed(tmp_path / "out") and not Work(folder).claimed(tmp_path / "other")
    assert not Work(None).claimed(tmp_path / "out")
