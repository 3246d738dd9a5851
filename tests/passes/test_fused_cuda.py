# SPDX-License-Identifier: Apache-2.0
"""The fused CUDA kernels of norms, rotary embeddings, gated activations and the loss against what defines them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_compile.passes import dialect

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from gptq_compile.passes import fused_triton

ops = torch.ops.gptq_compile
EXACT = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 5e-7}  # relative, of all of a tensor


def near(got: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    assert got.dtype == dtype and got.shape == exact.shape
    return float((got.float() - exact).norm() / exact.norm()) < EXACT[dtype]


def check(fused: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values and derivatives against the definition in float32."""
    dtype = inputs[0].dtype
    mine, exact = ([x.detach().to(t).requires_grad_() for x in inputs] for t in (dtype, torch.float32))
    a, b = fused(*mine), reference(*exact)
    assert near(a, b, dtype)
    upstream = torch.randn_like(b).to(dtype)
    got, wanted = torch.autograd.grad(a, mine, upstream), torch.autograd.grad(b, exact, upstream.float())
    assert all(near(x, y, dtype) for x, y in zip(got, wanted, strict=True))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", list(EXACT))
@pytest.mark.parametrize("columns", [64, 100, 4096, 12288])
def test_norms(dtype: torch.dtype, columns: int) -> None:
    x, weight, bias = normal(1, 33, columns, dtype=dtype) + 1, normal(columns), normal(columns + 1)[1:].clone()
    rms, layer = ops.rms_norm.default, ops.layer_norm.default
    for call, args in ((rms, (weight, 1e-5, 1.0)), (rms, (None, 1e-6)), (layer, (weight, bias, 1e-5))):
        check(
            lambda x, call=call, args=args: fused_triton.FUSED[call](x, *args),
            lambda x, call=call, args=args: dialect.REFERENCES[call](x, *args),
            [x],
        )


@pytest.mark.parametrize("dtype", list(EXACT))
@pytest.mark.parametrize(("heads", "size", "rotary"), [(32, 128, 128), (3, 80, 20)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embeddings(dtype: torch.dtype, heads: int, size: int, rotary: int, interleaved: bool) -> None:
    op = ops.rotary_embedding.default
    args = normal(1, 50, rotary), normal(1, 50, rotary + 1)[..., 1:], interleaved
    check(
        lambda x: fused_triton.FUSED[op](x, *args),
        lambda x: dialect.REFERENCES[op](x, *args),
        [normal(1, 50, heads, size, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", list(EXACT))
@pytest.mark.parametrize("act", sorted(dialect.ACTIVATIONS))
def test_gated_activations(dtype: torch.dtype, act: str) -> None:
    op = ops.gated_act.default
    inputs = [normal(1, 50, 999, dtype=dtype), normal(2, 25, 999, dtype=dtype).reshape(1, 50, 999)]
    if act in fused_triton.GATED:
        check(lambda g, u: fused_triton.FUSED[op](g, u, act), lambda g, u: dialect.REFERENCES[op](g, u, act), inputs)
    else:
        got = fused_triton.FUSED[op](*inputs, act)
        assert torch.equal(got, dialect.REFERENCES[op](*inputs, act))


@pytest.mark.parametrize("dtype", list(EXACT))
def test_the_loss(dtype: torch.dtype) -> None:
    logits, labels = normal(40, 5003, dtype=dtype) * 3, torch.arange(40, device="cuda") * 100
    labels[::7] = -100
    leaf = logits.float().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(leaf, labels, reduction="sum"), leaf)
    assert near(fused_triton.loss_gradient(logits, labels), exact, dtype)
