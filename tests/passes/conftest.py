# SPDX-License-Identifier: Apache-2.0
"""Small hand-written programs for the tests of passes, and their text with stable names."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

import gptq_compile.passes.dialect  # noqa: F401  registers the ops
from gptq_compile.passes.common import eliminate_dead
from gptq_compile.passes.program import ModelInfo, ParamStore, Program
from gptq_compile.passes.text import to_text

WIDTH, VOCAB = 16, 32


class _Model(nn.Module):
    def __init__(self, body: Callable, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.body = body
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.embed)
        out = self.body(SimpleNamespace(**dict(self.named_parameters())), x, position_ids)
        return out.index_select(1, logit_rows)


def small_program(body: Callable[[SimpleNamespace, Tensor, Tensor], Tensor], **params: Tensor) -> Program:
    """Traces ``body(params, x[1, n, 16], position_ids[1, n])``, ``x`` an embedding of 32 tokens, into a program."""
    generator = torch.Generator().manual_seed(0)
    params = {"embed": torch.randn(VOCAB, WIDTH, generator=generator), **params}
    n, m = torch.export.Dim("n", min=2, max=1 << 20), torch.export.Dim("m", min=2, max=1 << 20)
    # On meta, as the frontend traces.
    ids, rows = (torch.zeros(size, dtype=torch.long, device="meta") for size in ((1, 7), (5,)))
    on_meta = {name: value.to("meta") for name, value in params.items()}
    with torch.no_grad():
        exported = torch.export.export(
            _Model(body, on_meta), (ids, ids.clone(), rows), dynamic_shapes=({1: n}, {1: n}, {0: m}), strict=False
        ).run_decompositions({})
    store = ParamStore()
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            continue
        name = spec.target
        store.set(name, params[name] if name in params else exported.constants[name])
        nodes[spec.arg.name].meta["param"] = name
    program = Program(exported.graph_module, store, ModelInfo("small", "", "small", VOCAB, 64))
    eliminate_dead(program)
    return program


def body_text(program: Program) -> list[str]:
    """The program's calls and result, values numbered in order: no names of torch's choosing, no source locations."""
    names: dict[str, str] = {}
    lines = [line for line in to_text(program).splitlines() if not line.startswith(("param ", "input "))]

    def number(match: re.Match) -> str:
        name = match.group(0)
        if name[1:] in ("input_ids", "position_ids", "logit_rows"):
            return name
        return names.setdefault(name, f"%{len(names)}")

    return [re.sub(r"%\w+", number, line.split("  #")[0]) for line in lines]


def ops(program: Program) -> list[str]:
    """Names of the called ops, in order, without overloads, embedding, or the choice of rows."""
    names = [getattr(n.target, "_schema", None) for n in program.graph.nodes if n.op == "call_function"]
    short = [s.name.split("::")[1] if s is not None else "getitem" for s in names]
    return [s for s in short if s not in ("embedding", "index_select", "sym_size")]


@pytest.fixture
def small() -> SimpleNamespace:
    """``small.program(body, **params)``, ``small.text(program)``, ``small.ops(program)``."""
    return SimpleNamespace(program=small_program, text=body_text, ops=ops)


@pytest.fixture(scope="module")
def small_module() -> SimpleNamespace:
    """:func:`small` for fixtures that trace once a module."""
    return SimpleNamespace(program=small_program, text=body_text, ops=ops)
