# SPDX-License-Identifier: Apache-2.0
"""A tiny model quantized, exported to ONNX and run by onnxruntime beside the program's reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from gptq_compile.onnx.lowering import Lowering
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.program import Program
from tests.architectures import traced


def rounded(program: Program, wbits: int = 4, group_size: int = 32, sym: bool = False) -> Program:
    """The program with its linears rounded to nearest."""
    settings = QuantizeConfig(wbits=wbits, group_size=group_size, sym=sym, method="rtn")
    PassManager([GptqQuantize(settings)], validate=False).run(program)
    return program


def quantized(name: str, *, group_size: int = 32, **changes: Any) -> Program:
    """The tiny model ``name`` at 4 bits."""
    return rounded(traced(name, **changes), group_size=group_size)


def export(program: Program, folder: Path) -> OrtModel:
    """The exported program in onnxruntime."""
    Lowering(program).run().write(folder / "model.onnx", folder / "model.onnx.data", {}, "")
    return OrtModel(folder / "model.onnx")


class OrtModel:
    """An exported model on one CPU thread, with the cache passed along as past and present."""

    def __init__(self, path: Path, library: Path | None = None) -> None:
        options = ort.SessionOptions()
        if library is not None:
            options.register_custom_ops_library(str(library))
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.proto = onnx.load(path, load_external_data=False)
        self._inputs = self.session.get_inputs()
        self._outputs = [o.name for o in self.session.get_outputs()]

    def operators(self) -> set[str]:
        """Names of the operators in the graph."""
        return {node.op_type for node in self.proto.graph.node}

    def logits(self, ids: np.ndarray, chunks: list[int]) -> np.ndarray:
        """Float32 ``[batch, n, vocab]`` of ids ``[batch, n]`` that are fed in pieces of these lengths."""
        return np.concatenate(list(self._steps(ids, chunks)), axis=1)

    def _steps(self, ids: np.ndarray, chunks: list[int]) -> Iterator[np.ndarray]:
        batch, start = len(ids), 0
        cache = {
            i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self._inputs
            if i.name.startswith("past_key_values.")
        }
        assert sum(chunks) == ids.shape[1]
        for length in chunks:
            end = start + length
            feeds = {
                "input_ids": ids[:, start:end],
                "attention_mask": np.ones((batch, end), np.int64),
                "position_ids": np.tile(np.arange(start, end), (batch, 1)),
            }
            given = {i.name for i in self._inputs}
            made = self.session.run(None, {k: v for k, v in feeds.items() if k in given} | cache)
            cache = {n.replace("present", "past_key_values"): v for n, v in zip(self._outputs, made, strict=True)}
            yield cache.pop("logits")
            start = end
