# SPDX-License-Identifier: Apache-2.0
"""``lower_precision``: the float32 program computes in float16 or bfloat16 where kernels do, and stays float32 where
range or precision is needed.

1. Dialect ops other than norms, and products of matrices, run in half precision on parameters stored in half
   precision.
2. The residual stream stays float32: an embedding reads a table in half precision, but what it returns is widened at
   once, and by rule 6 so is every sum with it. Updates are small against what they are added to: in SmolLM2-135M
   rounding the stream at each addition made seven eighths of the logits' squared error.
3. Norms, rotary embeddings and gated activations take their input as it comes, compute in float32 (norms: on float32
   parameters), and their result is half precision where nothing but half-precision ops reads it, else float32. So
   they end the stream without a cast of its own; and a linear that only they read returns float32 sums.
4. Rotary tables, attention sinks, alibi slopes and quantization scales stay float32.
5. Roots, powers, exponentials, reductions, softmax, trigonometry, sorting and squares (:data:`FLOAT_OPS`) run in
   float32, and so does arithmetic with a constant that half precision cannot hold.
6. Everything else takes the widest type of its inputs that vary; inputs that do not vary follow. Whatever is computed
   from positions alone is float32.
7. The logits leave in float32, from the product with ``lm_head`` on.

A cast (``aten._to_copy``) is inserted where two types meet, once for each value, and fake values are computed anew.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from gptq_compile.errors import ConfigError, ModelError, PassError
from gptq_compile.passes import dialect, pattern
from gptq_compile.passes.common import Node, dtype, is_call, is_param, is_tensor
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import ParamStore, Program, where

aten = torch.ops.aten

HALF_OPS = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "einsum", "_grouped_mm", "scaled_dot_product_attention"}
)
"""ATen ops that run in half precision when they compute on activations, by name; embedding always does."""

FLOAT_OPS = frozenset(
    {
        "exp", "exp2", "expm1", "log", "log1p", "log2", "pow", "square", "sqrt", "rsqrt", "reciprocal", "erf",
        "softplus", "cos", "sin", "mean", "sum", "prod", "var", "var_mean", "std", "norm", "linalg_vector_norm",
        "logsumexp", "softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "topk",
        "sort", "argsort", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm",
    }
)  # fmt: skip
"""ATen ops that run in float32, by name."""

_NORMS = (torch.ops.gptq_compile.rms_norm.default, torch.ops.gptq_compile.layer_norm.default)
_GATE = torch.ops.gptq_compile.gated_act.default
_ROUNDING = (*_NORMS, torch.ops.gptq_compile.rotary_embedding.default, _GATE)
_MOVEMENT = pattern.MOVEMENT | {aten.index_select.default, aten.index.Tensor}
_FLOAT_ARGUMENTS = frozenset({"cos", "sin", "sinks", "alibi_slopes"})
_LEFT_ALONE = frozenset({"scales", "zeros", "codes", "g_idx", "packed", "k_cache", "v_cache"})
_TOLERANCE = {torch.float16: 1e-4, torch.bfloat16: 1e-2}
_SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


class LowerPrecision(Pass):
    """See the module's rules.

    Args:
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Raises:
        ConfigError: for any other dtype.
    """

    name = "lower_precision"

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        if dtype not in _TOLERANCE:
            raise ConfigError(f"lower_precision makes float16 or bfloat16 programs, not {dtype}.")
        self.half = dtype

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """Allowed NMSE of the logits: rounding to 11 (8) bits, amplified by the depth of the model."""
        return _TOLERANCE[self.half]

    def run(self, program: Program) -> bool:
        return _Lowering(program, self.half).run()

    def ensures(self, program: Program) -> None:
        if dtype(program.output) != torch.float32:
            raise PassError(f"The logits leave as {dtype(program.output)}, not as float32.")
        for node in program.graph.nodes:
            if is_call(node, aten.linear.default, aten.embedding.default):
                types = {dtype(i) for i in node.all_input_nodes if _is_float(i)}
                if len(types) != 1:
                    raise PassError(f"{where(node)} mixes {sorted(map(str, types))}.")


class _Lowering:
    """One run of the pass over one program."""

    def __init__(self, program: Program, half: torch.dtype) -> None:
        self.program = program
        self.half = half
        self.activations = pattern.data_nodes(program)
        self.varying = _varying(program)
        self.logits = _logits_tail(program)
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.stored: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.changed: set[fx.Node] = set()

    def run(self) -> bool:
        for node in list(self.program.graph.nodes):
            if node.op == "call_function":
                self._lower_caches(node)
                self._lower(node)
            elif node.op == "output":
                (out,) = node.args[0]
                node.args = ((self._as(out, torch.float32),),)
        for cast in self.casts.values():
            if not cast.users:  # all that read a widened value wanted it in half precision after all
                self.program.graph.erase_node(cast)
        rewritten = bool(self.changed)
        self._name_stored()
        return rewritten

    def _lower_caches(self, node: Node) -> None:
        """Key and value caches are inputs; they hold the type of what is written to them."""
        if not is_call(node, torch.ops.gptq_compile.paged_attention.default):
            return
        for cache in node.args[3:5]:
            if cache.op == "placeholder" and dtype(cache) != self.half:
                with self.program.fake_mode, enable_python_dispatcher():
                    cache.meta["val"] = torch.empty(cache.meta["val"].shape, dtype=self.half, device="meta")
                self.changed.add(cache)

    def _lower(self, node: Node) -> None:
        if is_call(node, *_ROUNDING):
            self._lower_rounding(node)
            return
        policy = self._policy(node)
        names = [a.name for a in node.target._schema.arguments] if hasattr(node.target, "_schema") else []
        ours = getattr(node.target, "namespace", "") == dialect.NAMESPACE

        def convert(argument: str, value: Any) -> Any:
            def one(n: fx.Node) -> fx.Node:
                if policy is None or not _is_float(n) or (ours and argument in _LEFT_ALONE):
                    return n
                return self._as(n, torch.float32 if ours and argument in _FLOAT_ARGUMENTS else policy)

            return fx.node.map_arg(value, one)

        args = tuple(convert(names[i] if i < len(names) else "", a) for i, a in enumerate(node.args))
        kwargs = {k: convert(k, a) for k, a in node.kwargs.items()}
        if args != node.args or kwargs != node.kwargs:
            node.args, node.kwargs = args, kwargs
            self.changed.add(node)
        if node in self.changed or any(i in self.changed for i in node.all_input_nodes):
            self.changed.add(node)
            was = dtype(node) if is_tensor(node) else None  # topk and split return several tensors
            self._retype(node, policy)
            if was is None or dtype(node) == was:
                return
            linear = is_call(node, aten.linear.default, torch.ops.gptq_compile.quant_linear.default)
            if is_call(node, aten.embedding.default) or (linear and self._only_rounding_reads(node)):
                self._widen(node, was)

    def _lower_rounding(self, node: Node) -> None:
        x, *rest = node.args
        if is_call(node, _GATE):
            both = torch.promote_types(dtype(x), dtype(rest[0]))
            args = (self._as(x, both), self._as(rest[0], both), *rest[1:])
        else:
            args = (x, *(self._as(a, torch.float32) if _is_float(a) else a for a in rest))
        x = args[0]
        wanted = self.half if self._only_half_reads(node) else torch.float32
        kwargs = {k: v for k, v in node.kwargs.items() if k != "out_dtype"}
        if wanted != dtype(x):
            kwargs["out_dtype"] = wanted
        if args != node.args or kwargs != node.kwargs:
            node.args, node.kwargs = args, kwargs
            self.changed.add(node)
        if node in self.changed or any(i in self.changed for i in node.all_input_nodes):
            self.changed.add(node)
            self._retype(node, None)

    def _only_half_reads(self, node: fx.Node) -> bool:
        """Whether every op that reads a value, as it is or moved about, takes it in half precision."""
        for user in node.users:
            if user.target in pattern.SHAPE_ONLY:
                continue
            if user.op != "call_function" or is_call(user, *_ROUNDING):
                return False
            moved = user.target in _MOVEMENT
            if not (self._only_half_reads(user) if moved else self._policy(user) == self.half):
                return False
        return True

    def _only_rounding_reads(self, node: fx.Node) -> bool:
        """Whether every op that reads a value, as it is or moved about, takes what comes and rounds by itself."""
        readers = [user for user in node.users if user.target not in pattern.SHAPE_ONLY]
        return bool(readers) and all(
            is_call(user, *_ROUNDING) or (user.target in _MOVEMENT and self._only_rounding_reads(user))
            for user in readers
        )

    def _widen(self, node: Node, to: torch.dtype) -> None:
        """Lets all that read ``node`` read it in a wider type."""
        readers = list(node.users)
        wide = self._as(node, to)
        for reader in readers:
            reader.replace_input_with(node, wide)

    def _retype(self, node: Node, policy: torch.dtype | None) -> None:
        """Computes the fake value of a node anew."""
        values = lambda a: fx.node.map_arg(a, lambda n: n.meta["val"])  # noqa: E731
        try:
            with self.program.fake_mode, enable_python_dispatcher():
                if is_call(node, aten.baddbmm.default):  # its shape function fails on symbolic sizes
                    node.meta["val"] = node.meta["val"].to(policy)
                else:
                    node.meta["val"] = node.target(*values(node.args), **values(node.kwargs))
        except Exception as e:
            raise PassError(f"{where(node)} cannot run in mixed precision: {e}") from e

    def _policy(self, node: Node) -> torch.dtype | None:
        """The type in which a node's floating inputs are wanted; None if they stay what they are."""
        if is_call(node, aten._to_copy.default, aten.to.dtype) or not isinstance(node.target, torch._ops.OpOverload):
            return None
        name = node.target._schema.name.split("::")[1]
        if node.target.namespace == dialect.NAMESPACE or name == "embedding":
            return self.half
        if name in HALF_OPS and node in self.activations:
            return self.half
        inputs = [n for n in node.all_input_nodes if _is_float(n)]
        if name in FLOAT_OPS or (name == "mul" and node.args[0] is node.args[1]) or node in self.logits:
            return torch.float32 if any(n in self.varying for n in inputs) else None
        types = [dtype(n) for n in inputs if n in self.varying]
        if not types:
            return None
        fits = all(_fits(self._constant(v), self.half) for v in (*node.args, *node.kwargs.values()))
        return self.half if fits and all(t == self.half for t in types) else torch.float32

    def _constant(self, value: Any) -> Any:
        """A number, also where it is stored as a parameter of one element; whatever else as it is."""
        if is_param(value) and _is_float(value) and value.meta["val"].numel() == 1:
            return float(self.program.params.get(value.meta["param"]))
        return value

    def _as(self, node: Node, to: torch.dtype) -> Node:
        """The value of ``node`` in another type: a parameter stored so, an earlier cast, or a new one."""
        if dtype(node) == to:
            return node
        if is_param(node):
            return self._store(node, to)
        if is_call(node, aten._to_copy.default) and is_tensor(source := node.args[0]):
            widened = dtype(source) == to and torch.promote_types(to, dtype(node)) == dtype(node)
            if widened and _is_float(source):
                return source  # back from a wider type: nothing was lost
        key = (node, to)
        if key not in self.casts:
            with self.program.graph.inserting_after(node):
                self.casts[key] = self.program.call(aten._to_copy.default, (node,), {"dtype": to}, like=node)
            self.changed.add(self.casts[key])
            if node in self.varying:
                self.varying.add(self.casts[key])
        return self.casts[key]

    def _store(self, param: Node, to: torch.dtype) -> Node:
        key = (param, to)
        if key not in self.stored:
            base = param.meta["param"]
            name = base + stored_suffix(to)
            _add_converted(self.program.params, name, base, to)
            self.stored[key] = self.program._placeholder(name)
            self.changed.add(self.stored[key])
        return self.stored[key]

    def _name_stored(self) -> None:
        """A parameter that is read in one type only keeps its name in the new type."""
        params = self.program.params
        for (old, to), new in self.stored.items():
            name = params.canonical(old.meta["param"])
            same = [
                n
                for n in self.program.param_nodes.values()
                if params.canonical(n.meta["param"]) == name and n is not old
            ]
            if old.users or same or sum(o is old for o, _ in self.stored) > 1:
                continue
            _add_converted(params, name, name, to)
            params.drop(new.meta["param"])
            new.meta["param"] = old.meta["param"]
            label = old.name
            self.program.graph.erase_node(old)
            new.name = label
            new.target = label


def stored_suffix(dtype: torch.dtype) -> str:
    """The ending of a parameter's name under which it is stored in another type beside its own."""
    return f".{_SHORT[dtype]}"


def _add_converted(params: ParamStore, name: str, source: str, to: torch.dtype) -> None:
    """Registers ``source`` in another type, converted each time it is read."""
    entry = params.entry(source)

    def load() -> Tensor:
        tensor = entry.load()
        converted = tensor.to(to)
        if not torch.isfinite(converted).all() and torch.isfinite(tensor).all():
            raise ModelError(
                f"Parameter {source!r} holds {float(tensor.abs().max()):.3g}, which {to} cannot represent "
                f"(largest: {torch.finfo(to).max:.3g}). Compile with bfloat16 activations."
            )
        return converted

    params.add(name, entry.shape, to, load)


def _is_float(node: Any) -> bool:
    return is_tensor(node) and node.meta["val"].dtype in _SHORT


def _fits(value: Any, half: torch.dtype) -> bool:
    """Whether a constant argument survives in half precision."""
    if not isinstance(value, float) or value == 0 or not math.isfinite(value):
        return True
    info = torch.finfo(half)
    return info.tiny <= abs(value) <= info.max


def _varying(program: Program) -> set[fx.Node]:
    """The nodes that depend on an input of the program: neither parameters nor computed from parameters alone."""
    found = set(program.inputs)
    for node in program.graph.nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _logits_tail(program: Program) -> set[fx.Node]:
    """What lies between the last product (or other half-precision op) and the result, such as a softcap."""
    tail: set[fx.Node] = set()
    todo = [program.output]
    while todo:
        node = todo.pop()
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.split("::")[1]
        if node.target.namespace == dialect.NAMESPACE or name in HALF_OPS or name == "embedding":
            continue
        if all(u.op == "output" or u in tail for u in node.users):
            tail.add(node)
            todo.extend(node.all_input_nodes)
    return tail
