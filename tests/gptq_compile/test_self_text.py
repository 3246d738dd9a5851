# SPDX-License-Identifier: Apache-2.0
"""The text that a model writes: as it would greedily and by chance, in parts where memory is short, for tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gptq_compile import self_text
from gptq_compile.frontend.source import load_source
from gptq_compile.passes.gptq.config import QuantizeConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., object]) -> Path:
    where = tmp_path_factory.mktemp("model")
    save_model(where)
    return where


def test_tokens_are_drawn_from_the_models_distribution(folder: Path) -> None:
    """Against the probabilities of transformers, for the second token of one prompt drawn 4,000 times."""
    from transformers import AutoModelForCausalLM

    count = 4000
    generate = self_text.generator(load_source(str(folder)), "cpu", count, lambda _: None)
    drawn = generate(np.full((count, 1), 70), 1, seed=1)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[70]])).logits[0, -1]
    expected = count * torch.softmax(logits.double(), -1).numpy()
    seen = np.bincount(drawn[:, 0], minlength=258)
    assert np.square(seen - expected).sum() < 1.5 * expected.sum()  # its mean is just below that of one count a token


def test_where_memory_is_short_halves_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, asked = self_text._sample, []

    def short(model: torch.nn.Module, prompts: torch.Tensor, *rest: object) -> torch.Tensor:
        asked.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("no room")
        return sample(model, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(self_text, "_sample", short)
    prompts = np.arange(10, 17)[:, None]
    source = load_source(str(folder))
    written = self_text.generator(source, "cpu", 35, lambda _: None)(prompts, 5, seed=0)
    assert asked == [7, 4, 2, 2, 3] and written.shape == (7, 5)
    assert len(np.unique(written, axis=0)) == 7
    monkeypatch.setattr(self_text, "_sample", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        self_text.generator(source, "cpu", 5, lambda _: None)(prompts[:1], 5, seed=0)


def test_text_to_tune_on_is_not_the_calibration_text(folder: Path) -> None:
    source, notes = load_source(str(folder)), []
    config = QuantizeConfig(nsamples=16, seqlen=8, tune_epochs=1, tune_nsamples=12, seed=2)
    seeds: list[int] = []

    def remember(generate: self_text.Generate) -> self_text.Generate:
        def noted(prompts: np.ndarray, count: int, seed: int) -> np.ndarray:
            seeds.append(seed)
            return generate(prompts, count, seed)

        return noted

    first = self_text.text_to_tune_on(source, config, 8, "cpu", notes.append, remember)
    assert first.shape == (12, 8) and first.min() >= 0 and first.max() < 258
    assert min(seeds) >= config.seed + config.nsamples  # a batch of calibration text has the seed of its first row
    assert np.array_equal(first, self_text.text_to_tune_on(source, config, 8, "cpu", notes.append))
    assert notes[-1].startswith("wrote 84 of 96 tokens")


def test_a_gpu_writes_more_at_a_time() -> None:
    assert self_text.settings_for(128, 2048, 0, "cpu").batch < self_text.settings_for(128, 2048, 0, "cuda:1").batch
