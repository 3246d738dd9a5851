# SPDX-License-Identifier: Apache-2.0
"""``store_half``: matrices that a float32 program keeps in floating point are stored in float16, and widened when read.

The embedding and linears that were not quantized: half the bytes to store and to read. Rounding to 11 bits is an NMSE
of some 1e-8, far below what is left of the quantized ones; a matrix that loses more (values beyond float16, or so small
that they are subnormal there) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gptq_compile.passes.common import Node, dtype, is_call
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program

aten = torch.ops.aten

LARGEST_ERROR = 1e-6
"""NMSE of a matrix above which it stays float32."""


class StoreHalf(Pass):
    """See the module's text."""

    name = "store_half"
    tolerance = 1e-5  # what the matrices lose, amplified by the depth of the model

    def run(self, program: Program) -> bool:
        params = program.params
        found: dict[str, list[Node]] = {}
        for node in program.param_nodes.values():  # tied ones are one matrix
            found.setdefault(params.canonical(node.meta["param"]), []).append(node)
        halved = []
        for name, nodes in found.items():
            used = [n for n in nodes if n.users]
            fits = all(dtype(n) == torch.float32 and all(_as_matrix(u, n) for u in n.users) for n in used)
            if used and fits and _survives(params.get(name)):
                params.add(name, params.shape(name), torch.float16, partial(_half, params.entry(name).load))
                for node in nodes:
                    _narrow(program, node)
                halved.append(used[0].meta["param"])
        program.attrs["halved"] = [*program.attrs.get("halved", ()), *halved]
        return bool(halved)


def _as_matrix(user: Node, param: Node) -> bool:
    if is_call(user, aten.embedding.default):
        return user.args[0] is param
    return is_call(user, aten.linear.default) and user.args[1] is param and param not in (user.args[0], *user.args[2:])


def _narrow(program: Program, param: Node) -> None:
    """Makes a parameter's node float16, and widens it, or what an embedding reads from it."""
    graph = program.graph
    with program.fake_mode:
        param.meta["val"] = param.meta["val"].half()
    for user in list(param.users):
        if is_call(user, aten.embedding.default):
            readers = list(user.users)
            with program.fake_mode:
                user.meta["val"] = user.meta["val"].half()
            with graph.inserting_after(user):
                wide = program.call(aten._to_copy.default, (user,), {"dtype": torch.float32}, like=user)
            for reader in readers:
                reader.replace_input_with(user, wide)
        else:
            with graph.inserting_before(user):
                wide = program.call(aten._to_copy.default, (param,), {"dtype": torch.float32}, like=user)
            user.replace_input_with(param, wide)


def _half(load: Callable[[], Tensor]) -> Tensor:
    return load().half()


def _survives(matrix: Tensor) -> bool:
    lost = (matrix.half().float() - matrix).square().sum(dtype=torch.float64)
    return bool(lost <= LARGEST_ERROR * matrix.square().sum(dtype=torch.float64))  # false where it overflows
