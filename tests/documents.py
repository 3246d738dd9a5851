# SPDX-License-Identifier: Apache-2.0
"""Runs the worked examples of the documentation: their Python blocks are files, and the tests in them are called."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import pathlib
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(document: pathlib.Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def run_examples(
    name: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fixtures: Mapping[str, Any] | None = None
) -> list[str]:
    """Imports the Python blocks of a page under docs/ that begin with the name of a file, and calls their tests.

    Args:
        name: of the page. ``folder``: where the files are written.
        monkeypatch: makes the modules importable for the time of a test.
        fixtures: what the tests may ask for.

    Returns:
        Names of the tests that were called, once for each set of parameters.
    """
    called = []
    for text in blocks(ROOT / "docs" / name, "python"):
        first = text.partition("\n")[0]
        if not re.fullmatch(r"# (kernels|passes|tests)/[\w/]+\.py", first):
            continue
        module = _load(first[2:], text, folder, monkeypatch)
        for test, function in vars(module).items():
            if test.startswith("test_"):
                called += [test for arguments in _parameters(function) if _call(function, arguments, fixtures or {})]
    return called


def _load(path: str, text: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    dotted = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(
        dotted if dotted.startswith("tests") else f"gptq_compile.{dotted}", file
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def _parameters(function: Any) -> list[dict[str, Any]]:
    """The sets of arguments that ``pytest.mark.parametrize`` gives a test."""
    marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
    axes = []
    for mark in marks:
        names, values = mark.args
        if isinstance(names, str):
            axes.append([{names: value} for value in values])
        else:
            axes.append([dict(zip(names, value, strict=True)) for value in values])
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]


def _call(function: Any, arguments: Mapping[str, Any], fixtures: Mapping[str, Any]) -> bool:
    wanted = [name for name in inspect.signature(function).parameters if name not in arguments]
    function(**arguments, **{name: fixtures[name] for name in wanted})
    return True
