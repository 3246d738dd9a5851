# SPDX-License-Identifier: Apache-2.0
"""The engine against the toy model's float64 reference: paging, batches, sampling, limits, failures."""

from __future__ import annotations

import pathlib
import threading
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import ContextError, DeviceError, LogitsError, RequestError

PROMPTS = ["a", "The quick brown fox", "x" * 40, "été", "0123456789abcde", "0123456789abcdef", "Z" * 17]


def ids_of(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, 256, count).tolist()


def reference_greedy(toy: ModuleType, prompt: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Greedy continuation by full recomputation in float64."""
    ids, weights = list(prompt), toy.toy_weights()
    for _ in range(count):
        row = toy.reference_logits(ids, weights)[-1]
        seen = np.isin(np.arange(toy.VOCAB), ids)
        row = np.where(seen, np.where(row > 0, row / penalty, row * penalty), row)
        ids.append(int(row.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("count", [1, 16, 17, 96])
def test_logits(engine: Engine, toy: ModuleType, step: bool, count: int) -> None:
    ids = ids_of(np.random.default_rng(count), count)
    got = engine.logits(ids, step=step)
    assert got.dtype == np.float32 and got.shape == (count, toy.VOCAB)
    np.testing.assert_allclose(got, toy.reference_logits(ids, toy.toy_weights()), atol=5e-5)


def test_logits_in_small_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(np.random.default_rng(0), 70)
    whole = engine.logits(ids)
    monkeypatch.setattr("gptq_compile.runtime.device.CpuDevice.prefill_tokens", 7)
    np.testing.assert_array_equal(engine.logits(np.array(ids)), whole)


def test_nll(engine: Engine, toy: ModuleType) -> None:
    ids = ids_of(np.random.default_rng(1), 80)
    logits = toy.reference_logits(ids, toy.toy_weights())[:-1]
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(79), ids[1:]]
    got = engine.nll(ids)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, atol=5e-5)
    with pytest.raises(RequestError, match="two tokens"):
        engine.nll([5])


def test_greedy(engine: Engine, toy: ModuleType) -> None:
    for prompt in ([65, 66], ids_of(np.random.default_rng(2), 30)):
        result = engine.generate(prompt, max_new_tokens=40, eos_token_id=[], return_dict_in_generate=True)
        assert result.token_ids == reference_greedy(toy, prompt, 40)
        assert result.finish_reason == "length" and result.prompt_tokens == len(prompt)
        assert result.tokens_per_second > 0


def test_text_prompts_get_bos_and_ids_are_taken_as_they_are(engine: Engine, toy: ModuleType) -> None:
    text = engine.generate("hi", 10, return_dict_in_generate=True)
    ids = engine.generate([toy.BOS, 104, 105], 10, return_dict_in_generate=True)
    bare = engine.generate([104, 105], 10, return_dict_in_generate=True)
    assert text.token_ids == ids.token_ids != bare.token_ids
    assert engine.generate(np.array([toy.BOS, 104, 105]), 10) == text.text


def test_repetition_penalty(engine: Engine, toy: ModuleType) -> None:
    result = engine.generate([65, 66, 67], 25, repetition_penalty=1.7, eos_token_id=[], return_dict_in_generate=True)
    assert result.token_ids == reference_greedy(toy, [65, 66, 67], 25, penalty=1.7)
    assert result.token_ids != reference_greedy(toy, [65, 66, 67], 25)


def test_a_huge_penalty_forbids_repetition_while_rows_come_and_go(engine: Engine) -> None:
    ends = list(range(0, 256, 5))  # sequences end at different steps, and others take their rows
    results = engine.generate(PROMPTS, 30, repetition_penalty=1e9, eos_token_id=ends, return_dict_in_generate=True)
    assert len({len(r.token_ids) for r in results}) > 2
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert len(set(result.token_ids)) == len(result.token_ids)
        assert not set(result.token_ids) & set(prompt.encode())


def test_sampling_settings_reach_the_sampler(engine: Engine, toy: ModuleType) -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 1, "top_p": 0.75, "min_p": 0.25, "seed": -3}
    prompt = [70, 71, 72]
    result = engine.generate(prompt, 20, do_sample=True, eos_token_id=[], return_dict_in_generate=True, **settings)
    ids = prompt + result.token_ids
    logits = toy.reference_logits(ids, toy.toy_weights())
    for position in range(len(prompt) - 1, len(ids) - 1):
        uniform = np.array([toy.hash_uniform(-3, position, v) for v in range(toy.VOCAB)])
        scores = logits[position] / 0.7 - np.log(-np.log(uniform)) * (1 + 1 + 0.25 + 0.25)
        assert scores[ids[position + 1]] > scores.max() - 1e-3


def test_seeds(engine: Engine) -> None:
    def run(seed: Any, prompt: Any = "seed") -> Any:
        return engine.generate(prompt, 20, do_sample=True, seed=seed)

    assert run(1) == run(1) != run(2)
    assert run([1, 2], ["seed", "seed"]) == [run(1), run(2)]
    with pytest.raises(RequestError, match="2 prompts and 3 seeds"):
        run([1, 2, 3], ["a", "b"])


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": [*range(7)]}, {"repetition_penalty": 1.3}])
def test_a_batch_of_n_is_n_singles(engine: Engine, settings: dict[str, Any]) -> None:
    # More prompts than the largest bucket (4), of lengths around the page size: rows join, leave and change buckets.
    batch = engine.generate(PROMPTS, 30, return_dict_in_generate=True, **settings)
    seeds = settings.get("seed", [0] * 7)
    for prompt, seed, result in zip(PROMPTS, seeds, batch, strict=True):
        single = engine.generate(prompt, 30, return_dict_in_generate=True, **{**settings, "seed": seed})
        assert (single.token_ids, single.text, single.finish_reason) == (
            result.token_ids, result.text, result.finish_reason,
        )  # fmt: skip


def test_prefill_in_chunks_across_sequences(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.generate(PROMPTS, 12)
    monkeypatch.setattr("gptq_compile.runtime.device.CpuDevice.prefill_tokens", 9)
    assert engine.generate(PROMPTS, 12) == whole


def test_a_small_cache_makes_sequences_wait(artifact: pathlib.Path, engine: Engine) -> None:
    with Engine.load(artifact, cache_tokens=80) as small:
        assert small.generate(PROMPTS, 20) == engine.generate(PROMPTS, 20)
        assert small.cache.free_pages == 5


def test_max_batch_1(artifact: pathlib.Path, engine: Engine) -> None:
    with Engine.load(artifact, max_batch=1) as one:
        assert one.generate(PROMPTS[:3], 9) == engine.generate(PROMPTS[:3], 9)


def test_generation_stops_at_the_context(engine: Engine, toy: ModuleType) -> None:
    for length in (80, 81, 95):
        prompt = ids_of(np.random.default_rng(3), length)
        result = engine.generate(prompt, 500, eos_token_id=[], return_dict_in_generate=True)
        assert len(result.token_ids) == 96 - length and result.finish_reason == "length"
        assert result.token_ids == reference_greedy(toy, prompt, 96 - length)


def test_prompts_beyond_the_context_are_refused_with_both_numbers(artifact: pathlib.Path, engine: Engine) -> None:
    for length in (96, 200):
        with pytest.raises(ContextError, match=rf"{length} tokens.*context is 96"):
            engine.generate([1] * length)
    with pytest.raises(ContextError, match=r"97 tokens.*holds 96"):
        engine.logits([1] * 97)
    with Engine.load(artifact, cache_tokens=32) as small:
        with pytest.raises(ContextError, match=r"40 tokens.*cache holds 32"):
            small.generate([1] * 40)
        with pytest.raises(ContextError, match="KV cache holds 32"):
            small.logits([1] * 33)
        assert len(small.generate([1] * 31, 9, eos_token_id=[], return_dict_in_generate=True).token_ids) == 1


def test_end_tokens(engine: Engine) -> None:
    tokens = engine.generate("end", 20, eos_token_id=[], return_dict_in_generate=True).token_ids
    end = tokens[6]
    first = tokens.index(end)
    result = engine.generate("end", 20, eos_token_id=end, return_dict_in_generate=True)
    assert result.token_ids == tokens[: first + 1] and result.finish_reason == "eos"


def script(engine: Engine, monkeypatch: pytest.MonkeyPatch, texts: dict[int, str], eos: int) -> None:
    """Makes the sampler emit a given text for each prompt length; everything else stays as it is."""

    def sample(logits: Any, *columns: Any) -> Any:
        lengths, positions = (engine._device.download(columns[i]) for i in (4, 5))
        tokens = []
        for length, position in zip(lengths, positions, strict=True):
            text = texts.get(int(length), "").encode()
            at = int(position) + 1 - int(length)
            tokens.append(text[at] if at < len(text) else eos)
        return engine._device.tensor(np.array(tokens, "int32"))

    monkeypatch.setattr(engine._model, "sample", sample)


def test_streaming_of_multi_byte_text(engine: Engine, toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # The seed tells the scripted sampler which row is whose: it is the prompt's length.
    texts = {3: "héllo 🌍, 日本語", 5: "ÅÄÖ stop🛑here", 7: ""}
    script(engine, monkeypatch, texts, toy.EOS)
    prompts = [[1] * n for n in texts]
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for index, piece in engine.generate(prompts, seed=list(texts), stream=True, stop="🛑"):
        pieces[index].append(piece)
    assert ["".join(p) for p in pieces.values()] == ["héllo 🌍, 日本語", "ÅÄÖ stop", ""]
    assert all("\ufffd" not in p for row in pieces.values() for p in row)
    assert "🌍" in pieces[0] and len(pieces[0]) == len(texts[3])
    results = engine.generate(prompts, seed=list(texts), stop="🛑", return_dict_in_generate=True)
    assert [r.text for r in results] == ["".join(p) for p in pieces.values()]
    assert [r.finish_reason for r in results] == ["eos", "stop", "eos"]


def test_stop_strings_on_generated_text(engine: Engine) -> None:
    text = engine.generate("stop strings", 40, eos_token_id=[])
    stop = text[12:15]
    result = engine.generate(
        "stop strings", 40, eos_token_id=[], stop=["never there", stop], return_dict_in_generate=True
    )
    assert result.text == text[: text.index(stop)] and result.finish_reason == "stop"
    assert "".join(engine.generate("stop strings", 40, eos_token_id=[], stop=stop, stream=True)) == result.text


def test_streaming_is_lazy_and_gives_its_pages_back(engine: Engine) -> None:
    total = engine.cache.free_pages
    unread = engine.generate("never read", 40, eos_token_id=[], stream=True)
    assert engine.cache.free_pages == total
    stream = engine.generate("left early", 40, eos_token_id=[], stream=True)
    next(stream)
    assert engine.cache.free_pages < total
    stream.close()
    assert engine.cache.free_pages == total
    del unread


def test_two_streams_interleave(engine: Engine) -> None:
    whole = [engine.generate(p, 30, eos_token_id=[]) for p in ("first", "second")]
    streams = [engine.generate(p, 30, eos_token_id=[], stream=True) for p in ("first", "second")]
    texts = ["", ""]
    done = [False, False]
    while not all(done):
        for i, stream in enumerate(streams):
            piece = next(stream, None)
            done[i] = piece is None
            texts[i] += piece or ""
    assert texts == whole


def test_threads_share_an_engine(engine: Engine) -> None:
    expected = [engine.generate(p, 25, do_sample=True, seed=3) for p in PROMPTS]
    got: list[str | None] = [None] * len(PROMPTS)

    def run(i: int) -> None:
        got[i] = engine.generate(PROMPTS[i], 25, do_sample=True, seed=3)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == expected


def test_invalid_logits_end_only_their_own_sequence(
    engine: Engine, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = engine._model.sample

    def spoiled(logits: Any, *columns: Any) -> Any:
        tokens = engine._device.download(sample(logits, *columns))
        seeds, positions = (engine._device.download(columns[i]) for i in (4, 5))
        return engine._device.tensor(np.where((seeds == 9) & (positions >= 8), np.int32(-1), tokens))

    good = engine.generate("good one", 20, eos_token_id=[])
    monkeypatch.setattr(engine._model, "sample", spoiled)
    stream = engine.generate("good one", 20, eos_token_id=[], stream=True)
    text = next(stream)
    with pytest.raises(LogitsError, match="NaN or infinite logits"):
        engine.generate([1, 2, 3], 20, seed=9, eos_token_id=[])
    assert text + "".join(stream) == good


@pytest.mark.parametrize("entry", ["forward", "decode"])
def test_a_failing_call_leaves_the_engine_usable(engine: Engine, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    expected = engine.generate(PROMPTS[:3], 15)
    calls = []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == (1 if entry == "forward" else 4):
            raise RuntimeError("CUDA: launch failure\nTraceback of the FFI")
        return original(*args)

    if entry == "forward":
        original = engine._model.forward
        monkeypatch.setattr(engine._model, "forward", failing)
    else:
        original = engine._model.decode[4]
        monkeypatch.setitem(engine._model.decode, 4, failing)
    with pytest.raises(DeviceError, match="failed while it ran: CUDA: launch failure"):
        engine.generate(PROMPTS[:3], 15)
    assert engine.cache.free_pages == 25
    assert engine.generate(PROMPTS[:3], 15) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no prompt"), ([[]], "non-empty"), ([1, 300], "Token 300"), ([-1], "Token -1"), ([["a"]], "whole numbers")],
)
def test_bad_prompts_are_refused(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(prompt)


def test_bad_load_arguments_are_refused(artifact: pathlib.Path) -> None:
    with pytest.raises(RequestError, match="max_batch"):
        Engine.load(artifact, max_batch=0)
    with pytest.raises(RequestError, match="cache_tokens"):
        Engine.load(artifact, cache_tokens=0)
    with pytest.raises(DeviceError, match="Unknown device 'tpu'"):
        Engine.load(artifact, device="tpu")
    with pytest.raises(DeviceError, match="compiled for cpu"):
        Engine.load(artifact, device="cuda")


def test_an_artifact_without_tokenizer_takes_ids(copy: pathlib.Path, toy: ModuleType) -> None:
    (copy / "tokenizer.json").unlink()
    toy.write_manifest(copy, toy.manifest())
    with Engine.load(copy) as engine:
        assert engine.tokenizer is None
        assert len(engine.generate([1, 2], 5, eos_token_id=[], return_dict_in_generate=True).token_ids) == 5
        with pytest.raises(RequestError, match="no tokenizer"):
            engine.generate("text")


def test_chat_and_defaults(engine: Engine) -> None:
    assert engine.chat_prompt([{"role": "user", "content": "Hi"}]).endswith("[user]Hi[/]\n[assistant]")
    assert engine.generation_defaults == {"temperature": 0.7}
    assert engine.context_length == 96
