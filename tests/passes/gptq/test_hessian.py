# SPDX-License-Identifier: Apache-2.0
"""The Hessian accumulator against numpy, and against itself on other splits of the calibration set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptq_compile.errors import CalibrationError
from gptq_compile.passes.gptq.hessian import Hessian, column_blocks


def tokens(count: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_numpy(dtype: torch.dtype, weighted: bool) -> None:
    x = tokens(120, 24).to(dtype)
    d = tokens(120, 1).abs().flatten() if weighted else torch.ones(120)
    h = Hessian(24)
    h.add(x.view(2, 60, 24), d.view(2, 60) if weighted else None)
    xn, dn = x.double().numpy(), d.double().numpy()
    np.testing.assert_allclose(h.matrix().numpy(), 2 / 120 * (xn.T * dn) @ xn, rtol=2e-5, atol=2e-6)
    assert h.tokens == 120


def test_does_not_depend_on_the_split() -> None:
    x, d = tokens(300, 16), torch.linspace(0, 3, 300)
    whole = Hessian(16, torch.float64)
    whole.add(x, d)
    cut = Hessian(16, torch.float64)
    for a, b in ((0, 1), (1, 250), (250, 250), (250, 300)):
        cut.add(x[a:b], d[a:b])
    left, right = Hessian(16, torch.float64), Hessian(16, torch.float64)
    left.add(x[:77], d[:77])
    right.add(x[77:], d[77:])
    left.merge(right)
    for other in (cut, left):
        assert other.tokens == 300
        torch.testing.assert_close(other.matrix(), whole.matrix(), rtol=1e-13, atol=1e-13)
    doubled = Hessian(16, torch.float64)
    doubled.add(x, d)
    doubled.add(x, d)
    torch.testing.assert_close(doubled.matrix(), whole.matrix(), rtol=1e-13, atol=1e-13)


def test_integer_weight_equals_repetition_up_to_count() -> None:
    x = tokens(10, 4)
    weighted, repeated = Hessian(4), Hessian(4)
    d = torch.ones(10)
    d[0] = 4
    weighted.add(x, d)
    repeated.add(torch.cat([x, x[:1], x[:1], x[:1]]))
    torch.testing.assert_close(weighted.matrix() * 10, repeated.matrix() * 13)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_activations_are_named(value: float) -> None:
    x = tokens(5, 8)
    h = Hessian(8, name="model.layers.3.mlp.down_proj input")
    h.add(x)
    x[2, 6] = value
    with pytest.raises(CalibrationError, match=r"layers\.3\.mlp\.down_proj input.*token 7, feature 6"):
        h.add(x)
    assert torch.isfinite(h.matrix()).all()


def test_refusals() -> None:
    h = Hessian(8, name="x")
    with pytest.raises(CalibrationError, match="never run"):
        h.matrix()
    h.add(tokens(0, 8))
    assert h.tokens == 0
    with pytest.raises(CalibrationError, match="9 features"):
        h.add(tokens(3, 9))
    with pytest.raises(CalibrationError, match="3 tokens but 2 token weights"):
        h.add(tokens(3, 8), torch.ones(2))
    with pytest.raises(CalibrationError, match="not negative"):
        h.add(tokens(3, 8), torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(CalibrationError, match="float32 or float64"):
        Hessian(8, torch.float16)
    with pytest.raises(CalibrationError, match="differ in features"):
        h.merge(Hessian(9))
    h.add(torch.full((2, 8), 1e200, dtype=torch.float64))
    with pytest.raises(CalibrationError, match="overflowed"):
        h.matrix()


def test_tokens_that_are_not_finite_are_left_out_and_counted() -> None:
    x, d = tokens(10, 4), torch.ones(10)
    x[3, 1], x[7, 0], d[5] = float("nan"), float("-inf"), float("nan")
    some, rest = Hessian(4, drop_bad=True), Hessian(4)
    some.add(x, d)
    rest.add(x[[0, 1, 2, 4, 6, 8, 9]])
    assert (some.tokens, some.dropped) == (7, 3)
    torch.testing.assert_close(some.matrix(), rest.matrix())
    assert some.notes() == ["3 of 10 calibration tokens were not finite and left out"]
    assert rest.notes() == []


def test_sums_beyond_float32_are_kept_in_float64() -> None:
    x = tokens(20, 4)
    x[:, 2] *= 1e20
    huge, plain, parts = Hessian(4), Hessian(4, torch.float64), Hessian(4)
    huge.add(x[:10] * 1e-20)  # what was summed before stays
    huge.add(x)
    plain.add(x[:10] * 1e-20)
    plain.add(x)
    torch.testing.assert_close(huge.matrix(), plain.matrix())
    assert "summed in float64" in huge.notes()[0]
    parts.merge(huge)
    torch.testing.assert_close(parts.matrix(), huge.matrix())
    assert parts.notes() == huge.notes()


def test_too_few_tokens_and_constant_columns_are_noted() -> None:
    x = tokens(20, 4)
    x[:, 1], x[:, 2] = 3.0, 0.0  # a column of zeros is dead, which the factor reports
    h = Hessian(4)
    h.add(x)
    assert h.notes() == ["1 columns are constant over the calibration"]
    h = Hessian(4)
    h.add(x[:1])
    assert h.notes() == ["only 1 calibration tokens for 4 features"]


@pytest.mark.parametrize("weighted", [False, True])
def test_gathered_16_bit_tokens(weighted: bool) -> None:
    """What GPUs do: products of many tokens at once, only on and above the diagonal's blocks, mirrored at the end."""
    x = tokens(330, 200).bfloat16()
    d = torch.rand(330, generator=torch.Generator().manual_seed(1)) + 0.5
    h = Hessian(200, gather=100)
    h._blocks = column_blocks(200, 32)
    assert len(h._blocks) > 2
    for part in (slice(0, 7), slice(7, 250), slice(250, 330)):
        h._add_halves(x[part], d[part].sqrt() if weighted else None)
        h.tokens += x[part].shape[0]
    z = (x.float() * d.sqrt().unsqueeze(1)).bfloat16().double() if weighted else x.double()
    torch.testing.assert_close(h.matrix().double(), z.T @ z * 2 / 330, rtol=1e-5, atol=1e-5)
    exact = (x.double().T * (d.double() if weighted else 1.0)) @ x.double() * 2 / 330
    # Rounding sqrt(d) x to 8 bits is the only approximation.
    assert float((h.matrix() - exact).norm() / exact.norm()) < (2e-3 if weighted else 1e-6)


def test_taking_the_matrix_equals_reading_it() -> None:
    h = Hessian(16)
    h.add(tokens(40, 16))
    expected = h.matrix()
    torch.testing.assert_close(h.take(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("features", "count"), [(576, 1), (4096, 2), (14336, 8), (49152, 8)])
def test_column_blocks_cover_the_columns(features: int, count: int) -> None:
    blocks = column_blocks(features)
    assert len(blocks) == count
    assert [a for a, _ in blocks] + [features] == [0] + [b for _, b in blocks]
