# SPDX-License-Identifier: Apache-2.0
"""raise_ops on a whole decoder layer, and the clean-ups that it relies on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptq_compile.passes.common import drop_identities, merge_duplicates
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.normalize import Normalize
from gptq_compile.passes.raise_ops import RaiseOps, raised_ops

HEADS, DIM = 4, 4
EPS = 1e-6


def _norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def _decoder_layer(p, x, positions):
    """One layer of the kind most models have: normed heads, head-major rotary embedding, gated MLP."""
    angles = positions[:, :, None].float() * p.freq
    table = torch.cat([angles, angles], -1)
    cos, sin = (table.cos() * 1.0).unsqueeze(1), (table.sin() * 1.0).unsqueeze(1)
    h = _norm(x, p.norm1)
    q, k, v = (F.linear(h, w).view(1, -1, HEADS, DIM).transpose(1, 2) for w in (p.q, p.k, p.v))
    q, k = _norm(q, p.qnorm), _norm(k, p.knorm)
    q, k = (t * cos + _rotate_half(t) * sin for t in (q, k))
    mixed = torch.ops.gptq_compile.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.5)
    x = x + F.linear(mixed.reshape(1, -1, HEADS * DIM), p.o)
    h = _norm(x, p.norm2)
    return x + F.linear(F.silu(F.linear(h, p.gate)) * F.linear(h, p.up), p.down)


def _params():
    generator = torch.Generator().manual_seed(1)
    square = {n: torch.randn(16, 16, generator=generator) / 4 for n in ("q", "k", "v", "o", "gate", "up", "down")}
    vectors = {"norm1": 16, "norm2": 16, "qnorm": DIM, "knorm": DIM}
    return square | {n: 1 + torch.rand(c, generator=generator) for n, c in vectors.items()} | {"freq": torch.ones(2)}


def test_a_decoder_layer_keeps_no_transpose(small):
    program = small.program(_decoder_layer, **_params())
    manager = PassManager([Normalize(), RaiseOps()])
    manager.run(program)
    assert raised_ops(program) == {"rms_norm": 4, "rotary_embedding": 2, "gated_act": 1}
    names = small.ops(program)
    tables = ["unsqueeze", "_to_copy", "mul", "cat", "cos", "sin"]
    assert [n for n in names if n not in tables] == [
        "rms_norm", "linear", "reshape", "linear", "reshape", "linear", "reshape",
        "rms_norm", "rms_norm", "rotary_embedding", "rotary_embedding", "attention", "reshape", "linear", "add",
        "rms_norm", "linear", "linear", "gated_act", "linear", "add",
    ]  # fmt: skip
    again = PassManager([Normalize(), RaiseOps()])
    again.run(program)
    assert not any(r.modified for r in again.records)


def test_duplicates_merge_only_when_every_argument_is_equal(small):
    program = small.program(
        lambda p, x, _: (x + 1.0) * (x + 1.0) + (x + 1) * (x + 2.0) + torch.cat([x, x], -1)[..., :16]
    )
    assert small.ops(program).count("add") == 6
    assert merge_duplicates(program)
    assert small.ops(program).count("add") == 5  # x + 1.0 twice is one; x + 1 takes an int and stays
    assert not merge_duplicates(program)


def test_random_numbers_do_not_merge(small):
    program = small.program(lambda p, x, _: x + torch.rand_like(x) + torch.rand_like(x))
    assert not merge_duplicates(program)


def test_identities_go_and_broadcasts_stay(small):
    def body(p, x, _):
        y = torch.cat([x * 1.0 + 0, x[..., 16:]], -1) / 1
        return (y[:, :1] * 1.0 + p.zero) - 1.0

    program = small.program(body, zero=torch.zeros(1, 1, 16))
    assert drop_identities(program)
    assert {"cat", "div", "mul"}.isdisjoint(small.ops(program))
    assert small.ops(program).count("add") == 1 and small.ops(program).count("sub") == 1
