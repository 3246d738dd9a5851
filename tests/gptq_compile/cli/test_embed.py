# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile embed`` writes everything that the C++ example includes, and nothing over what is not its own."""

from __future__ import annotations

import pathlib
import re

import pytest

from gptq_compile.cli.main import main


def test_writes_a_project_that_is_whole(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "app"
    assert main(["embed", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"cmake -S {out} -B {out}/build" in said and f"{out}/build/generate OUT" in said
    files = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    assert {"CMakeLists.txt", "generate.cpp", "gptq_compile/CMakeLists.txt", "gptq_compile/gptq_compile.h"} <= files
    assert not [f for f in files if f.endswith((".py", ".pyc"))]
    included = {
        name
        for path in out.rglob("*")
        if path.suffix in (".cpp", ".h")
        for name in re.findall(r'^#include "(.+)"$', path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(included) > 10 and {f"gptq_compile/{name}" for name in included} <= files


def test_overwrites_only_its_own(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "app"
    assert main(["embed", str(out)]) == 0
    (out / "generate.cpp").write_text("changed")
    assert main(["embed", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["embed", str(out), "--overwrite"]) == 0
    assert (out / "generate.cpp").read_text() != "changed"
    other = tmp_path / "mine"
    other.mkdir()
    (other / "precious").write_text("")
    assert main(["embed", str(other), "--overwrite"]) == 2
    assert (other / "precious").exists()
