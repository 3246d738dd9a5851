# SPDX-License-Identifier: Apache-2.0
"""What lies between the product ``q . k`` and the softmax, read by evaluation; see ``raise_attention``."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.errors import PassError
from gptq_compile.passes import pattern
from gptq_compile.passes.program import Program, where

log = logging.getLogger(__name__)

LENGTHS = (17, 40)  # coprime enough with head counts and widths that no other dimension is mistaken for n
_PROBE_ELEMENTS = 1 << 24  # scores evaluated at once to check a window: 128 MiB of float64
_MASKED = 5000.0  # a score this far below every visible one is a mask: exp(-5000) is 0 in every float format


@dataclass(frozen=True)
class Law:
    """``softcap(scale * s) + slope[h] * (k - q)`` inside a causal window (0 = all)."""

    scale: float
    softcap: float
    window: int
    slopes: Tensor | None


@dataclass(frozen=True)
class Site:
    """One spelled-out attention: ``product`` = q @ k^T, ``softmax``, and ``mix`` = probabilities @ v."""

    product: fx.Node
    softmax: fx.Node
    mix: fx.Node


def refuse(node: fx.Node, why: str) -> PassError:
    return PassError(f"raise_attention: {where(node)} is a softmax over tokens that is not raised: {why}.")


def fit_law(program: Program, site: Site, data: set[fx.Node], known: dict[Any, Law]) -> Law:
    """Fits the law between the product and the softmax, by evaluation; layers that share it are fitted once."""
    scores = site.softmax.args[0]
    assert isinstance(scores, fx.Node)
    path = [n for n in program.graph.nodes if n in pattern.ancestors([scores], [site.product]) and n in data]
    static = pattern.ancestors([scores], [site.product]) - set(path)
    number = {node: i for i, node in enumerate(path)}
    key = tuple(
        (
            str(n.target),
            str(fx.node.map_arg(n.args, lambda a: f"#{number[a]}" if a in number else _structure(a, {}))),
            str(n.kwargs),
        )
        for n in path
        if n is not site.product
    ) + tuple(concrete for concrete in pattern.concrete_shape(program, site.product, 17))
    if key not in known:
        known[key] = _fit_new(program, site, scores, static)
    return known[key]


def _structure(node: fx.Node, cache: dict[fx.Node, str]) -> str:
    """A name for what a static node computes: equal subgraphs over equal parameters have equal names."""
    if node not in cache:
        if node.op == "placeholder":
            cache[node] = node.name
        else:
            args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda a: _structure(a, cache))
            cache[node] = f"{node.target}{args}"
            if len(cache[node]) > 400:
                cache[node] = hashlib.sha256(cache[node].encode()).hexdigest()
    return cache[node]


def _fit_new(program: Program, site: Site, scores: fx.Node, static: set[fx.Node]) -> Law:
    heads = math.prod(pattern.concrete_shape(program, site.product, LENGTHS[0])[:-2])

    def response(n: int, probe: float | Tensor, offset: int = 0) -> Tensor:
        shape = pattern.concrete_shape(program, site.product, n)
        given = probe.reshape(shape) if isinstance(probe, Tensor) else torch.full(shape, probe)
        out = pattern.evaluate(program, [scores], n, offset=offset, given={site.product: given})[scores]
        if out.numel() != given.numel():
            raise refuse(site.softmax, f"its scores are widened from {list(given.shape)} to {list(out.shape)}")
        return out.double().reshape(heads, n, n)

    limit = min(program.info.context_length, LENGTHS[1])
    lengths = [n for n in LENGTHS if n <= limit] or [limit]
    n = lengths[-1]
    window = _far_window(program, site, scores, static)
    _check_causal(_visible(response(n, 0.0), site), window, site)
    slopes = _slopes(response(n, 0.0), window, site)
    scale, softcap = _curve(response, n, window, site)
    law = Law(scale, softcap, window, slopes if slopes.abs().max() > 0 else None)
    beyond = min(window + 8, program.info.context_length)
    if window and heads * beyond**2 <= _PROBE_ELEMENTS:
        lengths.append(beyond)
    for length, offset in [(length, 0) for length in lengths] + [(lengths[0], 3)]:
        if offset and length + offset > program.info.context_length:
            continue
        rng = torch.Generator().manual_seed(length)
        probe = torch.randn((heads, length, length), generator=rng) * 4 / max(abs(scale), 1e-3)
        _check(response(length, probe, offset), probe.double(), law, slopes, site)
    return law


def _far_window(program: Program, site: Site, scores: fx.Node, static: set[fx.Node]) -> int:
    """The window of the masks alone, at a length beyond every constant and table that they are made of.

    The masks have no or few heads, so a length is affordable here at which the scores of all heads are not.
    """
    top = program.info.context_length
    sizes = [LENGTHS[1]]
    for node in static:
        if "param" in node.meta:
            sizes += program.params.shape(node.meta["param"])
        elif node.op == "call_function":
            leaves = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
            sizes += [abs(v) for v in leaves if isinstance(v, int) and not isinstance(v, bool)]
    n = max(2, min(max(s for s in sizes if s <= 4 * top or s == LENGTHS[1]) + 8, top))
    path = pattern.ancestors([scores], [site.product]) - static - {site.product}
    visible = torch.ones((n, n), dtype=torch.bool)
    for mask in {a for node in path for a in node.all_input_nodes if a in static}:
        if not isinstance(mask.meta.get("val"), Tensor):
            continue
        rank = mask.meta["val"].dim()
        if pattern.symbolic_dims(program, mask) != [rank - 2, rank - 1]:
            continue
        rows = math.prod(pattern.concrete_shape(program, mask, 2)[:-2])
        if rows * n * n > 1 << 28:
            log.info("A mask of %d x %d x %d is too large to look for a sliding window in all of it.", rows, n, n)
            n = math.isqrt((1 << 28) // rows)
            visible = visible[:n, :n]
        value = pattern.evaluate(program, [mask], n)[mask].reshape(rows, n, n)[0]
        own = value.diagonal().unsqueeze(-1)
        visible &= (value == own) if value.dtype == torch.bool else (value > own - _MASKED)
    window = _window(visible[-1], n)
    if not torch.equal(visible & _expected(n, 0), _expected(n, window)):
        raise refuse(site.softmax, "its mask is neither causal nor a causal sliding window")
    return window


def _visible(base: Tensor, site: Site) -> Tensor:
    """Which keys a query sees: those whose score is within reach of its own key's (a mask is a huge step down)."""
    own = base.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    if bool((own < -1e30).any()) or bool(base.isnan().any()):
        raise refuse(site.softmax, "a token does not see itself under its mask")
    return base > own - _MASKED


def _window(last_row: Tensor, n: int) -> int:
    seen = int(last_row.sum())
    return 0 if seen == n else seen


def _expected(n: int, window: int) -> Tensor:
    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    return (distance >= 0) & ((distance < window) if window else True)


def _check_causal(visible: Tensor, window: int, site: Site) -> None:
    n = visible.shape[-1]
    if not bool((visible == _expected(n, window)).all()):
        sees_future = bool((visible & (torch.arange(n)[None, :] > torch.arange(n)[:, None])).any())
        raise refuse(
            site.softmax,
            "tokens attend to later tokens, so the model is not a causal decoder"
            if sees_future
            else "its mask is neither causal nor a causal sliding window",
        )


def _slopes(base: Tensor, window: int, site: Site) -> Tensor:
    """Per-head slope of the additive bias along the keys; softmax does not see a constant per query."""
    seen = _expected(base.shape[-1], window)
    steps = base[:, :, 1:] - base[:, :, :-1]
    both = seen[:, 1:] & seen[:, :-1]
    if not bool(both.any()):
        return torch.zeros(base.shape[0], dtype=torch.float64)
    values = steps[:, both]
    slopes = values.mean(dim=1)
    spread = (values - slopes[:, None]).abs().max()
    if spread > 1e-4 * (1 + float(base[:, seen].abs().max())):
        raise refuse(
            site.softmax,
            "the bias added to its scores is not proportional to the distance between tokens (ALiBi), which is the "
            "only bias that is supported",
        )
    slopes = values.median(dim=1).values
    return torch.where(slopes.abs() < 1e-7, torch.zeros_like(slopes), slopes)


def _curve(response: Any, n: int, window: int, site: Site) -> tuple[float, float]:
    """Scale and softcap of the function that the product goes through on its way to the softmax."""
    seen = _expected(n, window)
    base = response(n, 0.0)[:, seen]

    def at(t: float) -> float:
        moved = response(n, t)[:, seen] - base
        if float(moved.max() - moved.min()) > 1e-4 * (abs(float(moved.mean())) + float(base.abs().max()) + 1e-30):
            raise refuse(site.softmax, "its scores are scaled differently for different heads or positions")
        return float(moved.flatten()[0])

    big = 2.0**20
    small = 2.0**-4
    top, far = at(big), at(2 * big)
    if abs(far - 2 * top) <= 1e-5 * abs(far):
        return top / big, 0.0
    if abs(far - top) <= 1e-6 * abs(top):
        t = small
        while abs(at(2 * t)) < 0.2 * abs(top):
            t *= 2
        return math.atanh(at(t) / top) * top / t, top
    raise refuse(site.softmax, "its scores pass through a function that is neither a scale nor a tanh soft cap")


def _check(got: Tensor, probe: Tensor, law: Law, slopes: Tensor, site: Site) -> None:
    """The law must give the softmax's own probabilities on random scores."""
    n = got.shape[-1]
    want = probe * law.scale
    if law.softcap:
        want = law.softcap * torch.tanh(want / law.softcap)
    want = want + slopes[:, None, None] * torch.arange(n)
    want = want.masked_fill(~_expected(n, law.window), float("-inf"))
    error = (torch.softmax(want, -1) - torch.softmax(got, -1)).abs().max()
    if not error < 1e-4:
        raise refuse(
            site.softmax,
            f"its mask and biases were read as {law}, but that gives probabilities that differ by {float(error):.1e}",
        )
