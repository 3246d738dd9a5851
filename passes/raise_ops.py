# SPDX-License-Identifier: Apache-2.0
"""``raise_ops``: the ops that kernels exist for, recognised by dataflow in whatever way a model spells them.

Runs the raising passes in the order in which they need one another, then lets the transposes that the head-major
models put around attention sink below the raised ops, where they meet and cancel.
"""

from __future__ import annotations

import collections
import logging

import torch

from gptq_compile.passes.common import drop_identities, eliminate_dead, merge_duplicates, sink_transposes
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program
from gptq_compile.passes.raise_activations import RaiseActivations
from gptq_compile.passes.raise_norms import RaiseNorms
from gptq_compile.passes.raise_rotary import RaiseRotary

log = logging.getLogger(__name__)
ops = torch.ops.gptq_compile

RAISED = (ops.rms_norm.default, ops.layer_norm.default, ops.rotary_embedding.default, ops.gated_act.default)


class RaiseOps(Pass):
    """rms_norm, layer_norm, rotary_embedding, gated_act, and activations spelled by hand."""

    name = "raise_ops"

    def run(self, program: Program) -> bool:
        changed = drop_identities(program)
        changed |= merge_duplicates(program)
        for step in (RaiseNorms(), RaiseRotary(), RaiseActivations()):
            changed |= step.run(program)
        while sink_transposes(program, norms=RAISED[:2]):
            changed = True
        changed |= merge_duplicates(program)
        changed |= eliminate_dead(program)
        log.info("raised %s", raised_ops(program))
        return changed


def raised_ops(program: Program) -> dict[str, int]:
    """How often each raised op occurs."""
    count = collections.Counter(n.target for n in program.graph.nodes if n.target in RAISED)
    return {op._schema.name.split("::")[1]: count[op] for op in RAISED if count[op]}
