# SPDX-License-Identifier: Apache-2.0
"""Raises attention that a model spells out (matmul, mask, softmax, matmul) to ``gptq_compile::attention``.

No op on the way from the scores ``q . k`` to the softmax is recognised by name. The stretch between them is a function
of the scores and of values that do not depend on the token ids (masks, biases); it is *run* on probe scores for several
lengths and the result is fitted to ``softcap(scale * s) + slope[h] * (k - q)`` where visible, which is all that the
dialect op can say. What does not fit is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.errors import PassError
from gptq_compile.passes import pattern
from gptq_compile.passes.program import Program, where

aten = torch.ops.aten

_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_MATMUL = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
_SCALE = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_LENGTHS = (17, 40)  # coprime enough with head counts and widths that no other dimension is mistaken for n
_PROBE_ELEMENTS = 1 << 27  # scores evaluated at once when looking for a window: half a GiB of float32
_MASKED = 5000.0  # a score this far below every visible one is a mask: exp(-5000) is 0 in every float format


@dataclass(frozen=True)
class _Law:
    """``softcap(scale * s) + slope[h] * (k - q)`` inside a causal window (0 = all)."""

    scale: float
    softcap: float
    window: int
    slopes: Tensor | None


@dataclass(frozen=True)
class _Site:
    """One spelled-out attention: ``product`` = q @ k^T, ``softmax``, and ``mix`` = probabilities @ v."""

    product: fx.Node
    softmax: fx.Node
    mix: fx.Node


class RaiseAttention:
    """Rewrites every softmax over tokens, with the two products around it, into one attention op."""

    name = "raise_attention"

    def run(self, program: Program) -> bool:
        """Returns whether anything was raised.

        Raises:
            PassError: if a softmax over tokens is not causal self-attention that the dialect op can express.
        """
        if not any(self._mixes_tokens(program, n) for n in program.graph.nodes):
            return False
        pattern.erase_assertions(program.graph)
        _split_baddbmm(program)
        laws: dict[Any, _Law] = {}
        data = pattern.data_nodes(program)
        for softmax in [n for n in program.graph.nodes if n in data and self._mixes_tokens(program, n)]:
            site = _find_site(program, softmax, data)
            law = _fit(program, site, data, laws)
            _rewrite(program, site, law)
        pattern.erase_dead_code(program.graph)
        program.graph.lint()
        return True

    @staticmethod
    def _mixes_tokens(program: Program, node: fx.Node) -> bool:
        if node.target not in _SOFTMAX:
            return False
        rank = node.meta["val"].dim()
        return node.args[1] % rank in pattern.symbolic_dims(program, node)  # type: ignore[operator]


def _split_baddbmm(program: Program) -> None:
    """``baddbmm(c, a, b)`` is ``beta * c + alpha * (a @ b)``: separates the product from the bias."""
    for node in program.graph.find_nodes(op="call_function", target=aten.baddbmm.default):
        if len(pattern.symbolic_dims(program, node)) < 2:
            continue
        bias, a, b = node.args
        with program.graph.inserting_before(node):
            out = program.call(aten.bmm.default, (a, b), like=node)
            for value, factor in ((out, node.kwargs.get("alpha", 1)), (bias, node.kwargs.get("beta", 1))):
                scaled = value if factor == 1 else program.call(aten.mul.Tensor, (value, factor), like=node)
                if value is bias:
                    out = program.call(aten.add.Tensor, (out, scaled), like=node)
                else:
                    out = scaled
        node.replace_all_uses_with(out)
        program.graph.erase_node(node)


def _refuse(node: fx.Node, why: str) -> PassError:
    return PassError(f"raise_attention: {where(node)} is a softmax over tokens that is not raised: {why}.")


def _find_site(program: Program, softmax: fx.Node, data: set[fx.Node]) -> _Site:
    rank = softmax.meta["val"].dim()
    dims = pattern.symbolic_dims(program, softmax)
    if dims != [rank - 2, rank - 1] or softmax.args[1] % rank != rank - 1:  # type: ignore[operator]
        raise _refuse(softmax, f"its shape {list(softmax.meta['val'].shape)} is not [..., queries, keys]")
    products, seen, todo = [], set(), [softmax]
    while todo:
        node = todo.pop()
        for arg in node.all_input_nodes:
            if arg in data and arg not in seen:
                seen.add(arg)
                (products if arg.target in _MATMUL or arg.op == "placeholder" else todo).append(arg)
    if len(products) != 1 or products[0].op == "placeholder":
        raise _refuse(softmax, f"its scores come from {len(products)} products of token values instead of one q . k")
    product = products[0]
    if pattern.symbolic_dims(program, product)[-2:] != [product.meta["val"].dim() - i for i in (2, 1)]:
        raise _refuse(softmax, "its scores are not a product of queries and keys over all tokens")
    probs = softmax
    while True:
        users = list(probs.users)
        if len(users) != 1:
            raise _refuse(softmax, f"its probabilities are used {len(users)} times instead of once, by the values")
        user = users[0]
        if user.target in _MATMUL and user.args[0] is probs:
            break
        if pattern.movement_source(user) is None:
            raise _refuse(softmax, f"its probabilities are changed by {where(user)} before they meet the values")
        probs = user
    for n in _LENGTHS:
        moved = pattern.index_map(program, softmax, probs, n).flatten()
        if not torch.equal(moved, torch.arange(moved.numel())):
            raise _refuse(softmax, "its probabilities are rearranged before they meet the values")
    return _Site(product, softmax, user)


# ---- what the scores go through ------------------------------------------------------------------------------------


def _fit(program: Program, site: _Site, data: set[fx.Node], known: dict[Any, _Law]) -> _Law:
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
        known[key] = _fit_law(program, site, scores, static)
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
                import hashlib

                cache[node] = hashlib.sha256(cache[node].encode()).hexdigest()
    return cache[node]


def _fit_law(program: Program, site: _Site, scores: fx.Node, static: set[fx.Node]) -> _Law:
    heads = math.prod(pattern.concrete_shape(program, site.product, _LENGTHS[0])[:-2])

    def response(n: int, probe: float | Tensor, offset: int = 0) -> Tensor:
        shape = pattern.concrete_shape(program, site.product, n)
        given = probe.reshape(shape) if isinstance(probe, Tensor) else torch.full(shape, probe)
        out = pattern.evaluate(program, [scores], n, offset=offset, given={site.product: given})[scores]
        if out.numel() != given.numel():
            raise _refuse(site.softmax, f"its scores are widened from {list(given.shape)} to {list(out.shape)}")
        return out.double().reshape(heads, n, n)

    limit = min(program.info.context_length, _LENGTHS[1])
    lengths = [n for n in _LENGTHS if n <= limit] or [limit]
    n = lengths[-1]
    far = max(n, _window_probe(program, static, heads))
    visible = _visible(response(far, 0.0), site)
    window = _window(visible[0, -1], far)
    slopes = _slopes(response(n, 0.0), window, site)
    scale, softcap = _curve(response, n, window, site)
    law = _Law(scale, softcap, window, slopes if slopes.abs().max() > 0 else None)
    _check_causal(visible, window, site)
    for length, offset in [(length, 0) for length in lengths] + [(lengths[0], 3), (far, 0)]:
        if offset and length + offset > program.info.context_length:
            continue
        rng = torch.Generator().manual_seed(length)
        probe = torch.randn((heads, length, length), generator=rng) * 4 / max(abs(scale), 1e-3)
        _check(response(length, probe, offset), probe.double(), law, slopes, site)
    return law


def _window_probe(program: Program, static: set[fx.Node], heads: int) -> int:
    """A length beyond every constant and table in the static subgraph, so that any window in it shows."""
    top = program.info.context_length
    sizes = [64]
    for node in static:
        if "param" in node.meta:
            sizes += [s for s in program.params.shape(node.meta["param"])]
        elif node.op == "call_function":
            literals: list[int] = []
            fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda a: literals.append(a) if _is_int(a) else None)
            sizes += [abs(v) for v in literals]
    longest = max([s for s in sizes if s <= 4 * top], default=64) + 8
    return max(2, min(longest, top, math.isqrt(_PROBE_ELEMENTS // heads)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _visible(base: Tensor, site: _Site) -> Tensor:
    """Which keys a query sees: those whose score is within reach of its own key's (a mask is a huge step down)."""
    own = base.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    if bool((own < -1e30).any()) or bool(base.isnan().any()):
        raise _refuse(site.softmax, "a token does not see itself under its mask")
    return base > own - _MASKED


def _window(last_row: Tensor, n: int) -> int:
    seen = int(last_row.sum())
    return 0 if seen == n else seen


def _expected(n: int, window: int) -> Tensor:
    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    return (distance >= 0) & ((distance < window) if window else True)


def _check_causal(visible: Tensor, window: int, site: _Site) -> None:
    n = visible.shape[-1]
    if not bool((visible == _expected(n, window)).all()):
        sees_future = bool((visible & (torch.arange(n)[None, :] > torch.arange(n)[:, None])).any())
        raise _refuse(
            site.softmax,
            "tokens attend to later tokens, so the model is not a causal decoder"
            if sees_future
            else "its mask is neither causal nor a causal sliding window",
        )


def _slopes(base: Tensor, window: int, site: _Site) -> Tensor:
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
        raise _refuse(
            site.softmax,
            "the bias added to its scores is not proportional to the distance between tokens (ALiBi), which is the "
            "only bias that is supported",
        )
    slopes = values.median(dim=1).values
    return torch.where(slopes.abs() < 1e-7, torch.zeros_like(slopes), slopes)


def _curve(response: Any, n: int, window: int, site: _Site) -> tuple[float, float]:
    """Scale and softcap of the function that the product goes through on its way to the softmax."""
    seen = _expected(n, window)
    base = response(n, 0.0)[:, seen]

    def at(t: float) -> float:
        moved = response(n, t)[:, seen] - base
        if float(moved.max() - moved.min()) > 1e-4 * (abs(float(moved.mean())) + float(base.abs().max()) + 1e-30):
            raise _refuse(site.softmax, "its scores are scaled differently for different heads or positions")
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
    raise _refuse(site.softmax, "its scores pass through a function that is neither a scale nor a tanh soft cap")


def _check(got: Tensor, probe: Tensor, law: _Law, slopes: Tensor, site: _Site) -> None:
    """The law must give the softmax's own probabilities on random scores."""
    n = got.shape[-1]
    want = probe * law.scale
    if law.softcap:
        want = law.softcap * torch.tanh(want / law.softcap)
    want = want + slopes[:, None, None] * torch.arange(n)
    want = want.masked_fill(~_expected(n, law.window), float("-inf"))
    error = (torch.softmax(want, -1) - torch.softmax(got, -1)).abs().max()
    if not error < 1e-4:
        raise _refuse(
            site.softmax,
            f"its mask and biases were read as {law}, but that gives probabilities that differ by {float(error):.1e}",
        )


# ---- the rewrite ---------------------------------------------------------------------------------------------------


def _rewrite(program: Program, site: _Site, law: _Law) -> None:
    graph = program.graph
    n = pattern.token_count(program)
    q, k, v = site.product.args[0], site.product.args[1], site.mix.args[1]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    batch = pattern.concrete_shape(program, site.product, 17)[:-2]
    with graph.inserting_before(site.mix):
        operands = [
            _Operand(program, q, batch, keys_last=False),
            _Operand(program, k, batch, keys_last=True),
            _Operand(program, v, batch, keys_last=False, factors=False),
        ]
        heads = math.prod(batch)
        group = math.gcd(operands[1].group, operands[2].group)
        nodes = [op.emit(n, 1 if i == 0 else group) for i, op in enumerate(operands)]
        scale = law.scale * operands[0].factor * operands[1].factor
        slopes = None
        if law.slopes is not None:
            slopes = _slopes_param(program, law.slopes)
        out = program.call(
            torch.ops.gptq_compile.attention.default,
            (*nodes, scale, law.window, law.softcap, None, slopes),
            like=site.softmax,
        )
    _replace_result(program, site.mix, out, heads, n)


def _slopes_param(program: Program, slopes: Tensor) -> fx.Node:
    """The slopes as a parameter; layers with equal slopes share one."""
    values = slopes.float()
    count = 0
    while (name := f"constants.alibi_slopes.{count}") in program.params:
        if torch.equal(program.params.get(name), values):
            break
        count += 1
    return program.add_param(name, values)


class _Operand:
    """q, k or v of a product: where its elements come from, as ``[n, heads, width]``."""

    def __init__(
        self, program: Program, node: fx.Node, batch: list[int], *, keys_last: bool, factors: bool = True
    ) -> None:
        self.program = program
        self.node = node
        self.chain = [node]
        self.factor = 1.0
        self._factors = [1.0]
        while True:
            step = self.chain[-1]
            source, factor = pattern.movement_source(step), 1.0
            if source is None and factors:
                source, factor = _constant_factor(program, step)
            if source is None:
                break
            self.chain.append(source)
            self._factors.append(self._factors[-1] * factor)
        self.shape = lambda t: self._heads_in_middle(t, batch, keys_last)
        # The deepest tensor of the chain that still leads to a plain rearrangement wins, see emit().
        top = max(i for i, x in enumerate(self.chain) if isinstance(x.meta["val"], Tensor))
        arranged = self.shape(pattern.index_map(program, self.chain[top], node, _LENGTHS[0]))
        self.group = max(g for g in range(1, arranged.shape[1] + 1) if _repeats(arranged, g))

    @staticmethod
    def _heads_in_middle(t: Tensor, batch: list[int], keys_last: bool) -> Tensor:
        if keys_last:
            t = t.transpose(-1, -2)
        t = t.expand(*batch, *t.shape[-2:])
        return t.reshape(-1, *t.shape[-2:]).transpose(0, 1)

    def emit(self, n: fx.Node, group: int) -> fx.Node:
        """Inserts the operand as ``[1, n, heads / group, width]`` and returns it."""
        for i in reversed(range(len(self.chain))):
            source = self.chain[i]
            if not isinstance(source.meta["val"], Tensor):
                continue
            wanted = {
                m: self.shape(pattern.index_map(self.program, source, self.node, m))[:, ::group].unsqueeze(0)
                for m in _LENGTHS
            }
            sizes = [1, n, *next(iter(wanted.values())).shape[2:]]
            found = pattern.rearranged(self.program, source, wanted, sizes)
            if found is not None:
                self.factor = self._factors[i]
                return found
        return self._emit_plainly(n, group)

    def _emit_plainly(self, n: fx.Node, group: int) -> fx.Node:
        raise PassError(
            f"raise_attention: the layout of the operand {where(self.node)} is not understood: no permutation of "
            f"its source {where(self.chain[-1])} gives [1, tokens, heads, width]."
        )


def _repeats(arranged: Tensor, group: int) -> bool:
    heads = arranged.shape[1]
    return heads % group == 0 and torch.equal(arranged, arranged[:, ::group].repeat_interleave(group, dim=1))


def _constant_factor(program: Program, node: fx.Node) -> tuple[fx.Node | None, float]:
    """``(x, c)`` if ``node`` is ``x * c`` or ``x / c`` with a constant c, else ``(None, 1)``."""
    if node.target not in _SCALE or node.kwargs:
        return None, 1.0
    x, c = node.args
    if node.target is aten.mul.Tensor and isinstance(c, fx.Node) and not _is_scalar(c) and _is_scalar(x):
        x, c = c, x
    if not isinstance(x, fx.Node) or not isinstance(x.meta["val"], Tensor) or _is_scalar(x):
        return None, 1.0
    if isinstance(c, fx.Node):
        if not _is_scalar(c) or any(a.op == "placeholder" for a in pattern.ancestors([c])):
            return None, 1.0
        c = float(pattern.evaluate(program, [c], 2)[c])
    c = float(c)  # type: ignore[arg-type]
    return x, (c if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / c)


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, fx.Node) or (isinstance(value.meta["val"], Tensor) and value.meta["val"].dim() == 0)


def _replace_result(program: Program, mix: fx.Node, out: fx.Node, heads: int, n: fx.Node) -> None:
    """Gives the attention result to whoever read ``mix``, undoing the rearrangement that followed it if possible."""
    last = mix
    tail = [mix]
    while len(last.users) == 1 and pattern.movement_source(next(iter(last.users))) is last:
        last = next(iter(last.users))
        tail.append(last)

    def as_mix(m: int) -> Tensor:
        shape = pattern.concrete_shape(program, mix, m)
        width = shape[-1]
        return torch.arange(m * heads * width).reshape(m, heads, width).transpose(0, 1).reshape(shape)

    for node in reversed(tail):
        maps = {m: as_mix(m).flatten()[pattern.index_map(program, mix, node, m)] for m in _LENGTHS}
        sizes = _view_sizes(program, node, n)
        if sizes is None:
            continue
        with program.graph.inserting_after(max(tail, key=_order(program))):
            marker = program.graph.call_function(aten.detach.default, (out,))
        with program.graph.inserting_before(marker):
            found = pattern.rearranged(program, out, maps, sizes)
        program.graph.erase_node(marker)
        if found is not None:
            node.replace_all_uses_with(found)
            return
    raise PassError(f"raise_attention: the result of {where(mix)} is used in a layout that is not understood.")


def _order(program: Program) -> Any:
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    return lambda node: place[node]


def _view_sizes(program: Program, node: fx.Node, n: fx.Node) -> list[Any] | None:
    symbol = pattern.token_symbol(program)
    sizes: list[Any] = []
    for s in node.meta["val"].shape:
        e = pattern.expression(s)
        if not e.has(symbol):
            sizes.append(int(e))
        elif e == symbol:
            sizes.append(n)
        else:
            sizes.append(-1)
    return sizes if sizes.count(-1) <= 1 else None
