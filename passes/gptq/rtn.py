# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: the baseline, and the last rung of the ladder."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from gptq_compile.errors import ModelError
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.grid import fit_groups
from gptq_compile.passes.gptq.solution import Solution, no_errors


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse weights that no grid can hold.

    Raises:
        ModelError: NaN or infinite weights.
    """
    bad = ~torch.isfinite(weight)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ModelError(
            f"The weight of {name} holds {int(bad.sum())} NaN or infinite values, first at row {row}, column {column}; "
            "the checkpoint is damaged."
        )


@torch.no_grad()
def rtn(weight: Tensor, config: QuantizeConfig, *, name: str = "linear") -> Solution:
    """Quantize without a Hessian.

    Args:
        weight: [N, K], any float type.
        config: Settings; the calibration ones are not read.
        name: Module path, for messages.

    Returns:
        The solution in natural column order (g_idx None); errors are NaN.

    Raises:
        ConfigError: The group is larger than the layer.
        ModelError: NaN or infinite weights.
    """
    start = time.perf_counter()
    config.validate_for_layer(weight.shape[1], name)
    check_weight(weight, name)
    grid = fit_groups(weight, config.wbits, config.sym, config.group_size, config.clips, min_zero=config.min_zero)
    codes = grid.quantize(weight)
    stats = no_errors("rtn", None, time.perf_counter() - start)
    return Solution(codes, grid.scales, grid.zeros, None, config.wbits, grid.group_size, stats)
