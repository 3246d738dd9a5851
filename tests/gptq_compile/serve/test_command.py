# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile serve`` as a process."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from gptq_compile.cli import serve as command
from gptq_compile.cli.main import main
from gptq_compile.serve.settings import LOOPBACK

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_ends(artifact: pathlib.Path, signal_: signal.Signals, tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "gptq_compile.cli.main", "serve", str(artifact), "--port", "0", "--model-name", "mine",
         "--trace", str(trace)],
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), command.KEY_VARIABLE: "sesame", "TVM_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"mine on cpu.*(http://127\.0\.0\.1:\d+)/", line)
        assert found, line
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{found[1]}/v1/models", timeout=10)
        request = urllib.request.Request(f"{found[1]}/v1/models", headers={"Authorization": "Bearer sesame"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["data"][0]["id"] == "mine"
        libraries = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtvm_runtime" in libraries and "libtorch" not in libraries
        asked = {"model": "mine", "prompt": [3, 4, 5], "max_tokens": 4, "ignore_eos": True}
        request = urllib.request.Request(
            f"{found[1]}/v1/completions", json.dumps(asked).encode(),
            {"Authorization": "Bearer sesame", "Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        json.loads(trace.read_text())  # whole while it runs
        process.send_signal(signal_)
        assert process.wait(20) == (0 if signal_ == signal.SIGINT else 143)
        assert "Traceback" not in process.stderr.read()
        events = json.loads(trace.read_text())
        assert [e["args"]["number"] for e in events if e["name"] == "token"] == [1, 2, 3, 4]
        assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"model", "request 1"}
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_an_address_that_is_taken(artifact: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(artifact), "--port", str(port)]) == 2
    assert f"Cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_bad_limits(artifact: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(artifact), "--max-queue", "0"]) == 2
    assert "--max-queue is 0; it must be greater than 0." in capsys.readouterr().err


def test_the_names_it_answers_to() -> None:
    assert command._hosts("127.0.0.1", []) == (*LOOPBACK, "127.0.0.1")
    assert command._hosts("0.0.0.0", []) is None and command._hosts("127.0.0.1", ["*"]) is None
    assert "box.lan" in (command._hosts("0.0.0.0", ["box.lan"]) or ())
