# SPDX-License-Identifier: Apache-2.0
"""Runs stretches of a program over all calibration sequences."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptq_compile.errors import PassError
from gptq_compile.passes.common import Node
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.solution import Solution
from gptq_compile.passes.interpret import Interpreter
from gptq_compile.passes.program import Program
from gptq_compile.passes.token_parallel import check_token_parallel

log = logging.getLogger(__name__)

_TOKENS = 16384  # of one call on a GPU
_STAGE = 1 << 25  # bytes of a pinned buffer
Env = dict[Node, Any]


@dataclass
class Batch:
    """Sequences that run in one call.

    Attributes:
        sequences: how many, all of one length.
        values: what is live between two stretches, on the device or in pinned host memory.
    """

    sequences: int
    values: Env


class Runner:
    """Runs stretches of the graph for one batch of sequences after another with their parameters loaded once.

    Args:
        program: what to run.
        device: where.
        dtype: of the computation, see ``Interpreter``.
        offload: keep what is live between stretches in pinned host memory.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        self.program = program
        self.device = device
        self.interpreter = Interpreter(program, device, dtype)
        self.offload = offload and device.type == "cuda"
        self._writer = ThreadPoolExecutor(1, "park-solutions")
        self._pinned: list[Tensor] = []
        self._ahead: dict[tuple[Node, bool], Future[tuple[Tensor, Any]]] = {}
        self._reader = ThreadPoolExecutor(1, "read-weights")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._out = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()

    def batches(self, calibration: Tensor, sequences: int) -> list[Batch]:
        """The program's inputs for calibration ids ``[count, n]``, at most ``sequences`` a batch."""
        made = []
        for ids in calibration.split(sequences):
            count, n = ids.shape
            span = torch.arange(n, device=self.device)
            given = {
                "input_ids": ids.reshape(1, -1).to(self.device),
                "position_ids": span.repeat(count).reshape(1, -1),
                "logit_rows": torch.arange(count * n, device=self.device),
            }
            made.append(Batch(count, {node: given[node.name] for node in self.program.inputs}))
        return made

    def prefetch(self, params: Iterable[Node], exact: bool = False) -> None:
        """Starts reading parameters that will be asked for soon."""
        for node in params:
            if (node, exact) not in self._ahead:
                self._ahead[node, exact] = self._reader.submit(self._read, node, exact)

    def param(self, node: Node, exact: bool = False) -> Tensor:
        """A parameter on the device, in the type it is used in, or (``exact``) as it is stored."""
        ahead = self._ahead.pop((node, exact), None)
        if ahead is None:
            return (self.interpreter.stored if exact else self.interpreter.param)(node)
        tensor, ready = ahead.result()
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor

    def _read(self, node: Node, exact: bool) -> tuple[Tensor, Any]:
        read = self.interpreter.stored if exact else self.interpreter.param
        if self._stream is None:
            return read(node), None
        with torch.cuda.stream(self._stream):
            return read(node), self._stream.record_event()

    def load(self, nodes: list[Node], solved: dict[Node, Solution]) -> Env:
        """The parameters that ``nodes`` read; those that are solved have their quantized values."""
        dtype = self.interpreter.param_dtype
        return {
            p: solved[p].to(self.device).weight.to(dtype(p)) if p in solved else self.param(p) for p in params_of(nodes)
        }

    def park(self, weights: Iterable[Node], solutions: dict[Node, Solution]) -> None:
        """Moves solutions off the device, behind the back of what runs there."""
        if self._stream is None:
            return
        made = torch.cuda.current_stream(self.device).record_event()
        for weight in weights:
            self._writer.submit(self._move, weight, solutions, made)

    def _move(self, weight: Node, solutions: dict[Node, Solution], made: Any) -> None:
        assert self._out is not None
        with torch.cuda.stream(self._out):
            self._out.wait_event(made)
            solution = solutions[weight]
            codes = self._parked(solution.codes)
            solutions[weight] = replace(solution, codes=codes).to("cpu")

    def _parked(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, by way of two pinned buffers: a copy straight to pageable memory makes every launch of
        other threads wait until it is done."""
        assert self._out is not None
        if not self._pinned:
            self._pinned = [torch.empty(_STAGE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        source, into = (t.view(-1).view(torch.uint8) for t in (tensor.contiguous(), result))
        waiting: list[tuple[Any, Tensor, Tensor]] = []
        for i, (a, b) in enumerate(zip(source.split(_STAGE), into.split(_STAGE), strict=True)):
            stage = self._pinned[i % 2][: a.numel()]
            stage.copy_(a, non_blocking=True)
            waiting.append((self._out.record_event(), stage, b))
            if i:
                _unload(*waiting.pop(0))
        for one in waiting:
            _unload(*one)
        return result

    def run(self, known: Env, nodes: list[Node], live: Iterable[Node], loaded: Env, sequences: int = 1) -> Env:
        """The values of ``live`` that ``nodes`` make or that are ``known`` already, for one batch."""
        there = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in known.items()}
        made = set(nodes)
        want = [n for n in live if n in made or n in known]
        return self.interpreter.run({**there, **loaded}, want, nodes, sequences)

    def keep(self, batch: Batch, values: Env) -> None:
        """Makes ``values`` what the batch goes on from."""
        if not self.offload:
            batch.values = values
            return
        kept: Env = {}
        for node, value in values.items():
            if node in batch.values or not isinstance(value, Tensor):
                kept[node] = batch.values.get(node, value)  # only passed through
                continue
            kept[node] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            kept[node].copy_(value, non_blocking=True)
        batch.values = kept


def _unload(ready: Any, stage: Tensor, into: Tensor) -> None:
    ready.synchronize()
    into.copy_(stage)


def params_of(nodes: Iterable[Node]) -> list[Node]:
    """The parameters that nodes read, in graph order."""
    return list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if "param" in a.meta))


def compute_dtype(config: QuantizeConfig, program: Program, device: torch.device) -> torch.dtype:
    """The type in which calibration sequences run, see ``QuantizeConfig.compute_dtype``."""
    name = config.compute_dtype
    if name == "auto":
        stored = program.info.config.get("dtype") or program.info.config.get("torch_dtype")
        name = str(stored).removeprefix("torch.") if device.type == "cuda" else "float32"
        name = name if name in ("bfloat16", "float16") else "float32"
    return getattr(torch, name)


def sequences_per_call(program: Program, device: torch.device, tokens: int) -> int:
    """How many sequences of ``tokens`` tokens run together: on a GPU enough to keep it busy, if they may."""
    if device.type != "cuda" or tokens > _TOKENS // 2:
        return 1
    try:
        check_token_parallel(program)
    except PassError as error:
        log.info("Calibration sequences run one by one: %s", error)
        return 1
    return _TOKENS // tokens
