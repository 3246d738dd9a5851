# SPDX-License-Identifier: Apache-2.0
"""Every route through OpenAI's own client, against the engine's own answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

openai = pytest.importorskip("openai")

MESSAGES: Any = [{"role": "system", "content": "Say little."}, {"role": "user", "content": "Hello"}]
GREEDY: Any = {"model": "toy", "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(running: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def expected(running: Any, prompt: Any, count: int = 24, **settings: Any) -> Any:
    return running.engine.generate(prompt, count, eos_token_id=[], return_dict_in_generate=True, **settings)


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "toy" and model.object == "model"
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_chat(running: Any, client: Any) -> None:
    prompt = running.engine.chat_prompt(MESSAGES)
    alone = expected(running, prompt)
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == alone.text
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.object == "chat.completion" and answer.model == "toy"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (alone.prompt_tokens, 24)
    assert usage.total_tokens == usage.prompt_tokens + 24
    again = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert again.choices[0].message.content == alone.text
    assert again.usage.prompt_tokens_details.cached_tokens == (alone.prompt_tokens - 1) // 16 * 16


def test_chat_in_parts_and_from_a_developer(running: Any, client: Any) -> None:
    text = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    parts = [{"role": "developer", "content": "Say little."}, {"role": "user", "content": text}]
    answer = client.chat.completions.create(messages=parts, **GREEDY)
    assert answer.choices[0].message.content == expected(running, running.engine.chat_prompt(MESSAGES)).text


def test_chat_stream(running: Any, client: Any) -> None:
    alone = expected(running, running.engine.chat_prompt(MESSAGES))
    chunks = list(
        client.chat.completions.create(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert all(c.object == "chat.completion.chunk" and c.id == chunks[0].id for c in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == alone.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    without = list(client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY))
    assert all(c.usage is None and c.choices for c in without)


def test_completions_of_text_ids_and_lists(running: Any, client: Any) -> None:
    for prompt in ("Once", [72, 105], ["a", "bc"], [[1, 2], [3]]):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        alone = expected(running, prompt)
        alone = alone if isinstance(alone, list) else [alone]
        assert [c.text for c in answer.choices] == [a.text for a in alone]
        assert [c.index for c in answer.choices] == list(range(len(alone)))
        assert answer.usage.prompt_tokens == sum(a.prompt_tokens for a in alone)
    assert len(client.completions.create(model="toy", prompt="Once", temperature=0).choices[0].text) > 0
    echoed = client.completions.create(prompt="Once", echo=True, **GREEDY).choices[0].text
    assert echoed == "Once" + expected(running, "Once").text


def test_stop_and_end_tokens(running: Any, client: Any) -> None:
    text = expected(running, "stop here", 24).text
    stop = text[5:7]
    answer = client.completions.create(prompt="stop here", stop=[stop, "never"], **GREEDY).choices[0]
    assert answer.text == text[: text.index(stop)] and answer.finish_reason == "stop"
    chunks = client.completions.create(prompt="stop here", stop=stop, stream=True, **GREEDY)
    assert "".join(c.choices[0].text for c in chunks) == answer.text


def test_seed_n_and_sampling(running: Any, client: Any) -> None:
    settings: Any = {"model": "toy", "prompt": "seed", "max_tokens": 12, "extra_body": {"ignore_eos": True, "top_k": 9}}

    def texts(**more: Any) -> list[str]:
        return [c.text for c in client.completions.create(**settings, **more).choices]

    three = texts(n=3, seed=7, temperature=0.8, top_p=0.9)
    alone = expected(running, ["seed"] * 3, 12, do_sample=True, seed=[7, 8, 9], temperature=0.8, top_p=0.9, top_k=9)
    assert three == [a.text for a in alone] and len(set(three)) == 3
    # Without a temperature the model's own holds (0.7); without a seed no two answers need be equal.
    own = expected(running, "seed", 12, do_sample=True, seed=7, temperature=0.7, top_k=9)
    assert texts(seed=7) == [own.text] != texts(seed=7, temperature=50.0)
    assert len({texts()[0] for _ in range(4)}) > 1


def test_n_streams(running: Any, client: Any) -> None:
    settings: Any = {"messages": MESSAGES, "n": 3, "seed": 1, **GREEDY, "temperature": 1.0}
    whole = client.chat.completions.create(**settings)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**settings, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [c.message.content for c in whole.choices] and len(set(texts)) == 3
    assert whole.usage.prompt_tokens == len(running.engine.encode(running.engine.chat_prompt(MESSAGES)))


def test_logprobs(running: Any, client: Any) -> None:
    alone = expected(running, running.engine.chat_prompt(MESSAGES), logprobs=2)
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert [bytes(c.bytes) for c in content] == [running.engine.tokenizer.token_bytes(t) for t in alone.token_ids]
    np.testing.assert_allclose([c.logprob for c in content], [p.logprob for p in alone.logprobs], atol=1e-5)
    for entry in content:
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
    chunks = client.chat.completions.create(messages=MESSAGES, logprobs=True, stream=True, **GREEDY)
    parts = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.logprob for e in parts] == [e.logprob for e in content] and parts[0].top_logprobs == []

    old = client.completions.create(prompt="abc", logprobs=1, **GREEDY).choices[0].logprobs
    alone = expected(running, "abc", logprobs=1)
    np.testing.assert_allclose(old.token_logprobs, [p.logprob for p in alone.logprobs], atol=1e-5)
    assert len(old.tokens) == 24 == len(old.top_logprobs) == len(old.text_offset)
    assert all(t in top for t, top in zip(old.tokens, old.top_logprobs, strict=True))


def test_json_schema(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "size": {"type": "integer", "maximum": 99,
                       "minimum": 0}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["name", "size", "kind"], "additionalProperties": False,
    }  # fmt: skip
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    for settings in ({"temperature": 0}, {"temperature": 2.0, "seed": 1, "n": 3}):
        answer = client.chat.completions.create(
            model="toy", messages=MESSAGES, max_tokens=200, response_format=wanted, **settings
        )
        for choice in answer.choices:
            value = json.loads(choice.message.content)
            assert list(value) == ["name", "size", "kind"] and choice.finish_reason == "stop"
            assert value["kind"] in ("cat", "dog") and 0 <= value["size"] <= 99 and len(value["name"]) <= 5
    with pytest.raises(openai.BadRequestError, match="JSON schema cannot be used"):
        bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        client.chat.completions.create(model="toy", messages=MESSAGES, response_format=bad)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model": "other"}, "model", "no model 'other'"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 99}, "n", "asks for 99 choices"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "role 'wizard'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "not text"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "context is 512"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format", "must be"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, None, "not empty"),
    ],
)
def test_bad_fields_are_refused_by_name(client: Any, change: dict[str, Any], param: str | None, words: str) -> None:
    settings: Any = {"model": "toy", "messages": MESSAGES, "max_tokens": 4, **change}
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client.chat.completions.create(**settings)
    assert caught.value.status_code == (404 if change.get("model") else 400)
    assert caught.value.body["param"] == param
