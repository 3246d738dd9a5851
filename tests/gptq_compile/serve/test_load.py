# SPDX-License-Identifier: Apache-2.0
"""Two hundred mixed requests at once: none lost, none crossed, and the metrics add up."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections import Counter
from typing import Any

import pytest

openai = pytest.importorskip("openai")

COUNT = 200
KINDS = ("completion", "chat", "stream", "sampled", "two", "logprobs", "left", "bad", "long", "large")


def metrics(url: str) -> dict[str, float]:
    """Every sample of the page, by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {k.removeprefix("gptq_compile_"): float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}


class Load:
    """Sends requests and keeps what came back, by number."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.texts: dict[int, list[str]] = {}
        self.statuses: Counter[int] = Counter()
        self.usage: Counter[str] = Counter()

    def body(self, i: int) -> dict[str, Any]:
        """Settings of a request; the prompt begins with its number, after one of three beginnings to share."""
        begin = ("", "A beginning of more than one page. ", "Another beginning, of another length, that is shared. ")
        sampled = {"temperature": 1.0, "seed": i} if KINDS[i % 10] in ("sampled", "two") else {"temperature": 0}
        return {
            "model": "toy", "prompt": f"{begin[i % 3]}<{i}>" + "y" * (i * 7 % 90), "max_tokens": 5 + i * 13 % 60,
            "extra_body": {"ignore_eos": True}, **sampled,
        }  # fmt: skip

    async def one(self, i: int) -> None:
        kind, body = KINDS[i % 10], self.body(i)
        completions = self.client.completions
        try:
            if kind == "chat":
                messages = [{"role": "user", "content": body.pop("prompt")}]
                answer = await self.client.chat.completions.create(messages=messages, **body)
                self.texts[i] = [c.message.content for c in answer.choices]
            elif kind in ("stream", "left"):
                stream = await completions.create(
                    stream=True, stream_options={"include_usage": True}, echo=True, **body
                )
                parts, answer = [], None
                async for chunk in stream:
                    answer = chunk
                    parts += [c.text for c in chunk.choices]
                    if kind == "left" and len(parts) == 3:
                        await stream.close()
                        break
                self.texts[i] = ["".join(parts)]
                if kind == "left":
                    self.statuses[200] += 1
                    return
            else:
                changes: dict[str, Any] = {
                    "two": {"n": 2, "echo": True}, "logprobs": {"logprobs": 3}, "bad": {"temperature": -1},
                    "long": {"prompt": "z" * 600}, "large": {"prompt": "z" * 200_000},
                    "completion": {"echo": True}, "sampled": {"echo": True},
                }[kind]  # fmt: skip
                answer = await completions.create(**{**body, **changes})
                self.texts[i] = [c.text for c in answer.choices]
        except openai.APIStatusError as error:
            self.statuses[error.status_code] += 1
            return
        self.statuses[200] += 1
        assert answer is not None and answer.usage is not None
        self.usage["prompt"] += answer.usage.prompt_tokens * (2 if kind == "two" else 1)
        self.usage["generated"] += answer.usage.completion_tokens


async def send_all(url: str) -> Load:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=60) as client:
        load = Load(client)
        await asyncio.gather(*(load.one(i) for i in range(COUNT)))
        return load


@pytest.fixture(scope="module")
def loaded(serve: Any) -> Any:
    # A small cache for four rows that grow page by page: some sequences must give their pages back.
    with pytest.MonkeyPatch.context() as patch, serve(cache_tokens=512, max_body_bytes=100_000) as running:
        patch.setattr("gptq_compile.runtime.scheduler.GROWTH_TOKENS", 16)
        load = asyncio.run(send_all(running.url))
        for _ in range(200):
            seen = metrics(running.url)
            if seen["sequences_unfinished"] == 0:
                break
        yield running, load, seen


def test_none_is_lost(loaded: Any) -> None:
    _, load, _ = loaded
    assert load.statuses == {200: 140, 400: 40, 413: 20}
    assert len(load.texts) == 140


def test_none_is_crossed_and_batches_are_singles(loaded: Any) -> None:
    running, load, _ = loaded
    for i, texts in load.texts.items():
        kind, body = KINDS[i % 10], load.body(i)
        prompt = body["prompt"]
        if kind == "chat":
            prompt = running.engine.chat_prompt([{"role": "user", "content": prompt}])
        running.engine.cache.forget()
        for choice, text in enumerate(texts):
            seed = body.get("seed", 0) + choice
            # 0.7 is not used: the request has a temperature of its own.
            alone = running.engine.generate(
                prompt, body["max_tokens"], do_sample="seed" in body, seed=seed, eos_token_id=[]
            )
            shown = (prompt if kind in ("completion", "sampled", "two", "stream", "left") else "") + alone
            if kind == "left":
                assert shown.startswith(text) and len(text) > len(prompt), i
            else:
                assert text == shown, i
            assert kind in ("chat", "logprobs") or f"<{i}>" in text


def test_metrics_add_up(loaded: Any) -> None:
    running, load, seen = loaded
    submitted = seen["sequences_submitted_total"]
    ended = {k: v for k, v in seen.items() if k.startswith("sequences_finished_total")}
    assert submitted == 160 == sum(ended.values())  # 20 requests had two choices
    assert ended['sequences_finished_total{reason="length"}'] >= 140
    assert set(ended) <= {f'sequences_finished_total{{reason="{r}"}}' for r in ("length", "cancelled")}
    left = [i for i in range(COUNT) if KINDS[i % 10] == "left"]
    encode = running.engine.encode
    assert seen["prompt_tokens_total"] == load.usage["prompt"] + sum(len(encode(load.body(i)["prompt"])) for i in left)
    most = sum(load.body(i)["max_tokens"] for i in left)
    assert len(left) <= seen["generated_tokens_total"] - load.usage["generated"] <= most
    assert seen["time_to_first_token_seconds_count"] == seen["sequence_seconds_count"] == submitted
    answers = {k: v for k, v in seen.items() if k.startswith("http_requests_total") and "/v1/" in k}
    assert sum(answers.values()) == COUNT
    by_status: Counter[str] = Counter()
    for name, value in answers.items():
        by_status[re.findall('status="([0-9]+)"', name)[0]] += int(value)
    assert by_status == {"200": 140, "400": 40, "413": 20}
    assert seen["preemptions_total"] > 0
    assert seen["reused_prompt_tokens_total"] > 0
    assert seen["prefilled_tokens_total"] + seen["reused_prompt_tokens_total"] >= seen["prompt_tokens_total"]
    assert seen["cache_pages_free"] == seen["cache_pages"] and seen["sequences_running"] == 0
