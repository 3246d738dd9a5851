# SPDX-License-Identifier: Apache-2.0
"""The documentation says what is so: commands, flags and files exist, quoted messages are in the sources."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import pathlib
import re
import shlex

import pytest

from gptq_compile.cli.main import COMMANDS, DEFAULT, main
from tests.documents import DOCUMENTS, ROOT, blocks

_SHORTEST = 12  # letters of a quoted message between two gaps


@functools.cache
def literals() -> list[str]:
    """Every string of the sources, formatted ones with a gap for each value."""
    found = []
    for folder in ("gptq_compile", "passes", "kernels", "runtime"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return found


@functools.cache
def flags(command: str) -> set[str]:
    """What a command's help lists."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", said.getvalue()))


def commands(document: pathlib.Path) -> list[list[str]]:
    """Command lines of our program in blocks, without prompts, comments and what comes behind a pipe."""
    text = document.read_text("utf-8")
    fenced = "\n".join(re.findall(r"^```(?:sh)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    indented = "\n".join(re.findall(r"^    .*$", text, re.MULTILINE))
    lines = re.findall(r"^(?:\$ | {4})?(gptq-compile .*)$", f"{fenced}\n{indented}", re.MULTILINE)
    return [shlex.split(line.split(" | ")[0], comments=True)[1:] for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_commands_and_flags_exist(document: pathlib.Path) -> None:
    for words in commands(document):
        if words == ["COMMAND", "..."]:
            continue
        command = words[0] if words[0] in COMMANDS else DEFAULT
        for word in words:
            if re.match(r"--?[a-zA-Z]", word):
                assert word.split("=")[0] in flags(command), f"{' '.join(words)}: {word}"


def test_commands_are_found() -> None:
    found = {w[0] for d in DOCUMENTS for w in commands(d) if w}
    assert {"run", "serve", "inspect", "embed", "doctor", "bench", "eval"} <= found
    assert "--group-size" in flags("compile") and "--trace" in flags("serve")


def test_messages_of_troubleshooting_are_in_the_sources() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = [" ".join(q.replace("\n>", " ").split()) for q in re.findall(r"^> ((?:.*\n>)*.*)$", text, re.MULTILINE)]
    assert len(quoted) >= 20
    for message in quoted:
        parts = [part.strip(" ,.:") for part in message.split("...")]
        assert max(map(len, parts)) >= _SHORTEST, message
        pattern = re.compile(r"[^\0]*\0.*?".join(re.escape(p) for p in parts if p), re.DOTALL)
        assert any(pattern.search(literal) for literal in literals()), message


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: pathlib.Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_files_that_are_named_are_there(document: pathlib.Path) -> None:
    """Paths in back quotes that begin with one of our folders."""
    named = re.findall(
        r"`((?:gptq_compile|passes|kernels|runtime|tests|benchmarks)/[\w/.]+)`", document.read_text("utf-8")
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_python_blocks_are_python(document: pathlib.Path) -> None:
    for text in blocks(document, "python"):
        ast.parse(text)
