# SPDX-License-Identifier: Apache-2.0
"""Perplexity against its definition, and the texts it is measured on."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest
from numpy.typing import NDArray

from gptq_compile.errors import ConfigError
from gptq_compile.eval.perplexity import perplexity
from gptq_compile.eval.text import dataset_text, read_text


class Bigram:
    """A model whose next-token distribution depends on the current token only; remembers what it was given."""

    def __init__(self, vocabulary: int = 11) -> None:
        logits = np.random.default_rng(1).standard_normal((vocabulary, vocabulary)) * 3
        self.log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        self.windows: list[list[int]] = []

    def nll(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        self.windows.append(ids.tolist())
        return -self.log_p[ids[:-1], ids[1:]]


IDS = np.random.default_rng(2).integers(0, 11, 103)


@pytest.mark.parametrize(("window", "windows", "count"), [(10, None, 10), (10, 3, 3), (103, None, 1), (2, 99, 51)])
def test_perplexity_is_exp_of_the_mean_over_scored_tokens(window: int, windows: int | None, count: int) -> None:
    model, told = Bigram(), []
    result = perplexity(model, IDS, window=window, windows=windows, on_window=lambda *a: told.append(a))
    total = sum(
        -model.log_p[IDS[w * window + i - 1], IDS[w * window + i]] for w in range(count) for i in range(1, window)
    )
    assert result.perplexity == pytest.approx(math.exp(total / (count * (window - 1))), rel=1e-12)
    assert (result.windows, result.window, result.tokens) == (count, window, count * (window - 1))
    assert model.windows == [IDS[w * window : (w + 1) * window].tolist() for w in range(count)]
    assert [t[:2] for t in told] == [(i + 1, count) for i in range(count)]
    assert told[-1][2] == pytest.approx(result.perplexity)


def test_standard_error_over_windows() -> None:
    result = perplexity(Bigram(), IDS, window=10)
    assert result.stderr == pytest.approx(np.std(result.per_window, ddof=1) / math.sqrt(10))
    assert perplexity(Bigram(), IDS, window=103).stderr == 0


@pytest.mark.parametrize(("window", "windows"), [(1, None), (0, None), (104, None), (10, 0)])
def test_impossible_windows_are_refused(window: int, windows: int | None) -> None:
    with pytest.raises(ConfigError):
        perplexity(Bigram(), IDS, window=window, windows=windows)


def test_texts_from_files(tmp_path: pathlib.Path) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("naïve\n", "utf-8")
    rows.write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert read_text(str(plain)) == "naïve\n"
    assert read_text(str(rows)) == "one\n\ntwo"
    rows.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(ConfigError, match="Line 2"):
        read_text(str(rows))


def test_texts_from_data_sets(tmp_path: pathlib.Path) -> None:
    datasets = pytest.importorskip("datasets")
    assert datasets
    folder = tmp_path / "set"
    folder.mkdir()
    for split, words in (("train", ["x"]), ("test", ["one", "two"])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"n": 1, "text": w}) + "\n" for w in words))
    assert dataset_text(str(folder)) == "one\n\ntwo"
    assert dataset_text(f"{folder}::train") == "x"
    with pytest.raises(ConfigError, match="NAME"):
        dataset_text(str(tmp_path / "nothing-here"))
