# SPDX-License-Identifier: Apache-2.0
"""Where finished solves may be kept, and a solve's form on disk: a safetensors file without anything executable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Protocol

import torch
from torch import Tensor

from gptq_compile.passes.gptq.solution import Solution, SolveStats


class SolutionStore(Protocol):
    """Keeps solutions beyond the process; linears are known by their weight's name."""

    def finished(self, name: str) -> Solution | None:
        """The kept solution of a linear, on the CPU, or None."""

    def keep(self, solutions: Mapping[str, Solution]) -> None:
        """Keeps the linears that one solve finished, all or none; durable on return."""


def dump(solutions: Mapping[str, Solution]) -> bytes:
    """The linears of one solve as one safetensors file: codes packed, stats in the header; exact both ways.

    What is not kept: the per-row errors, which only serve to cut a stacked solution.
    """
    import safetensors.numpy  # torch's flavour refuses the one g_idx that stacked linears share

    tensors: dict[str, Tensor] = {}
    about = {}
    for name, solution in solutions.items():
        tensors[f"{name}.codes"] = _pack(solution.codes.cpu(), solution.bits)
        tensors[f"{name}.scales"] = solution.scales.cpu().contiguous()
        for key, value in (("zeros", solution.zeros), ("g_idx", solution.g_idx)):
            if value is not None:
                tensors[f"{name}.{key}"] = value.cpu().contiguous()
        about[name] = {
            "columns": solution.codes.shape[1],
            "bits": solution.bits,
            "group_size": solution.group_size,
            "stats": asdict(solution.stats),
        }
    arrays = {key: value.numpy() for key, value in tensors.items()}
    return safetensors.numpy.save(arrays, {"solutions": json.dumps(about)})


def load(content: bytes) -> dict[str, Solution]:
    """What :func:`dump` wrote.

    Raises:
        ValueError, KeyError: it is something else.
    """
    import safetensors.numpy

    try:
        arrays = safetensors.numpy.load(content)
    except safetensors.SafetensorError as e:
        raise ValueError(str(e)) from e
    tensors = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    length = int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["solutions"])
    return {
        name: Solution(
            codes=_unpack(tensors[f"{name}.codes"], entry["bits"], entry["columns"]),
            scales=tensors[f"{name}.scales"],
            zeros=tensors.get(f"{name}.zeros"),
            g_idx=tensors.get(f"{name}.g_idx"),
            bits=entry["bits"],
            group_size=entry["group_size"],
            stats=SolveStats(**entry["stats"]),
        )
        for name, entry in about.items()
    }


def _lanes(bits: int) -> int:
    """Codes in a byte: powers of two, so that 3 bits take 4."""
    return 4 if bits <= 2 else 2 if bits <= 4 else 1


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes u8[N, K] -> u8[N, ceil(K / lanes)]; code j of a byte lies in bits j * 8 / lanes and up."""
    lanes = _lanes(bits)
    if lanes == 1:
        return codes.contiguous()
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % lanes)).unflatten(1, (-1, lanes))
    packed = torch.zeros(padded.shape[:2], dtype=torch.uint8)
    for lane in range(lanes):
        packed |= padded[:, :, lane] << (lane * 8 // lanes)
    return packed


def _unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    lanes = _lanes(bits)
    if lanes == 1:
        return packed
    width = 8 // lanes
    parts = [(packed >> (lane * width)) & ((1 << width) - 1) for lane in range(lanes)]
    return torch.stack(parts, dim=2).flatten(1)[:, :columns].contiguous()
