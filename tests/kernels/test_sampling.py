# SPDX-License-Identifier: Apache-2.0
"""Sampling against float64, against Hugging Face's warpers, and against the distribution it must draw from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.kernels import reference
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.tvm_env import tvm
from tests.gpu.cases_ops import ALL_SETTINGS, Settings, sampling_arguments, sampling_cases
from tests.kernels import op_runner

CASES = sampling_cases()
# 99.9 % quantiles of chi-square, by degrees of freedom.
CHI_SQUARE_999 = {4: 18.47, 9: 27.88, 11: 31.26}


@pytest.fixture(scope="module")
def sample():
    """The compiled entry, vocabulary symbolic."""
    func = op_runner.select(Case.make("sample", "float32"), op_runner.CPU, op_runner.kernels("cpu")).kernel
    library = tvm.compile(func.prim_func(Case.make("sample", "float32"), op_runner.CPU), target=op_runner.CPU.tvm())

    def call(arguments):
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arguments]
        library["sample"](*tensors)
        return tensors[-1].numpy()

    return call


def _rows(logits, setting: Settings, seeds, positions):
    """Arguments for one distribution drawn many times."""
    n = len(positions)
    columns = (setting.temperature, setting.top_k, setting.top_p, setting.min_p)
    types = (np.float32, np.int32, np.float32, np.float32)
    return [
        np.tile(np.asarray(logits, np.float32), (n, 1)),
        *(np.full(n, value, dtype) for value, dtype in zip(columns, types, strict=True)),
        np.broadcast_to(np.asarray(seeds, np.int32), n),
        np.asarray(positions, np.int32),
        np.full(n, -77, np.int32),
    ]


@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.name)
def test_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case, most=17)


@pytest.mark.parametrize(
    ("setting", "kept"),
    [(Settings(1.0), 12), (Settings(0.7), 12), (Settings(1.0, 5), 5), (Settings(2.0, 10), 10)],
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_follow_the_distribution(sample, setting, kept, vary):
    logits = np.linspace(-1.5, 1.5, 12)[np.random.default_rng(1).permutation(12)]
    draws = 20000
    seeds = np.arange(draws) * 7 if vary == "seed" else 1234
    positions = np.arange(draws) if vary == "position" else np.full(draws, 9)
    tokens = sample(_rows(logits, setting, seeds, positions))
    p = np.where(reference.sampling_keep(logits, setting.temperature, setting.top_k, 1.0, 0.0), 1.0, 0.0)
    p *= np.exp(logits / setting.temperature)
    expected = p / p.sum() * draws
    counts = np.bincount(tokens, minlength=12)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    assert some.sum() == kept
    chi_square = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    assert chi_square < CHI_SQUARE_999[kept - 1]


def test_consecutive_draws_are_independent(sample):
    """Pairs of draws at neighbouring positions of one seed fill a table like independent ones."""
    tokens = sample(_rows(np.zeros(4), Settings(1.0), 5, np.arange(40001)))
    table = np.zeros((4, 4))
    np.add.at(table, (tokens[:-1], tokens[1:]), 1)
    assert ((table - 2500) ** 2 / 2500).sum() < 37.70  # 99.9 % of chi-square with 15 degrees of freedom


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(1, 700),
    ties=st.booleans(),
    setting=st.builds(
        Settings, st.floats(0.05, 5.0), st.integers(0, 800), st.floats(0.0, 1.0), st.sampled_from([0.0, 0.02, 0.3, 1.0])
    ),
)
def test_kept_tokens_are_those_of_a_sort(sample, seed, vocabulary, ties, setting):
    """Every token drawn is kept by the sorting reference, and the uniform picks the same one."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-4, 5, vocabulary) * 0.5 if ties else rng.standard_normal(vocabulary) * 3
    arguments = _rows(logits, setting, rng.integers(-(2**31), 2**31, 24), rng.integers(0, 2**31, 24))
    tokens = sample(arguments)
    assert (tokens >= 0).all() and (tokens < vocabulary).all()
    # Settings on the very edge (a probability equal to a threshold up to rounding) may fall either way.
    top_p = min(setting.top_p * (1 + 1e-5) + 1e-6, 1.0)
    loose = reference.sampling_keep(
        arguments[0][0], setting.temperature, setting.top_k, top_p, setting.min_p * (1 - 1e-4)
    )
    assert loose[tokens].all()
    assert (tokens != reference.sample(*arguments[:7])).sum() <= 1


@pytest.mark.parametrize("setting", [s for s in ALL_SETTINGS if s.temperature and s.top_p], ids=str)
def test_kept_tokens_are_those_of_hugging_face(setting):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = torch.tensor(np.random.default_rng(2).standard_normal((1, 8000)) * 3, dtype=torch.float32)
    warpers: list[Any] = [hf.TemperatureLogitsWarper(setting.temperature)]
    warpers += [hf.TopKLogitsWarper(setting.top_k)] if setting.top_k else []
    warpers += [hf.TopPLogitsWarper(setting.top_p)] if setting.top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(setting.min_p)] if setting.min_p else []
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    keep = reference.sampling_keep(logits[0].numpy(), setting.temperature, setting.top_k, setting.top_p, setting.min_p)
    assert (keep != torch.isfinite(scores[0]).numpy()).sum() == 0


def test_penalty_is_that_of_hugging_face():
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(2).standard_normal((1, 50)).astype(np.float32)
    tokens = torch.tensor([[3, 9, 9, 41]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(tokens, torch.tensor(logits)).numpy()
    seen = np.zeros((1, 50), np.uint8)
    seen[0, tokens.numpy()] = 1
    np.testing.assert_allclose(reference.repetition_penalty(logits, seen, np.array([1.3])), expected, rtol=1e-6)


def test_draws_do_not_depend_on_the_other_rows(sample):
    arguments = sampling_arguments(np.random.default_rng(4), 33, 1000)
    together = sample(arguments)
    alone = np.concatenate([sample([a[i : i + 1] for a in arguments]) for i in range(33)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, sample(arguments))


def test_uniform_is_what_the_kernel_draws_with(sample):
    """Over equally likely tokens the token is the uniform, scaled: pins the hash, for negative seeds too."""
    seeds, positions = np.array([0, 1, -1, 2**31 - 1, -(2**31), 77]), np.array([0, 1, 2**31 - 1, 5, 0, 4096])
    tokens = sample(_rows(np.zeros(1 << 16), Settings(1.0), seeds, positions))
    uniforms = [reference.uniform(int(s), int(p)) for s, p in zip(seeds, positions, strict=True)]
    np.testing.assert_array_equal(tokens, np.floor(np.array(uniforms) * (1 << 16)))
    assert reference.uniform(0, 0) == pytest.approx(0.0, abs=1.0) and len(set(uniforms)) == 6


def test_rows_without_a_distribution_are_marked(sample):
    logits = np.random.default_rng(0).standard_normal((6, 37)).astype(np.float32)
    logits[0, 36] = np.nan
    logits[1] = -np.inf
    logits[2, 11] = np.inf
    logits[3, :36] = -np.inf
    logits[4, 7] = -np.nan
    for setting in (Settings(0.0), Settings(1.0), Settings(1.0, 5, 0.9, 0.1)):
        arguments = _rows(np.zeros(37), setting, 3, np.arange(6))
        arguments[0] = logits
        tokens = sample(arguments)
        assert list(tokens[:5]) == [-1, -1, -1, 36, -1] and tokens[5] >= 0


def test_greedy_takes_the_lowest_index_of_a_tie(sample):
    logits = np.full(100, -1.0)
    logits[[17, 60, 99]] = 2.5
    assert list(sample(_rows(logits, Settings(0.0, 5, 0.5), 1, np.arange(3)))) == [17] * 3


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e38])
def test_extreme_logits(sample, scale):
    """Denormal products, and sums that would overflow, still follow the rules."""
    logits = np.array([-1.0, 1.0, 0.5, -0.0, 0.0]) * scale
    arguments = _rows(logits, Settings(1.0, 2, 0.9), 1, np.arange(50))
    assert set(sample(arguments)) <= {1, 2}


@op_runner.needs_gxx
@pytest.mark.parametrize("op_case", CASES[6:7] + CASES[10:], ids=lambda c: c.name)
def test_cuda_source_matches_float64(op_case, tmp_path):
    op_runner.check_emulated(op_case, 3, tmp_path)


@op_runner.needs_nvcc
def test_cuda_machine_code(tmp_path):
    op_runner.check_nvcc([CASES[3], CASES[9]], tmp_path)
