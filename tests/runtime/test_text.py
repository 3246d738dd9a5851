# SPDX-License-Identifier: Apache-2.0
"""Incremental text, stop strings and chat prompts."""

from __future__ import annotations

import itertools
import pathlib
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.runtime.chat import chat_prompt
from gptq_compile.runtime.errors import RequestError
from gptq_compile.runtime.sampling import SamplingSettings
from gptq_compile.runtime.sequence import Sequence
from gptq_compile.runtime.tokenizer import IncrementalDecoder, StopScanner, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    toy.write_tokenizer(path)
    return Tokenizer(path, toy.BOS, True)


def test_bos_is_put_first_once(tokenizer: Tokenizer, toy: ModuleType) -> None:
    assert tokenizer.encode("hi") == [toy.BOS, ord("h"), ord("i")]
    assert tokenizer.encode("<bos>hi") == [toy.BOS, ord("h"), ord("i")]


def test_bos_is_left_out_where_the_model_does_not_want_it(toy: ModuleType, tmp_path: pathlib.Path) -> None:
    toy.write_tokenizer(tmp_path / "t.json")
    assert Tokenizer(tmp_path / "t.json", toy.BOS, False).encode("hi") == [ord("h"), ord("i")]


def test_saved_truncation_and_padding_are_ignored(toy: ModuleType, tmp_path: pathlib.Path) -> None:
    import tokenizers

    toy.write_tokenizer(tmp_path / "t.json")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    saved.enable_truncation(2)
    saved.enable_padding(length=9)
    saved.save(str(tmp_path / "t.json"))
    assert len(Tokenizer(tmp_path / "t.json", None, False).encode("four")) == 4


def test_characters_come_out_whole(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(b) for b in "aé🌍".encode()]
    assert pieces == ["a", "", "é", "", "", "", "🌍"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_of_any_text_join_to_it(tokenizer: Tokenizer, text: str) -> None:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(b) for b in text.encode()]
    pieces.append(decoder.flush())
    assert "".join(pieces) == text


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=30))
def test_pieces_of_any_bytes_join_to_their_decoding(tokenizer: Tokenizer, data: bytes) -> None:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(b) for b in data]
    pieces.append(decoder.flush())
    assert "".join(pieces) == data.decode(errors="replace")


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_scanner_cuts_at_the_first_stop_however_text_arrives(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(stops)
    ends = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    shown, stopped = "", False
    for begin, end in itertools.pairwise(ends):
        shown += scanner.push(text[begin:end])
        if scanner.stopped:
            stopped = True
            break
    shown += scanner.flush()
    # The first stop to become complete ends the text at its own beginning, unless another began earlier in that push.
    if stopped:
        assert any(text.startswith(shown + s) for s in stops)
        complete = min(text.find(s) + len(s) for s in stops if s in text)
        assert len(shown) <= complete
    else:
        assert shown == text and not any(s in text for s in stops)


def sequence(tokenizer: Tokenizer, text: bytes, **kwargs: object) -> Sequence:
    made = Sequence([1], SamplingSettings(max_new_tokens=100, **kwargs), 100, tokenizer)  # type: ignore[arg-type]
    for byte in text:
        made.accept(byte)
    return made


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer: Tokenizer) -> None:
    made = Sequence([1], SamplingSettings(stop=("END", "\n\n")), 100, tokenizer)
    shown = []
    for byte in "héE\nEND tail".encode():
        made.accept(byte)
        shown.append("".join(made.pieces))
    assert made.finish_reason == "stop"
    assert made.result().text == "héE\n" == shown[-1]
    assert all(s in "héE\n" for s in shown)
    assert len(made.tokens) == len("héE\nEND".encode())


def test_held_back_text_comes_out_at_the_end(tokenizer: Tokenizer, toy: ModuleType) -> None:
    made = sequence(tokenizer, b"abcEN", stop=("END",), eos_token_ids=(toy.EOS,))
    assert "".join(made.pieces) == "abc"
    made.accept(toy.EOS)
    result = made.result()
    assert (result.text, result.finish_reason, result.token_ids[-1]) == ("abcEN", "eos", toy.EOS)
    assert "".join(made.pieces) == "abcEN"


def test_an_end_token_that_is_not_special_is_not_shown(tokenizer: Tokenizer) -> None:
    made = sequence(tokenizer, b"ab!cd", eos_token_ids=(ord("!"),))
    assert made.result().text == "ab" and made.result().token_ids == [97, 98, 33]


def test_an_incomplete_character_at_the_length_limit_is_replaced(tokenizer: Tokenizer) -> None:
    made = Sequence([1], SamplingSettings(), 2, tokenizer)
    for byte in b"a\xc3":
        made.accept(byte)
    assert made.result().text == "a�" and made.finish_reason == "length"


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.01},
        {"min_p": -0.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"seed": "1"}, {"stop": ("",)}, {"top_k": True},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=list(bad)[-1]):
        SamplingSettings(**bad)  # type: ignore[arg-type]


def test_seeds_wrap_to_32_bits() -> None:
    assert SamplingSettings(seed=2**31).device_row[4] == -(2**31)
    assert SamplingSettings(seed=2**32 + 5).device_row[4] == 5
    assert SamplingSettings(seed=-1).device_row[4] == -1


def test_chat_prompt(toy: ModuleType) -> None:
    chat = toy.manifest()["chat"]
    user = {"role": "user", "content": "Hi"}
    default = "<bos>[system]Be brief.[/]\n[user]Hi[/]\n"
    assert chat_prompt(chat, [user]) == default + "[assistant]"
    assert chat_prompt(chat, [user], add_generation_prompt=False) == default
    system = {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " long."}]}
    assert chat_prompt(chat, [system, user]) == "<bos>[system]Be long.[/]\n[user]Hi[/]\n[assistant]"
    assert chat_prompt({**chat, "default_system": None}, [user]) == "<bos>[user]Hi[/]\n[assistant]"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"content": "x"}], "role None"),
        (["hi"], "role None"),
        ([{"role": "user"}], "not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text"),
    ],
)
def test_bad_chats_are_refused(toy: ModuleType, messages: list[dict[str, object]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chat_prompt(toy.manifest()["chat"], messages)
    with pytest.raises(RequestError, match="no chat template"):
        chat_prompt(None, messages)
