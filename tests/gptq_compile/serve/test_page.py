# SPDX-License-Identifier: Apache-2.0
"""The chat page in a real browser: typing, streaming, stopping, starting over, and nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

LAST = "[...document.querySelectorAll('.assistant')].at(-1)?.textContent"
STATUS = "document.getElementById('status').textContent"
IDLE = "!document.getElementById('send').disabled"


def load_browser_module() -> ModuleType:
    """The module ``browser``, which lies beside this file and in no package."""
    name = "gptq_compile_browser"
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name("browser.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    module = load_browser_module()
    program = module.find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine")
    made = module.Browser(program, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def page(browser: Any, running: Any) -> Any:
    """The browser on a fresh chat page that knows its model."""
    browser.requested.clear()
    browser.complaints.clear()
    browser.call("Page.navigate", url=running.url + "/")
    browser.wait("document.title === 'toy'")
    browser.evaluate("document.getElementById('temperature').value = 0, document.getElementById('tokens').value = 20")
    yield browser
    assert browser.complaints == []
    assert [u for u in browser.requested if not u.startswith((running.url + "/", "data:"))] == []


def answer(running: Any, messages: list[dict[str, str]], tokens: int = 20) -> str:
    return running.engine.generate(running.engine.chat_prompt(messages), tokens)


def shown(page: Any) -> str:
    """The last answer; what the browser's string type cannot hold compares as it does."""
    return page.evaluate(LAST)


def test_a_conversation(page: Any, running: Any, tmp_path: pathlib.Path) -> None:
    markup = "<img src=http://192.0.2.1/x onerror=\"document.title='gone'\"><b>Hello</b>"
    page.type(markup)
    page.wait(f"{STATUS}.includes('tokens') && {IDLE}")
    first = answer(running, [{"role": "user", "content": markup}])
    assert shown(page) == first
    assert page.evaluate("document.querySelector('.user').textContent") == markup
    assert page.evaluate("document.querySelectorAll('#log img, #log b').length") == 0
    assert page.evaluate(STATUS).startswith("20 tokens, ") and "cut off" in page.evaluate(STATUS)
    page.type("Again\u00e9 \U0001f30d")
    page.wait(f"document.querySelectorAll('.assistant').length === 2 && {STATUS}.includes('tokens') && {IDLE}")
    history = [
        {"role": "user", "content": markup}, {"role": "assistant", "content": first},
        {"role": "user", "content": "Again\u00e9 \U0001f30d"},
    ]  # fmt: skip
    assert shown(page) == answer(running, history)
    picture = pathlib.Path(os.environ.get("GPTQ_COMPILE_SCREENSHOT", tmp_path / "page.png"))
    page.screenshot(picture)
    assert picture.stat().st_size > 5000
    page.evaluate("document.getElementById('reset').click()")
    assert page.evaluate("document.getElementById('log').children.length") == 0
    page.evaluate("document.getElementById('text').focus()")
    page.type(markup)
    page.wait(f"{STATUS}.includes('tokens') && {IDLE}")
    assert shown(page) == first


def test_stop_ends_the_answer_and_not_the_conversation(
    page: Any, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = running.app.state.service.engine.scheduler
    step = scheduler.step
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "step", lambda: (time.sleep(0.03), step())[1])
        page.evaluate("document.getElementById('tokens').value = 400")
        page.type("A long story")
        page.wait(f"{LAST}?.length > 3")
        page.evaluate("document.getElementById('stop').click()")
        page.wait(f"{STATUS} === 'Stopped.' && {IDLE}")
    said = shown(page)
    assert said and answer(running, [{"role": "user", "content": "A long story"}], 400).startswith(said)
    end = time.monotonic() + 10
    while scheduler.running and time.monotonic() < end:
        time.sleep(0.01)
    assert scheduler.running == 0
    page.evaluate("document.getElementById('tokens').value = 5")
    page.type("Go on")
    page.wait(f"{STATUS}.startsWith('5 tokens')")


def test_errors_are_shown(page: Any, running: Any) -> None:
    page.type("x" * 700)
    text = page.wait("document.querySelector('.error')?.textContent")
    assert "context is 512" in text
    page.complaints.clear()  # the browser logs every answer that is not 2xx
    page.type("short")
    page.wait(f"{STATUS}.includes('tokens') && {IDLE}")


def test_the_key(browser: Any, serve: Any) -> None:
    with serve(api_key="sesame") as running:
        browser.call("Page.navigate", url=running.url + "/")
        assert "key" in browser.wait("document.querySelector('.error')?.textContent")
        browser.evaluate(
            "document.getElementById('key').value = 'sesame', "
            "document.getElementById('key').dispatchEvent(new Event('change'))"
        )
        browser.wait("document.title === 'toy'")


def test_the_page_allows_nothing_from_elsewhere(running: Any) -> None:
    with urllib.request.urlopen(running.url + "/") as reply:
        policy, text = reply.headers["Content-Security-Policy"], reply.read().decode()
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", text)
