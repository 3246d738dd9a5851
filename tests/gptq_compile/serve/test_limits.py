# SPDX-License-Identifier: Apache-2.0
"""What a server refuses, and what happens to requests whose clients leave or whose time is up."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

LONG: dict[str, Any] = {"model": "toy", "prompt": "x" * 40, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}


def ask(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and body of one request; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {**JSON, **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            text, status = answer.read().decode(), answer.status
    except urllib.error.HTTPError as error:
        text, status = error.read().decode(), error.code
    return status, json.loads(text) if text.startswith("{") else text


def metric(url: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = ask(f"{url}/metrics")[1].splitlines()
    values = [
        float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == f"gptq_compile_{name}"
    ]
    assert values, name
    return sum(values)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def slow_down(running: Any, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.01) -> None:
    """Makes every step of the server take at least so long."""
    scheduler = running.app.state.service.engine.scheduler
    step = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda: (time.sleep(seconds), step())[1])


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 60_000, 400, "invalid_json"),
        (b"[1]", 400, "invalid_value"),
        (b"{}", 400, "invalid_value"),
        (b'{"model": "toy", "prompt": 5}', 400, "invalid_value"),
        (b'{"model": "toy", "prompt": []}', 400, "invalid_value"),
        (b'{"model": "toy", "prompt": [1, 999]}', 400, "invalid_value"),
        (b'{"model": "toy", "prompt": "a", "logit_bias": {"1": 5}}', 400, "unsupported_parameter"),
        (b'{"model": "toy", "prompt": "%s"}' % (b"a" * 70_000), 413, "body_too_large"),
        (b'{"model": "toy", "prompt": "%s"}' % (b"a" * 60_000), 400, "context_length_exceeded"),
    ],
)
def test_bad_bodies(serve: Any, limited: Any, body: bytes, status: int, code: str) -> None:
    got, answer = ask(f"{limited.url}/v1/completions", body)
    assert (got, answer["error"]["code"]) == (status, code)
    assert answer["error"]["message"].endswith(".")


@pytest.fixture(scope="module")
def limited(serve: Any) -> Any:
    with serve(
        max_body_bytes=65536, max_queue=3, max_prompt_tokens=200, max_new_tokens=420, timeout_seconds=1.0
    ) as running:
        yield running


def test_limits_of_prompt_and_answer(limited: Any) -> None:
    url = f"{limited.url}/v1/completions"
    status, answer = ask(url, {"model": "toy", "prompt": "x" * 300})
    assert status == 400 and "this server takes 200" in answer["error"]["message"]
    status, answer = ask(url, {**LONG, "max_tokens": 421})
    assert status == 400 and answer["error"]["param"] == "max_tokens"


def test_a_body_of_unknown_length_is_cut_off(limited: Any) -> None:
    connection = http.client.HTTPConnection(limited.url.removeprefix("http://"), timeout=10)
    connection.request(
        "POST", "/v1/completions", iter([b" " * 30_000] * 5), {**JSON, "Transfer-Encoding": "chunked"},
        encode_chunked=True,
    )  # fmt: skip
    assert connection.getresponse().status == 413


def test_only_json_is_taken(limited: Any) -> None:
    status, answer = ask(f"{limited.url}/v1/completions", b"{}", {"Content-Type": "text/plain"})
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


def test_unknown_routes_and_methods(limited: Any) -> None:
    for path in ("/v1/embeddings", "/nothing", "/docs", "/openapi.json"):
        status, answer = ask(limited.url + path)
        assert (status, answer["error"]["code"]) == (404, "not_found")
    assert ask(f"{limited.url}/v1/completions")[0] == 405


def test_a_full_queue_refuses_and_time_runs_out(limited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(limited, monkeypatch)
    url = f"{limited.url}/v1/completions"
    status, answer = ask(url, {**LONG, "n": 4})
    assert (status, answer["error"]["code"]) == (503, "queue_full")
    start = time.monotonic()
    status, answer = ask(url, LONG)
    assert (status, answer["error"]["code"]) == (504, "timeout") and 0.9 < time.monotonic() - start < 5
    status, text = ask(url, {**LONG, "stream": True})
    assert status == 200 and '"code": "timeout"' in text and not text.rstrip().endswith("[DONE]")
    assert text.count('"finish_reason": "length"') == 0
    wait_for(lambda: metric(limited.url, "sequences_unfinished") == 0)
    assert metric(limited.url, "cache_pages_free") == metric(limited.url, "cache_pages")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(serve: Any, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    with serve() as running:
        slow_down(running, monkeypatch, 0.02)
        body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_for(lambda: metric(running.url, "sequences_running") == 2)
            assert metric(running.url, "cache_pages_free") < metric(running.url, "cache_pages")
        wait_for(lambda: metric(running.url, "sequences_unfinished") == 0)
        assert metric(running.url, "cache_pages_free") == metric(running.url, "cache_pages")
        assert 'finished_total{reason="cancelled"} 2' in ask(f"{running.url}/metrics")[1]


def test_the_key(serve: Any) -> None:
    with serve(api_key="sesame") as running:
        for path in ("/v1/models", "/metrics"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
                status, answer = ask(running.url + path, headers=headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert ask(running.url + path, headers={"Authorization": "Bearer sesame"})[0] == 200
        assert ask(f"{running.url}/v1/completions", LONG)[0] == 401
        assert ask(f"{running.url}/health")[0] == 200 and ask(f"{running.url}/")[0] == 200


def test_other_hosts_names_are_refused(running: Any, serve: Any) -> None:
    for name, expected in (
        ("localhost:1", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ):
        assert ask(f"{running.url}/v1/models", headers={"Host": name})[0] == expected
    with serve(hosts=None) as open_to_all:
        assert ask(f"{open_to_all.url}/v1/models", headers={"Host": "some.example"})[0] == 200


def test_health_tells_a_failing_model(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = running.url
    assert ask(f"{url}/health")[1]["status"] == "ok"

    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA: launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(running.app.state.service.engine._model, "forward", failing)
        status, answer = ask(f"{url}/v1/completions", LONG)
        assert status == 500 and "launch failure" in answer["error"]["message"]
        assert ask(f"{url}/health")[0] == 503
    assert ask(f"{url}/v1/completions", LONG)[0] == 200
    assert ask(f"{url}/health")[0] == 200
