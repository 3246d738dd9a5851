# SPDX-License-Identifier: Apache-2.0
"""raise_rotary: half-split and interleaved forms, whole and partial heads, both head layouts; and near-misses."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.raise_ops import RaiseOps
from gptq_compile.passes.raise_rotary import RaiseRotary

HEADS, DIM = 2, 8
OP = "gptq_compile.rotary_embedding.default"


def _frequencies(width: int) -> torch.Tensor:
    return 1.0 / 100 ** (torch.arange(0, width, 2) / width)


def _tables(p, positions, interleaved=False):
    angles = positions[:, :, None].float() * p.freq
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def _rotate_pairs(x):
    return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)


def _model(turn, *, interleaved=False, head_major=True, width=DIM):
    """Splits x into heads, turns them by ``turn(x, cos, sin)``, joins them again."""

    def body(p, x, positions):
        cos, sin = (t.unsqueeze(1 if head_major else 2) for t in _tables(p, positions, interleaved))
        heads = x.view(1, -1, HEADS, DIM)
        if head_major:
            heads = heads.transpose(1, 2)
        out = turn(heads, cos, sin)
        return (out.transpose(1, 2) if head_major else out).reshape(1, -1, HEADS * DIM)

    return body, {"freq": _frequencies(width)}


def _partial(rotate, width):
    def turn(x, cos, sin):
        first, rest = x[..., :width], x[..., width:]
        return torch.cat([first * cos + rotate(first) * sin, rest], -1)

    return turn


def _raise(program, step):
    manager = PassManager([step])
    manager.run(program)
    return manager.records[0]


FORMS = {
    "half": (_model(lambda x, c, s: x * c + _rotate_half(x) * s), "False"),
    "operands swapped": (_model(lambda x, c, s: s * _rotate_half(x) + c * x), "False"),
    "token-major": (_model(lambda x, c, s: x * c + _rotate_half(x) * s, head_major=False), "False"),
    "interleaved": (_model(lambda x, c, s: x * c + _rotate_pairs(x) * s, interleaved=True), "True"),
    "interleaved token-major": (
        _model(lambda x, c, s: x * c + _rotate_pairs(x) * s, interleaved=True, head_major=False),
        "True",
    ),
    "partial": (_model(_partial(_rotate_half, 4), width=4), "False"),
    "partial interleaved": (
        _model(_partial(_rotate_pairs, 4), width=4, interleaved=True, head_major=False),
        "True",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_op_on_token_major_heads(small, form):
    (body, params), interleaved = FORMS[form]
    program = small.program(body, **params)
    assert _raise(program, RaiseOps()).modified
    names = small.ops(program)
    assert names.count("rotary_embedding") == 1
    assert not {"transpose", "neg", "stack", "slice", "add"} & set(names)
    line = next(line for line in small.text(program) if OP in line)
    width = params["freq"].numel() * 2
    assert line.startswith("%") and f"f32[1, n, {HEADS}, {DIM}] = {OP}(" in line and line.endswith(f"{interleaved})")
    tables = [n.args[1].meta["val"].shape[-1] for n in program.graph.nodes if str(n.target) == OP]
    assert tables == [width]
    assert not _raise(program, RaiseOps()).modified


def test_half_by_half_with_tables_of_half_width(small):
    def body(p, x, positions):
        angles = (positions[:, :, None].float() * p.freq).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        heads = x.view(1, -1, HEADS, DIM).transpose(1, 2)
        a, b = heads[..., : DIM // 2], heads[..., DIM // 2 :]
        out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return out.transpose(1, 2).reshape(1, -1, HEADS * DIM)

    program = small.program(body, freq=_frequencies(DIM))
    _raise(program, RaiseOps())
    assert small.ops(program).count("rotary_embedding") == 1
    assert "sub" not in small.ops(program)


def test_norm_before_and_after_lets_the_transposes_cancel(small):
    def turn(x, cos, sin):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        x = x * cos + _rotate_half(x) * sin
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    body, params = _model(turn)
    program = small.program(body, **params)
    _raise(program, RaiseOps())
    names = small.ops(program)
    assert [n for n in names if n in ("rms_norm", "rotary_embedding", "transpose")] == [
        "rms_norm",
        "rotary_embedding",
        "rms_norm",
    ]


NEAR_MISSES = {
    "wrong sign": lambda x, c, s: x * c + torch.cat([x[..., 4:], -x[..., :4]], -1) * s,
    "no sign": lambda x, c, s: x * c + torch.cat([x[..., 4:], x[..., :4]], -1) * s,
    "uneven split": lambda x, c, s: x * c + torch.cat([-x[..., 3:], x[..., :3]], -1) * s,
    "sums for products": lambda x, c, s: (x + c) + (_rotate_half(x) + s),
    "product for a sum": lambda x, c, s: (x * c) * (_rotate_half(x) * s),
    "difference": lambda x, c, s: x * c - _rotate_half(x) * s,
    "another value": lambda x, c, s: x * c + _rotate_half(x + 1) * s,
    "pairs the wrong way round": lambda x, c, s: x * c + torch.stack([x[..., 1::2], -x[..., 0::2]], -1).flatten(-2) * s,
    "heads as tokens": lambda x, c, s: (
        x * c.transpose(1, 2)[:, :1].mean() + _rotate_half(x) * s.transpose(1, 2)[:, :1].mean()
    ),
}


@pytest.mark.parametrize("form", NEAR_MISSES)
def test_near_misses_stay_as_they_are(small, form):
    body, params = _model(NEAR_MISSES[form])
    program = small.program(body, **params)
    before = small.text(program)
    assert not _raise(program, RaiseRotary()).modified
    assert small.text(program) == before


def test_a_rest_that_is_not_the_rest_of_the_head_is_kept_apart(small):
    def turn(x, cos, sin):
        first = x[..., :4]
        return torch.cat([first * cos + _rotate_half(first) * sin, x[..., :4]], -1)

    body, params = _model(turn, width=4)
    program = small.program(body, **params)
    _raise(program, RaiseRotary())
    assert small.ops(program).count("cat") == 2  # the table's and the model's
