# SPDX-License-Identifier: Apache-2.0
"""The in-place factorization and the split products that GPUs use, on the CPU against LAPACK and float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from gptq_compile.passes.gptq import quadratic
from gptq_compile.passes.gptq.triangular import cholesky_, invert_lower_


def positive_definite(k: int) -> torch.Tensor:
    x = torch.randn(k, 2 * k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return x @ x.T / k + 0.1 * torch.eye(k, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 100, 161])
def test_factor_and_inverse_match_lapack(k: int) -> None:
    h = positive_definite(k)
    expected = torch.linalg.cholesky(h)
    matrix = h.clone()
    matrix[torch.triu_indices(k, k, 1).unbind()] = float("nan")  # only the lower triangle is read
    assert int(cholesky_(matrix, block=32)) == 0
    torch.testing.assert_close(matrix.tril(), expected)
    inverse = invert_lower_(matrix, block=32)
    torch.testing.assert_close(inverse, torch.linalg.inv(expected))


def test_an_indefinite_matrix_is_told() -> None:
    h = positive_definite(80)
    h[70, 70] = -1.0
    assert int(cholesky_(h, block=32)) != 0


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e5])
def test_split_quadratic_is_as_exact_as_float32(magnitude: float) -> None:
    generator = torch.Generator().manual_seed(1)
    h = positive_definite(150)
    h /= h.diagonal().mean()
    rows = torch.randn(70, 150, generator=generator) * magnitude * torch.rand(70, 1, generator=generator)
    rows[3] = 0
    expected = ((rows.double() @ h) * rows.double()).sum(1)
    with mock.patch.object(quadratic, "_CHUNK", 64):
        got = quadratic._split(rows, h.float())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_split_quadratic_under_a_dominating_direction() -> None:
    """Errors that GPTQ has pushed out of the one large direction, whose energy must not swamp theirs."""
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(200, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    h = 200 * torch.outer(direction, direction) + 0.01 * torch.eye(200, dtype=torch.float64)
    rows = torch.randn(40, 200, generator=generator, dtype=torch.float64)
    rows = (rows - torch.outer(rows @ direction, direction)).float()
    expected = ((rows.double() @ h) * rows.double()).sum(1)
    torch.testing.assert_close(quadratic._split(rows, h.float()), expected, rtol=1e-3, atol=0)
