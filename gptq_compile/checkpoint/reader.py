# SPDX-License-Identifier: Apache-2.0
"""A GPTQ checkpoint as the rest of the frontend sees one: float weights under their names, and codes beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gptq_compile.checkpoint.config import GptqConfig
from gptq_compile.checkpoint.modules import PARTS, find_modules, how_zeros_are_stored, quantized_weight
from gptq_compile.errors import ModelError
from gptq_compile.frontend.checkpoint import Checkpoint
from gptq_compile.passes.adopt_codes import QuantizedWeight
from gptq_compile.passes.dialect import dequantize


class QuantizedCheckpoint(Checkpoint):
    """Tensors of a folder, with ``X.weight`` dequantized in the place of ``X.qweight`` and what belongs to it.

    Attributes:
        config: its settings. ``notes``: what the user should know about it.
        weights: name of a (dequantized) tensor -> its codes.
    """

    def __init__(self, folder: Path, config: GptqConfig, transposed: frozenset[str]) -> None:
        """Opens every shard and checks every quantized linear.

        Args:
            folder: where it lies. ``config``: its settings.
            transposed: names of weights that the model stores as ``[in, out]`` (GPT-2's Conv1D).

        Raises:
            ModelError: naming the tensor that is missing, of another shape, or contradicts the config.
        """
        super().__init__(folder)
        self.config = config
        modules = find_modules(self, config)
        how, self.notes = how_zeros_are_stored(modules, config)
        self.weights: dict[str, QuantizedWeight] = {}
        self._transposed: set[str] = set()
        coarse = [n for n in modules if self.stored_dtype(f"{n}.scales") != "F16"]
        if coarse:
            self.notes.append(
                f"Scales stored as {self.stored_dtype(coarse[0] + '.scales')} ({len(coarse)} linears, first "
                f"{coarse[0]}) are rounded to float16."
            )
        for name, module in modules.items():
            weight = f"{name}.weight"
            if weight in self.shapes:
                raise ModelError(f"{folder} has both {weight!r} and {name + '.qweight'!r}. Keep one of them.")
            self.weights[weight] = made = quantized_weight(module, how, config.sym)
            turned = any(t == weight or t.endswith("." + weight) for t in transposed)
            if turned:
                self._transposed.add(weight)
            self._file_of[weight] = self._file_of[f"{name}.qweight"]
            self._dtypes[weight] = "F32"
            for part in PARTS:
                self.shapes.pop(f"{name}.{part}", None)
            self.shapes[weight] = made.shape[::-1] if turned else made.shape

    def read(self, name: str) -> Tensor:
        """Reads one tensor, or dequantizes one."""
        if name not in self.weights:
            return super().read(name)
        weight = self.weights[name]
        zeros = None if weight.zeros is None else weight.zeros()
        made = dequantize(weight.codes(), weight.scales(), zeros, weight.g_idx, weight.bits, weight.group_size)
        return made.t().contiguous() if name in self._transposed else made

    def bound(self, origins: Mapping[str, str]) -> dict[str, QuantizedWeight]:
        """The codes under the model's parameter names.

        Args:
            origins: parameter name -> name in the checkpoint, of the tensors that are taken as they are.

        Raises:
            ModelError: a quantized linear, or its bias, has no place in the model.
        """
        taken = {key: name for name, key in origins.items()}
        for weight in self.weights:
            if weight not in taken:
                raise ModelError(
                    f"The checkpoint {self.folder} has codes for {weight.removesuffix('.weight')!r}, which is no "
                    "linear layer of its own in the model (experts, for example, which it holds in one tensor). Give "
                    "the float16, bfloat16 or float32 checkpoint it was made from."
                )
            bias = weight.removesuffix("weight") + "bias"
            if bias in self.shapes and bias not in taken and bool(self.read(bias).any()):
                raise ModelError(f"The checkpoint {self.folder} has a bias {bias!r}, which the model has no place for.")
        return {taken[weight]: codes for weight, codes in self.weights.items()}


def transposed_weights(model: Any) -> frozenset[str]:
    """Names of the weights that a model stores as ``[in, out]``."""
    return frozenset(f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D")


def stored_bits(weight: QuantizedWeight) -> int:
    """Bits of a quantized weight: codes, a float16 scale a group and, on asymmetric grids, a uint8 zero point."""
    rows, columns = weight.shape
    grid = 16 if weight.zeros is None else 24
    return rows * (8 * math.ceil(columns * weight.bits / 8) + weight.groups * grid)
