# SPDX-License-Identifier: Apache-2.0
"""The C++ tokenizer against ``tokenizers``: the same tokens, the same text, or a refusal in words."""

from __future__ import annotations

import hashlib
import json
import pathlib
import pydoc_data.topics
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TAIL}"
QWEN = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{TAIL}"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*+[\r\n]|\s+(?!\S)|\s+"
)

DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + TAIL,
)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(use_regex: bool, prefix: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


NFC = normalizers.NFC()
# Name -> normalizer, pre-tokenizer, whether pieces that are tokens are not merged.
KINDS: dict[str, tuple[Any, Any, bool]] = {
    "gpt2": (None, byte_level(True), False),
    "prefix": (None, byte_level(True, prefix=True), False),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(True)]), False),
    "starcoder": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(False), byte_level(True, True)]), False),
    "llama3": (None, pre_tokenizers.Sequence([split(LLAMA3), byte_level(False)]), True),
    "qwen": (normalizers.Sequence([NFC]), pre_tokenizers.Sequence([split(QWEN), byte_level(False)]), False),
    "o200k": (NFC, pre_tokenizers.Sequence([split(O200K), byte_level(False)]), True),
    "cl100k": (None, pre_tokenizers.Sequence([split(CL100K, "removed", True), byte_level(False)]), False),
    "deepseek": (None, pre_tokenizers.Sequence([*map(split, DEEPSEEK), byte_level(False)]), False),
    "merged": (None, pre_tokenizers.Sequence([split(r"[-\s]", "merged_with_previous"), byte_level(False)]), False),
    "words": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), byte_level(False)]), False),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<mask>", "<r>", "<tool>", "<|im", "\n\n\n"]
WORDS = [
    *SPECIAL, "Hello", "world", " ", "  ", "\n", "\r\n", "\t", "don't", "I'LL", "we'Ve", "\u017f", "'\u017f", "123",
    "4567", "3.14", "\u00e9", "e\u0301", "na\u00efve", "\u65e5\u672c\u8a9e", "\uc548\ub155", "\U0001f642", "...",
    "\U0001f469\u200d\U0001f467", "!!", "\u00a0", "\u2028", "a_b", "==>", "\u212a", "\u00bd", "\u2167",
]  # fmt: skip
BLOCKS = [
    (0x20, 0x7F), (0, 0x20), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x900, 0xE00), (0x1100, 0x1200),
    (0x1E00, 0x2100), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xFB00, 0xFB50), (0x1F300, 0x1F650),
    (0, 0xD800), (0xE000, 0x110000),
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    def part() -> str:
        if rng.random() < 0.6:
            return rng.choice(WORDS)
        return "".join(chr(rng.randrange(*rng.choice(BLOCKS))) for _ in range(rng.randrange(1, 4)))

    return "".join(part() for _ in range(rng.randrange(14)))


def save(tokenizer: Tokenizer, path: pathlib.Path, **changes: Any) -> pathlib.Path:
    """Writes a tokenizer.json; ``a__b=c`` sets its member b of a."""
    document = json.loads(tokenizer.to_str())
    for name, value in changes.items():
        *parents, last = name.split("__")
        target = document
        for parent in parents:
            target = target[parent]
        target[last] = value
    path.write_text(json.dumps(document))
    return path


def trained(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """A byte-level tokenizer of 900 tokens, trained on Python's own documentation, with added tokens of every kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    texts = [*[pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)][:8], "".join(WORDS) * 3]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens(["<|endoftext|>", AddedToken("<mask>", lstrip=True), AddedToken("<r>", rstrip=True)])
    tokenizer.add_special_tokens(["<|im_start|>"])
    plain = [AddedToken("\u00e9", normalized=True), AddedToken("\n\n\n", normalized=False), AddedToken("<|im")]
    tokenizer.add_tokens(["<tool>", *plain])
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens_and_text(kind: str, driver: Any, tmp_path: pathlib.Path) -> None:
    normalizer, pre_tokenizer, ignore_merges = KINDS[kind]
    path = save(trained(normalizer, pre_tokenizer), tmp_path / "tokenizer.json", model__ignore_merges=ignore_merges)
    tokenizer = Tokenizer.from_file(str(path))
    assert driver("tokenizer", path) == "ok"
    rng = random.Random(kind)
    for i in range(250):
        text = random_text(rng)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert driver("encode", text) == (",".join(map(str, ids)) or "-"), ascii(text)
        if i % 2:  # any tokens at all: bytes that make no character
            ids = [rng.randrange(tokenizer.get_vocab_size() + 2) for _ in range(rng.randrange(8))]
        for skip in (False, True):
            decoded = tokenizer.decode(ids, skip_special_tokens=skip)
            assert driver("decode", skip, ids) == (decoded.encode().hex() or "-"), ids
    long = "ab " * 3000 + "a" * 20000
    assert driver("encode", long) == ",".join(map(str, tokenizer.encode(long, add_special_tokens=False).ids))


REPLACE = normalizers.Replace(" ", "\u2581")
SENTENCEPIECE: dict[str, tuple[Any, Any, Any]] = {
    # Llama 2, Mistral: a space in front of every text, which decoding takes away.
    "llama2": (normalizers.Sequence([normalizers.Prepend("\u2581"), REPLACE]), None, decoders.Strip(" ", 1, 0)),
    # Gemma: nothing in front.
    "gemma": (REPLACE, pre_tokenizers.Split(" ", "merged_with_previous"), None),
}


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@pytest.mark.parametrize("unknown", ["bytes", "fused", "single"])
def test_characters_with_bytes_to_fall_back_on(kind: str, unknown: str, driver: Any, tmp_path: pathlib.Path) -> None:
    normalizer, pre_tokenizer, strip = SENTENCEPIECE[kind]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if strip is None else [*steps, strip])
    bytes_ = [f"<0x{b:02X}>" for b in range(256 if unknown == "bytes" else 0x90)]
    text = [line for k in sorted(pydoc_data.topics.topics)[:6] for line in pydoc_data.topics.topics[k].splitlines()]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    )
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if not t["content"].startswith("<0x")]
    document["model"] |= {"byte_fallback": unknown != "single", "fuse_unk": unknown == "fused"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    tokenizer = Tokenizer.from_file(str(path))
    assert driver("tokenizer", path) == "ok"
    rng = random.Random(kind)
    for i in range(250):
        text_ = random_text(rng) + rng.choice(["", "<s>", " <s> a", "</s>\u2581"])
        ids = tokenizer.encode(text_, add_special_tokens=False).ids
        assert driver("encode", text_) == (",".join(map(str, ids)) or "-"), ascii(text_)
        if i % 2:
            ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(8))]
        for skip in (False, True):
            decoded = tokenizer.decode(ids, skip_special_tokens=skip)
            assert driver("decode", skip, ids) == (decoded.encode().hex() or "-"), ids


def test_streamed_pieces_are_those_of_the_python_runtime(driver: Any, tmp_path: pathlib.Path) -> None:
    from gptq_compile.runtime import tokenizer as python

    path = save(trained(None, byte_level(True)), tmp_path / "tokenizer.json")
    tokenizer = python.Tokenizer(path, None, False)
    driver("tokenizer", path)
    rng = random.Random(0)
    for _ in range(100):
        ids = tokenizer.encode(random_text(rng) + "\U0001f642") + [rng.randrange(900) for _ in range(rng.randrange(4))]
        decoder = python.IncrementalDecoder(tokenizer)
        pieces = [decoder.push(i) for i in ids] + [decoder.flush()]
        assert driver("pieces", ids) == ",".join(p.encode().hex() or "-" for p in pieces), ids


def test_bytes_that_are_no_text(driver: Any, tmp_path: pathlib.Path) -> None:
    path = save(trained(None, byte_level(True)), tmp_path / "tokenizer.json")
    driver("tokenizer", path)
    rng = random.Random(1)
    for _ in range(200):
        data = bytes(rng.choice((0x41, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xF0, 0x9F, 0xED, 0xA0, 0xFF)) for _ in range(6))
        assert driver("encode", data) == driver("encode", data.decode("utf-8", "replace")), data


def test_tables_are_those_of_the_library(driver: Any) -> None:
    """Categories at both ends of every range, and compositions, as the installed library has them."""
    source = pathlib.Path(__file__).parents[3] / "runtime" / "cpp" / "unicode_categories.inc"
    text = source.read_text()
    starts = [int(w, 16) >> 8 for w in text.split("kSpaces")[0].replace(",", " ").split() if w[:2] == "0x"]
    codes = sorted({c for s in starts for c in (s - 1, s) if c >= 0 and not 0xD800 <= c < 0xE000})
    assert len(codes) > 4000
    text = "".join(map(chr, codes))
    for pattern in (r"\s", *(rf"\p{{{name}}}" for name in ("L", "N", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "P", "S"))):
        spans = split(pattern, "removed", True).pre_tokenize_str(text)
        assert driver("match", pattern, text) == "".join(f"{a}-{b}," for _, (a, b) in spans), pattern
    apart = "xx".join(text)
    digits = [span for _, span in pre_tokenizers.Digits(True).pre_tokenize_str(apart) if span[1] - span[0] == 1]
    assert driver("match", r"\p{N}", apart) == "".join(f"{a}-{b}," for a, b in digits)
    rng = random.Random(0)
    marked = [0x41, 0x65, 0x1100, 0x1161, 0x11A8, 0xAC00, 0x915, 0x93C, 0x5E9, 0x5BC, 0x5C1, 0x1D157, 0x1D165]
    for _ in range(500):
        word = "".join(chr(rng.choice(marked) if rng.random() < 0.4 else rng.randrange(0x300, 0x345)) for _ in range(6))
        assert driver("nfc", word) == NFC.normalize_str(word).encode().hex(), ascii(word)
    every = "x".join(map(chr, [*range(0xA0, 0x3100), *range(0xF900, 0xFB50)]))
    assert driver("nfc", every) == NFC.normalize_str(every).encode().hex()


@pytest.mark.parametrize(
    "changes",
    [
        {"model__type": "WordPiece"},
        {"model__dropout": 0.1},
        {"model__continuing_subword_prefix": "##"},
        {"model__end_of_word_suffix": "</w>"},
        {"normalizer": {"type": "NFKC"}},
        {"decoder": {"type": "Metaspace"}},
        {"decoder": None},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}, {"type": "ByteLevel"}]}},
        {
            "added_tokens": [
                {
                    "id": 1,
                    "content": "x",
                    "single_word": True,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": False,
                }
            ]
        },
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], driver: Any, tmp_path: pathlib.Path) -> None:
    path = save(trained(None, byte_level(True)), tmp_path / "tokenizer.json", **changes)
    answer = driver("tokenizer", path)
    assert answer.startswith((f"error: {path} has ", f"error: {path} sets ")), answer
    assert answer.endswith("Use token ids, or the Python runtime.")


@pytest.mark.parametrize(
    "pattern", [r"\w+", "(ab)+", r"(?<=a)b", "^a", r"\p{Han}", "[a&&b]", "[[a]]", r"\1", "a**", "(?>a)"]
)
def test_other_patterns_are_refused(pattern: str, driver: Any) -> None:
    assert driver("match", pattern, "ab").startswith(f"error: The tokenizer's pattern {pattern} "), pattern


def test_json_and_hashes(driver: Any) -> None:
    good = ["{}", "[1, -2.5e3, true, null]", '{"a": {"b": "\\u00e9\\ud83d\\ude42\\n"}}', " 0 ", '""', "-0.0", "[[]]"]
    bad = [
        "", "{", "[1,]", '{"a":1,}', "01", "+1", "1.", "nul", '"\\x"', '"\\ud83d"', '"a', '{"a":1,"a":2}', "[1] 2",
        "NaN", "[" * 100 + "]" * 100, '"\x01"', "\x00", "{1:2}", "1e", "--1", '"\\u12g4"',
    ]  # fmt: skip
    for text in good:
        assert not driver("json", text).startswith("error"), text
    for text in bad:
        assert driver("json", text).startswith("error: the text is not valid JSON: "), text
    assert driver("json", b'"\xff"').startswith("error: the text is not valid JSON: ")
    for size in [*range(0, 200, 7), 55, 56, 63, 64, 65, 119, 120, 128]:
        data = random.Random(size).randbytes(size)
        for portable in (False, True):
            assert driver("sha256", data, portable) == hashlib.sha256(data).hexdigest()
