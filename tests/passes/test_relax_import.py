# SPDX-License-Identifier: Apache-2.0
"""ATen ops that are translated here, computed by TVM and by torch on the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gptq_compile.errors import PassError
from gptq_compile.kernels.tvm_env import relax, tvm
from gptq_compile.passes.relax_import import Importer


def _example() -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[3, 6]``, distinct indices ``[3, 2]`` below 6, values for them."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(3)])
    return torch.randn(3, 6, generator=generator), index, torch.randn(3, 2, generator=generator)


def _lowered(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tvm.IRModule:
    graph = make_fx(torch.func.functionalize(function), tracing_mode="fake")(*inputs).graph
    builder = relax.BlockBuilder()
    importer = Importer(builder, lambda node: [int(d) for d in node.meta["val"].shape])
    params = []
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        kind = relax.TensorType(list(value.shape), str(value.dtype).removeprefix("torch."))
        params.append(relax.Var(node.name, kind))
        importer.env[node] = params[-1]
    with builder.function("main", params):
        with builder.dataflow():
            for node in graph.nodes:
                if node.op == "call_function":
                    importer.env[node] = importer.translate(node)
            out = builder.emit_output(importer.env[graph.output_node().args[0]])
        builder.emit_func_output(out)
    return builder.get()


def _written_in_place(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    out = x.new_empty(3, 8)
    out[:, :6] = x
    out[:, 6:] = values
    return out


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gather": lambda x, index, values: x.gather(-1, index),
    "gather_rows": lambda x, index, values: x.gather(0, index % 2),
    "scatter_tensor": lambda x, index, values: x.scatter(1, index, values),
    "scatter_number": lambda x, index, values: torch.zeros_like(x).scatter(-1, index, 1.0),
    "scatter_bool": lambda x, index, values: x.masked_fill(torch.zeros_like(x).scatter(1, index, 1.0) == 0, -1.0),
    "scatter_integers": lambda x, index, values: torch.zeros_like(x).long().scatter(1, index, index + 3),
    "written_in_place": _written_in_place,
    "middle_written": lambda x, index, values: torch.slice_scatter(x, values, 1, 2, 4),
    "copied_and_cast": lambda x, index, values: torch.ops.aten.copy(x, index[:, :1]),
    "rsub": lambda x, index, values: 2 - x,
    "clamp": lambda x, index, values: x.clamp(-0.5, 0.5) + x.clamp_min(0) - x.clamp_max(0),
    "powers": lambda x, index, values: (x.abs() + 1) ** -0.5 + (x.abs() + 1) ** 0.5 + x**2 + 2**x,
    "integers_and_floats": lambda x, index, values: values * index + index // 2 + index % 4,
    "where": lambda x, index, values: torch.where(x > 0, x, 0.25),
}


@pytest.mark.parametrize("name", CASES)
def test_tvm_computes_what_torch_computes(name: str) -> None:
    inputs = _example()
    want = CASES[name](*inputs).numpy()
    mod = _lowered(CASES[name], inputs)
    executable = tvm.compile(mod, target="llvm")
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](*(tvm.runtime.tensor(t.numpy()) for t in inputs)).numpy()
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, index, values: x.scatter(0, index, values), "scatter.* indexes dimension 0; only the last one"),
        (lambda x, index, values: x.scatter_add(1, index, values), "scatter_add.* has no translation to TVM"),
        (lambda x, index, values: x.scatter(1, index, values, reduce="add"), "scatter.*no translation"),
        (lambda x, index, values: x.scatter(1, index[:2], values[:2]), "scatters into a part of the rows"),
        (lambda x, index, values: torch.slice_scatter(x, values, 1, 0, 4, 2), "with a step"),
    ],
)
def test_what_has_no_translation_is_refused_by_name(function: Callable[..., Tensor], words: str) -> None:
    with pytest.raises(PassError, match=words):
        _lowered(function, _example())
