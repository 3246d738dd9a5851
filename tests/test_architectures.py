# SPDX-License-Identifier: Apache-2.0
"""Architectures end to end: traced, rounded to 4 bits, compiled for the CPU, run; no code per architecture anywhere."""

from __future__ import annotations

import pathlib

import pytest

from tests.compile_check import check

BAR = 1e-5
DENSE = ("llama", "qwen3", "mistral", "opt", "bloom", "gpt2", "gpt_neox", "gemma2", "gemma3_text", "phi3")
EXPERTS = ("qwen3_moe", "gpt_oss", "mixtral", "olmoe")


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_compiled_logits_are_those_of_transformers(name: str, tmp_path: pathlib.Path) -> None:
    outcome = check(name, tmp_path, group_size=16)
    # At least attention's linears in both layers, and the rounding is large beside the bar: logits of the model before
    # quantization would not pass.
    assert outcome.quantized >= 4 and outcome.changed > 10 * BAR
    if name in EXPERTS:  # both linears of the experts in each layer besides attention's four
        assert outcome.quantized == 12
    assert outcome.prefill <= BAR
    assert outcome.step <= BAR


@pytest.mark.parametrize("name", ("llama", "opt"))
def test_activations_of_8_bits_are_near(name: str, tmp_path: pathlib.Path) -> None:
    outcome = check(name, tmp_path, group_size=16, activations="int8")
    assert 1e-8 < outcome.prefill < 2e-3 and outcome.prefill < outcome.changed / 4
    assert 1e-8 < outcome.step < 2e-3


@pytest.mark.parametrize("name", ("llama", "gpt_oss"))
def test_keys_and_values_in_fewer_bits_are_near(name: str, tmp_path: pathlib.Path) -> None:
    for cache, low, high in (("float16", 1e-11, BAR), ("int8", 1e-7, 5e-3)):
        folder = tmp_path / cache  # a library is loaded once from one path
        folder.mkdir()
        outcome = check(name, folder, group_size=16, cache=cache)
        assert low < outcome.prefill < high and outcome.prefill < outcome.changed / 4
        assert low < outcome.step < high
