# SPDX-License-Identifier: Apache-2.0
"""Several processes that quantize one model together: each runs its share of the calibration sequences, Hessians are
added up, and each solves its share of a linear's rows. With one process everything here does nothing."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.factor import Factor
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.solution import RowErrors, Solution
from gptq_compile.passes.gptq.solver import finished, solve

T = TypeVar("T")

_MIN_ROWS = 16  # rows of a share below which every process solves all of them


@dataclass(frozen=True)
class World:
    """This process (``rank``) of ``size``."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> slice:
        """The items of ``count`` that are this process's: contiguous, and equal to within one."""
        return slice(*(count * r // self.size for r in (self.rank, self.rank + 1)))

    def add_up(self, hessian: Hessian) -> None:
        """Adds up what the processes' accumulators of one value have seen; all then hold the sum."""
        if self.size > 1:
            hessian.all_reduce()

    def mean(self, values: Tensor) -> float:
        """The mean over what all processes hold; 0 if that is nothing."""
        total = torch.stack([values.double().sum(), torch.tensor(float(values.numel()), device=values.device).double()])
        if self.size > 1:
            dist.all_reduce(total)
        return float(total[0] / total[1].clamp(min=1))

    def agree(self, value: T) -> T:
        """Rank 0's value: what each process measured for itself may differ in the last bits, and decisions must not."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def solve(self, weight: Tensor, factor: Factor, config: QuantizeConfig, name: str) -> Solution:
        """``solver.solve`` with the rows shared among the processes; all get the whole solution."""
        rows = weight.shape[0]
        # Where groups follow the activation order, whether rounding is better is decided for all rows together.
        if self.size == 1 or rows < _MIN_ROWS * self.size or config.permutes:
            return solve(weight, factor, config, name=name)
        part = solve(weight[self.share(rows)], factor, config, name=name)
        counts = [len(range(*World(r, self.size).share(rows).indices(rows))) for r in range(self.size)]

        def whole(tensor: Tensor) -> Tensor:
            return _gather(tensor, counts)

        errors = part.row_errors
        joined = replace(
            part,
            codes=whole(part.codes),
            scales=whole(part.scales),
            zeros=None if part.zeros is None else whole(part.zeros),
            row_errors=None
            if errors is None
            else RowErrors(
                whole(errors.objective),
                whole(errors.objective_rtn),
                whole(errors.energy),
                whole(errors.from_rtn.to(torch.uint8)).bool(),
            ),
        )
        return finished(joined, factor, config)


def _gather(tensor: Tensor, counts: list[int]) -> Tensor:
    """Concatenates the processes' rows, of which process r has ``counts[r]``."""
    room = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    room[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(room) for _ in counts]
    dist.all_gather(parts, room)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def current() -> World:
    """The processes of torch.distributed's default group, or this one alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


def join(device: torch.device) -> torch.device:
    """Joins the other processes where ``torchrun`` started several.

    Args:
        device: where this process was told to compute.

    Returns:
        Where it computes: of several GPUs the one with its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
