# SPDX-License-Identifier: Apache-2.0
"""A tiny model through the whole compiler for the CPU, and its logits beside the Hugging Face model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm_ffi

from gptq_compile.artifact.dequantized import dequantized_weights
from gptq_compile.kernels.target import Target
from gptq_compile.passes.build import build
from gptq_compile.passes.evaluate import PAGE_SIZE
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.lower_to_relax import Lowered, lower_to_relax
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pipeline import lowering_passes
from gptq_compile.passes.program import Program
from tests.architectures import tiny_model, traced

TOKENS = 37
"""More than two pages of 16 and four windows of 8, and no whole number of either."""


@dataclass(frozen=True)
class Outcome:
    """How far the compiled model is from the Hugging Face model with the same dequantized weights.

    Attributes:
        prefill: NMSE of the logits when all tokens are fed at once. ``step``: when they are fed one by one.
        quantized: linears that were quantized. ``changed``: NMSE that quantization itself made.
    """

    prefill: float
    step: float
    quantized: int
    changed: float


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    """Normalized mean squared error, in float64."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(((got - want) ** 2).sum() / (want**2).sum())


def check(
    name: str, folder: Path, *, group_size: int = 32, activations: str = "float",
    cache: str | None = None, **changes: Any,
) -> Outcome:  # fmt: skip
    """Compiles the tiny model ``name`` with 4-bit round-to-nearest linears into ``folder`` and runs it both ways.

    Args:
        name: a key of ``architectures.CONFIGS``. ``changes``: override single keys of its config.
        folder: for the library.
        group_size: of the quantization.
        activations: what quantized linears multiply, ``int8`` or ``float``.
        cache: type of the KV cache, by default float32.
    """
    model = tiny_model(name, **changes)
    program = traced(name, **changes)  # with tensors of its own: the model's are overwritten below
    target = Target.parse("cpu")
    rtn = GptqQuantize(QuantizeConfig(wbits=4, group_size=group_size, method="rtn"))
    PassManager([rtn], validate=False).run(program)
    ids = np.random.default_rng(0).integers(3, 250, TOKENS)
    original = _reference(model, ids)
    dequantized = {key: make() for key, make in dequantized_weights(program).items()}
    assert model.load_state_dict(dequantized, strict=False).unexpected_keys == []
    want = _reference(model, ids)
    PassManager(list(lowering_passes(target, "float32", cache=cache)), validate=False).run(program)
    lowered = lower_to_relax(program, target, [1], sampling=False, activations=activations)
    library = folder / f"{name}.so"
    build(lowered.module, target, library)
    vm = _Vm(library, program, lowered)
    return Outcome(
        prefill=nmse(vm.logits(ids, step=False), want),
        step=nmse(vm.logits(ids, step=True), want),
        quantized=len(dequantized),
        changed=nmse(want, original),
    )


def _reference(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


class _Vm:
    """The library's ``forward`` and ``decode_1`` with the program's weights (see ``passes/build.py``)."""

    def __init__(self, library: Path, program: Program, lowered: Lowered) -> None:
        self._library = tvm_ffi.load_module(str(library))
        self._vm = self._library["vm_load_executable"]()
        self._vm["vm_initialization"](1, 0, 2)
        self._weights = _tuple([program.params.get(name).numpy() for name in lowered.weights])
        caches = program.inputs[[n.name for n in program.inputs].index("page_table") + 1 :]
        self._cache_shapes = [tuple(int(d) for d in c.meta["val"].shape[1:]) for c in caches]
        self._cache_dtype = str(caches[0].meta["val"].dtype).removeprefix("torch.")

    def logits(self, ids: np.ndarray, *, step: bool) -> np.ndarray:
        """Float32 ``[n, vocab]`` of one sequence, all tokens at once or one after another."""
        pages = -(-len(ids) // PAGE_SIZE) + 1
        table = np.arange(pages - 1, -1, -1)[None]  # reversed, so that a mistake in the indirection shows
        caches = _tuple([np.zeros((pages, *shape), self._cache_dtype) for shape in self._cache_shapes])
        entry = self._vm["decode_1" if step else "forward"]
        rows = []
        for at in np.split(np.arange(len(ids)), len(ids) if step else 1):
            slots = table[0, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            inputs = [ids[at], at, np.zeros_like(at), slots, table, np.arange(len(at))]
            out = entry(*(tvm_ffi.from_dlpack(_aligned(x.astype(np.int32))) for x in inputs), caches, self._weights)
            rows.append(np.from_dlpack(out).copy())
        return np.concatenate(rows)


def _tuple(arrays: list[np.ndarray]) -> Any:
    return tvm_ffi.convert([tvm_ffi.from_dlpack(_aligned(a)) for a in arrays])


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that TVM's vector loads may assume."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    out = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out
