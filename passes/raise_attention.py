# SPDX-License-Identifier: Apache-2.0
"""Raises attention that a model spells out (matmul, mask, softmax, matmul) to ``gptq_compile::attention``.

No op on the way from the scores ``q . k`` to the softmax is recognised by name. The stretch between them is a function
of the scores and of values that do not depend on the token ids (masks, biases); it is *run* on probe scores for several
lengths and the result is fitted to ``softcap(scale * s) + slope[h] * (k - q)`` where visible, which is all that the
dialect op can say. What does not fit is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.errors import PassError
from gptq_compile.passes import pattern
from gptq_compile.passes.attention_law import LENGTHS, Law, Site, fit_law, refuse
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program, where

aten = torch.ops.aten

_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_MATMUL = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
_SCALE = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


class RaiseAttention(Pass):
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
        laws: dict[Any, Law] = {}
        data = pattern.data_nodes(program)
        for softmax in [n for n in program.graph.nodes if n in data and self._mixes_tokens(program, n)]:
            site = _find_site(program, softmax, data)
            law = fit_law(program, site, data, laws)
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


def _find_site(program: Program, softmax: fx.Node, data: set[fx.Node]) -> Site:
    rank = softmax.meta["val"].dim()
    dims = pattern.symbolic_dims(program, softmax)
    if dims != [rank - 2, rank - 1] or softmax.args[1] % rank != rank - 1:  # type: ignore[operator]
        raise refuse(softmax, f"its shape {list(softmax.meta['val'].shape)} is not [..., queries, keys]")
    products: list[fx.Node] = []
    seen, todo = set(), [softmax]
    while todo:
        node = todo.pop()
        for arg in node.all_input_nodes:
            if arg in data and arg not in seen:
                seen.add(arg)
                (products if arg.target in _MATMUL or arg.op == "placeholder" else todo).append(arg)
    if len(products) != 1 or products[0].op == "placeholder":
        raise refuse(softmax, f"its scores come from {len(products)} products of token values instead of one q . k")
    product = products[0]
    if pattern.symbolic_dims(program, product)[-2:] != [product.meta["val"].dim() - i for i in (2, 1)]:
        raise refuse(softmax, "its scores are not a product of queries and keys over all tokens")
    probs = softmax
    while True:
        users = list(probs.users)
        if len(users) != 1:
            raise refuse(softmax, f"its probabilities are used {len(users)} times instead of once, by the values")
        user = users[0]
        if user.target in _MATMUL and user.args[0] is probs:
            break
        if pattern.movement_source(user) is None:
            raise refuse(softmax, f"its probabilities are changed by {where(user)} before they meet the values")
        probs = user
    for n in LENGTHS:
        moved = pattern.index_map(program, softmax, probs, n).flatten()
        if not torch.equal(moved, torch.arange(moved.numel())):
            raise refuse(softmax, "its probabilities are rearranged before they meet the values")
    return Site(product, softmax, user)


def _rewrite(program: Program, site: Site, law: Law) -> None:
    graph = program.graph
    n = pattern.token_count(program)
    q, k, v = site.product.args[0], site.product.args[1], site.mix.args[1]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    batch, mix_batch = (pattern.concrete_shape(program, x, LENGTHS[0])[:-2] for x in (site.product, site.mix))
    with graph.inserting_before(site.mix):
        operands = [
            _Operand(program, q, batch, keys_last=False),
            _Operand(program, k, batch, keys_last=True),
            _Operand(program, v, mix_batch, keys_last=False, factors=False),
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
        arranged = self.shape(pattern.index_map(program, self.chain[top], node, LENGTHS[0]))
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
                for m in LENGTHS
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
        maps = {m: as_mix(m).flatten()[pattern.index_map(program, mix, node, m)] for m in LENGTHS}
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
        if not pattern.varies(e, symbol):
            sizes.append(int(e.subs(symbol, LENGTHS[0])))
        elif e == symbol:
            sizes.append(n)
        else:
            sizes.append(-1)
    return sizes if sizes.count(-1) <= 1 else None
