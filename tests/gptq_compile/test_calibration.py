# SPDX-License-Identifier: Apache-2.0
"""Calibration ids: deterministic, of the asked shape, from every kind of source; sentences for unusable ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from gptq_compile.calibration import CalibrationConfig, load_calibration, windows
from gptq_compile.errors import CalibrationError

SMALL = CalibrationConfig(nsamples=5, seqlen=16)
TEXT = "".join(f"Sentence number {i} says {i * i}.\n" for i in range(200))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, save_tokenizer):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def load(spec, tokenizer, config=SMALL, **kwargs):
    return load_calibration(str(spec), tokenizer, config, vocab_size=258, **kwargs)


def refusal(spec, tokenizer, config=SMALL, **kwargs) -> str:
    with pytest.raises(CalibrationError) as error:
        load(spec, tokenizer, config, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_text_windows_are_pieces_of_the_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    ids = load(tmp_path / "a.txt", tokenizer)
    assert ids.shape == (5, 16) and ids.dtype == np.int64
    for row in ids:
        assert tokenizer.decode(row) in TEXT
    assert len({tuple(row) for row in ids}) > 1
    assert np.array_equal(ids, load(tmp_path / "a.txt", tokenizer))
    assert not np.array_equal(ids, load(tmp_path / "a.txt", tokenizer, CalibrationConfig(5, 16, seed=1)))


def test_windows_cover_both_ends():
    ids = np.arange(10)
    rows = windows(ids, CalibrationConfig(nsamples=200, seqlen=8), "x")
    assert set(rows[:, 0]) == {0, 1, 2}
    assert (np.diff(rows, axis=1) == 1).all()
    assert np.array_equal(windows(ids, CalibrationConfig(2, 10), "x"), [ids, ids])


def test_jsonl_documents_are_joined(tmp_path, tokenizer):
    documents = ["first document", 'second, with "quotes" and é']
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d, "id": 1}) + "\n\n" for d in documents))
    joined = "\n\n".join(documents) + "\n\n"
    size = len(tokenizer(joined)["input_ids"])
    ids = load(tmp_path / "a.jsonl", tokenizer, CalibrationConfig(1, size))
    assert tokenizer.decode(ids[0]) == joined


def test_stored_ids(tmp_path, tokenizer, caplog):
    rows = np.random.default_rng(0).integers(0, 258, (6, 20)).astype(np.int32)
    np.save(tmp_path / "rows.npy", rows)
    assert np.array_equal(load(tmp_path / "rows.npy", tokenizer), rows[:5, :16])
    wide = load(tmp_path / "rows.npy", tokenizer, CalibrationConfig(9, 99))
    assert np.array_equal(wide, rows) and wide.dtype == np.int64
    assert "has 6 rows of 20 tokens" in caplog.text
    np.save(tmp_path / "flat.npy", np.arange(100, dtype=np.uint16))
    flat = load(tmp_path / "flat.npy", tokenizer)
    assert flat.shape == (5, 16) and (np.diff(flat, axis=1) == 1).all()


def test_data_set(tmp_path, tokenizer, monkeypatch):
    """The real loader of the datasets package, on a local folder, which it takes for a name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    lines = TEXT.splitlines()
    (folder / "train.jsonl").write_text("".join(json.dumps({"id": "x", "text": line}) + "\n" for line in lines[:100]))
    (folder / "validation.jsonl").write_text("".join(json.dumps({"id": "y", "text": t}) + "\n" for t in lines[100:]))
    config = CalibrationConfig(3, 12)
    for spec, part in ((f"{folder}", lines[:100]), (f"{folder}:default:validation", lines[100:])):
        ids = load(spec, tokenizer, config)
        text = tokenizer.decode(load(spec, tokenizer, CalibrationConfig(1, 2000))[0])
        assert any(line in text for line in part) and not any(f"{line}\n" in text for line in set(lines) - set(part))
        assert np.array_equal(ids, load(spec, tokenizer, config))
    assert refusal(f"{folder}:default:nosuch", tokenizer).startswith(
        f"{folder}:default:nosuch is neither a file here nor a data set that can be loaded ("
    )


def test_self_generated(tokenizer):
    calls = []

    def generate(prompts, count, seed):
        calls.append((prompts.copy(), count, seed))
        return np.random.default_rng(seed).integers(2, 258, (len(prompts), count))

    config = CalibrationConfig(nsamples=5, seqlen=9, seed=3, batch=2)
    ids = load("self", tokenizer, config, generate=generate)
    assert ids.shape == (5, 9)
    assert [(p.shape, count) for p, count, _ in calls] == [((2, 1), 8), ((2, 1), 8), ((1, 1), 8)]
    assert len({seed for *_, seed in calls}) == 3
    assert (ids[::2, 0] == 0).all()  # the beginning-of-sequence token
    assert (ids[1::2, 0] > 1).all()  # ordinary ones
    assert np.array_equal(ids[:2, :1], calls[0][0])
    assert np.array_equal(ids, load_calibration(None, tokenizer, config, vocab_size=258, generate=generate))
    other = load("self", tokenizer, CalibrationConfig(5, 9, seed=4, batch=2), generate=generate)
    assert not np.array_equal(ids, other)


def test_self_needs_a_generator(tokenizer):
    assert refusal("self", tokenizer) == (
        "Calibration on the model's own text needs a way to generate it; give a text file."
    )


def test_generator_of_the_wrong_shape(tokenizer):
    said = refusal("self", tokenizer, generate=lambda prompts, count, seed: np.zeros((len(prompts), count + 1)))
    assert said == "The generator returned ids of shape [5, 16] where [5, 15] were asked for."


@pytest.mark.parametrize("content", ["", " \n\n "])
def test_empty_text(tmp_path, tokenizer, content):
    (tmp_path / "a.txt").write_text(content)
    assert refusal(tmp_path / "a.txt", tokenizer) == (
        f"The calibration text of {tmp_path / 'a.txt'} is empty; give a text of more than 16 tokens."
    )


def test_short_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("too short")
    assert refusal(tmp_path / "a.txt", tokenizer) == (
        f"The calibration text of {tmp_path / 'a.txt'} has 9 tokens, but one sequence takes 16; give a longer text "
        "or a smaller --seqlen."
    )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.npy"])
def test_absent_file(tmp_path, tokenizer, name):
    assert refusal(tmp_path / name, tokenizer) == f"The calibration file {tmp_path / name} does not exist."


@pytest.mark.parametrize("line", ["{", '{"txt": "x"}', "3", "[]", '{"text": 3}'])
def test_bad_jsonl(tmp_path, tokenizer, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    said = refusal(tmp_path / "a.jsonl", tokenizer).lower()
    assert "line 2 of " in said and '"text" field' in said


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf8(tmp_path, tokenizer, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    assert refusal(tmp_path / name, tokenizer).startswith(f"The calibration file {tmp_path / name} is not UTF-8 text (")


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2, 2), int), np.zeros(40), np.array([None])], ids=["3d", "float", "object"]
)
def test_bad_ids(tmp_path, tokenizer, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    assert "a.npy" in refusal(tmp_path / "a.npy", tokenizer)


@pytest.mark.parametrize(("low", "high"), [(0, 258), (-1, 5)])
def test_ids_of_another_tokenizer(tmp_path, tokenizer, low, high):
    np.save(tmp_path / "a.npy", np.array([low, high] * 20))
    assert refusal(tmp_path / "a.npy", tokenizer) == (
        f"The calibration ids of {tmp_path / 'a.npy'} run from {low} to {high}, outside the model's vocabulary of 258: "
        "they are from another tokenizer."
    )


@pytest.mark.parametrize("settings", [{"nsamples": 0}, {"seqlen": 0}, {"batch": 0}, {"seed": -1}])
def test_bad_settings(settings):
    with pytest.raises(CalibrationError, match=f"{next(iter(settings))} is "):
        CalibrationConfig(**settings)
