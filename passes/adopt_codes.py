# SPDX-License-Identifier: Apache-2.0
"""``adopt_codes``: linears of a checkpoint that is quantized already take its codes as they are.

The float weights of the trace stand for dequantized ones; here each linear on one becomes a ``quant_linear`` on the
checkpoint's codes, scales, zero points and order of groups, bit for bit. They are unpacked whenever they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gptq_compile.errors import ModelError
from gptq_compile.passes.common import Node, is_call, is_param
from gptq_compile.passes.gptq_quantize import LinearReport
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program

ops = torch.ops.gptq_compile
aten = torch.ops.aten

_TRANSPOSED = ".T"  # ends the name of a parameter that Normalize turned into a linear's weight


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that a checkpoint stores as codes.

    Attributes:
        bits: of a code. ``group_size``: columns of a full group. ``shape``: rows (out) and columns (in).
        groups: of a row.
        codes: reads uint8 ``[out, in]``. ``scales``: reads float32 ``[out, groups]``, float16 numbers.
        zeros: reads uint8 ``[out, groups]``; None for the symmetric ``2^(bits-1)``.
        g_idx: int32 ``[in]`` group of each column, or None for ``k // group_size``.
    """

    bits: int
    group_size: int
    shape: tuple[int, int]
    groups: int
    codes: Callable[[], Tensor]
    scales: Callable[[], Tensor]
    zeros: Callable[[], Tensor] | None
    g_idx: Tensor | None


class AdoptCodes(Pass):
    """Puts the codes of a checkpoint into the program.

    Args:
        weights: parameter name -> its codes.
        on_linear: called with the report of each linear and (index, total).

    Attributes:
        reports: one a linear, without errors: nobody has the weights it was made from.
    """

    name = "adopt_codes"

    def __init__(
        self,
        weights: Mapping[str, QuantizedWeight],
        on_linear: Callable[[LinearReport, int, int], None] | None = None,
    ) -> None:
        self.weights, self.on_linear = weights, on_linear
        self.reports: list[LinearReport] = []

    def run(self, program: Program) -> bool:
        done: dict[str, None] = {}
        for node in list(program.graph.nodes):
            if not is_call(node, aten.linear.default) or not is_param(node.args[1]):
                continue
            name = node.args[1].meta["param"]
            base = name.removesuffix(_TRANSPOSED)
            weight = self.weights.get(base)
            if weight is None:
                continue
            self._rewrite(program, node, name, weight)
            if base not in done:
                done[base] = None
                self._report(name, weight)
        if left := [name for name in self.weights if name not in done]:
            raise ModelError(
                f"The checkpoint has codes for {left[0]!r}, which the model uses otherwise than as the weight of a "
                "linear layer. Give the float16, bfloat16 or float32 checkpoint it was made from."
            )
        for node in list(program.graph.nodes):
            if node.op == "placeholder" and "param" in node.meta and not node.users:
                program.graph.erase_node(node)
        program.attrs["quantization"] = [asdict(r) for r in self.reports]
        return bool(done)

    def _rewrite(self, program: Program, node: Node, name: str, weight: QuantizedWeight) -> None:
        x, _, *rest = node.args
        bias = rest[0] if rest else node.kwargs.get("bias")
        grid = (weight.shape[0], weight.groups)

        def lazy(key: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], Tensor]) -> Node:
            program.params.add(f"{name}.{key}", shape, dtype, load)
            return program._placeholder(f"{name}.{key}")

        codes = lazy("codes", weight.shape, torch.uint8, weight.codes)
        scales = lazy("scales", grid, torch.float32, weight.scales)
        zeros = None if weight.zeros is None else lazy("zeros", grid, torch.uint8, weight.zeros)
        g_idx = None if weight.g_idx is None else program.add_param(f"{name}.g_idx", weight.g_idx)
        with program.graph.inserting_before(node):
            args = (x, codes, scales, zeros, g_idx, bias, weight.bits, weight.group_size)
            new = program.call(ops.quant_linear.default, args, like=node)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)

    def _report(self, name: str, weight: QuantizedWeight) -> None:
        report = LinearReport(
            name=name,
            shape=weight.shape,
            bits=weight.bits,
            group_size=weight.group_size,
            method="checkpoint",
            error=None,
            error_rtn=None,
            damp=0.0,
            dead_columns=0,
            note=None,
            seconds=0.0,
        )
        self.reports.append(report)
        if self.on_linear:
            self.on_linear(report, len(self.reports), len(self.weights))
