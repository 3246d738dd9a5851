# SPDX-License-Identifier: Apache-2.0
"""Lowering: the paged program becomes a TVM Relax module with one function an entry.

Dialect ops call the kernels that the registry picks for their case; every other ATen op goes through Relax's own
translation, and fuses there. Rows (tokens) are symbolic in ``forward`` and constant in ``decode_<batch>``, so that
each entry gets the kernels that suit its size.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptq_compile.errors import PassError
from gptq_compile.kernels.registry import Case, Selection, select
from gptq_compile.kernels.target import Target
from gptq_compile.passes import fusion, lower_experts
from gptq_compile.passes.common import Node, with_defaults
from gptq_compile.passes.dialect import packed_case
from gptq_compile.passes.evaluate import PAGE_SIZE
from gptq_compile.passes.lower_sampling import add_sampling_entries
from gptq_compile.passes.program import Program, where

ops = torch.ops.gptq_compile
aten = torch.ops.aten

CPU_TOKENS = 512
"""Most tokens of a call of ``forward`` on the CPU: its temporaries get room for them, the same for any number."""


@dataclass
class Lowered:
    """A lowered program.

    Attributes:
        module: the ``tvm.IRModule``.
        weights: parameter names in the order of the ``weights`` tuple.
        kernels: case text -> selection, for the report.
        calls: case text -> entry -> calls of the case's kernel in it.
        apart: case text -> kernel -> why it refused to compute several ops together (see `passes.fusion`).
        translated: op without a kernel of ours -> entry -> how often it stands there; TVM makes and fuses those.
        decode: batch size -> entry name.
        tokens: most tokens of a call of ``forward``; None for any number.
    """

    module: Any
    weights: list[str]
    kernels: dict[str, Selection] = field(default_factory=dict)
    calls: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    apart: dict[str, dict[str, str]] = field(default_factory=dict)
    translated: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    decode: dict[int, str] = field(default_factory=dict)
    tokens: int | None = None


def lower_to_relax(
    program: Program,
    target: Target,
    buckets: Sequence[int] = (1, 2, 4, 8),
    *,
    sampling: bool = True,
    activations: str = "float",
) -> Lowered:
    """Lowers a paged, packed program.

    Args:
        program: after ``insert_kv_cache`` and ``pack_weights``.
        target: for which machine.
        buckets: batch sizes that get a ``decode_<batch>`` entry of their own.
        sampling: add the entries that turn logits into tokens; without them the module computes logits only.
        activations: ``int8`` where quantized linears may round what they multiply to 8 bits, else ``float``.

    Raises:
        PassError: for an op that neither a kernel nor Relax implements, with its module path and source line.
        NoKernelError: if every kernel refuses a case.
    """
    from gptq_compile.kernels.tvm_env import relax

    builder = relax.BlockBuilder()
    lowered = Lowered(None, [n.meta["param"] for n in program.param_nodes.values() if n.users])
    emitter = _Kernels(builder, target, lowered, activations)
    _Entry(program, builder, emitter, None).build("forward")
    for batch in buckets:
        lowered.decode[batch] = f"decode_{batch}"
        _Entry(program, builder, emitter, batch).build(lowered.decode[batch])
    if sampling:
        add_sampling_entries(program, builder, emitter)
    lowered.module = builder.get()
    if target.kind == "cpu":
        # Temporaries of a size of their own for each length of prompt would all stay in the VM's pool.
        lowered.tokens = CPU_TOKENS
        bounds = {"tir_var_upper_bound": {"n": CPU_TOKENS}}
        lowered.module["forward"] = lowered.module["forward"].with_attrs(bounds)
    return lowered


class _Kernels:
    """Adds each case's PrimFunc to the module once, and counts calls.

    Attributes:
        entry: the one that is being built.
    """

    def __init__(self, builder: Any, target: Target, lowered: Lowered, activations: str) -> None:
        self.builder, self.target, self.lowered = builder, target, lowered
        self._activations = activations
        self.entry = ""
        self._functions: dict[Case, Any] = {}

    def function(self, case: Case) -> Any:
        """The function that computes a case, for one call of it in the entry."""
        if case.op == "quant_linear" and self._activations != "float":
            case = case.with_attrs(activations=self._activations)
        self.lowered.calls[str(case)][self.entry] += 1
        if case not in self._functions:
            selection = select(case, self.target)
            self.lowered.kernels[str(case)] = selection
            func = selection.kernel.prim_func(case, self.target)
            # Not the plain op: "sample" and others are names of VM entries.
            self._functions[case] = self.builder.add_func(func, f"{case.op}_kernel")
        return self._functions[case]

    def call(self, case: Case, args: list[Any], shape: Sequence[Any], dtype: str) -> Any:
        """Emits a destination-passing call with one new output."""
        from gptq_compile.kernels.tvm_env import relax

        out = relax.TensorType(list(shape), dtype)
        return self.builder.emit(relax.call_tir(self.function(case), args, out))

    def call_many(self, case: Case, args: list[Any], outs: list[tuple[Sequence[Any], str]]) -> list[Any]:
        """Emits a destination-passing call with several new outputs, each ``(shape, dtype)``."""
        from gptq_compile.kernels.tvm_env import relax

        types = [relax.TensorType(list(shape), dtype) for shape, dtype in outs]
        value = self.builder.emit(relax.call_tir(self.function(case), args, types))
        return [self.builder.emit(relax.TupleGetItem(value, i)) for i in range(len(outs))]

    def call_inplace(self, case: Case, args: list[Any], inplace: list[int]) -> Any:
        """Emits a call that writes the arguments numbered ``inplace`` and returns them."""
        from gptq_compile.kernels.tvm_env import relax

        outs = [args[i].ty for i in inplace]
        call = relax.call_tir_inplace(self.function(case), args, inplace, outs if len(outs) > 1 else outs[0])
        return self.builder.emit(call)


class _Entry:
    """Builds one Relax function from the program's graph."""

    def __init__(self, program: Program, builder: Any, kernels: _Kernels, batch: int | None) -> None:
        from gptq_compile.kernels.tvm_env import tvm
        from gptq_compile.passes.relax_import import Importer

        self.program, self.builder, self.kernels, self.batch = program, builder, kernels, batch
        self.importer = Importer(builder, self.shape)
        self.env = self.importer.env
        var = lambda name: tvm.tirx.Var(name, "int64")  # noqa: E731
        tokens = program.input("input_ids").meta["val"].shape[1]
        rows = program.input("logit_rows").meta["val"].shape[0]
        table = program.input("page_table").meta["val"].shape
        caches = self._cache_nodes()
        self.symbols: dict[str, Any] = {
            str(tokens): batch if batch is not None else var("n"),
            str(rows): batch if batch is not None else var("m"),
            str(table[0]): batch if batch is not None else var("b"),
            str(table[1]): var("p"),
        }
        if caches:
            self.symbols[str(caches[0].meta["val"].shape[0])] = var("pages")
        self.groups = fusion.plan(program, kernels.target, batch, self.count, kernels.lowered.apart)
        self.needed = fusion.needed(program, self.groups)

    def _cache_nodes(self) -> list[Node]:
        inputs = self.program.inputs
        return inputs[[n.name for n in inputs].index("page_table") + 1 :]

    def dim(self, size: Any) -> Any:
        """A (possibly symbolic) torch size as a TVM integer expression."""
        if isinstance(size, int):
            return size
        return self._sympy(size.node.expr)

    def _sympy(self, expr: Any) -> Any:
        import sympy

        if isinstance(expr, sympy.Symbol):
            return self.symbols[str(expr)]
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            fold = operator.add if isinstance(expr, sympy.Add) else operator.mul
            total = self._sympy(expr.args[0])
            for arg in expr.args[1:]:
                total = fold(total, self._sympy(arg))
            return total
        raise PassError(f"The size {expr} has no translation.")

    def shape(self, node: Node) -> list[Any]:
        """The shape of a node's value."""
        return [self.dim(s) for s in node.meta["val"].shape]

    @property
    def tokens(self) -> Any:
        return self.dim(self.program.input("input_ids").meta["val"].shape[1])

    def build(self, name: str) -> None:
        from gptq_compile.kernels.tvm_env import relax

        self.kernels.entry = name
        program, dim = self.program, self.dim
        tensor = lambda shape, dtype: relax.TensorType(list(shape), dtype)  # noqa: E731
        rows = dim(program.input("logit_rows").meta["val"].shape[0])
        table = program.input("page_table").meta["val"].shape
        caches = self._cache_nodes()
        weights = [n for n in program.param_nodes.values() if n.users]
        params = [
            relax.Var("input_ids", tensor([self.tokens], "int32")),
            relax.Var("positions", tensor([self.tokens], "int32")),
            relax.Var("seq_of_token", tensor([self.tokens], "int32")),
            relax.Var("slots", tensor([self.tokens], "int32")),
            relax.Var("page_table", tensor([dim(d) for d in table], "int32")),
            relax.Var("logit_rows", tensor([rows], "int32")),
            relax.Var("caches", relax.TupleType([tensor(self.shape(c), _dtype(c)) for c in caches])),
            relax.Var("weights", relax.TupleType([tensor(self.shape(w), _dtype(w)) for w in weights])),
        ]
        with self.builder.function(name, params):
            with self.builder.dataflow():
                self._bind(params, caches, weights)
                for node in program.graph.nodes:
                    if node.op == "call_function" and node in self.needed:
                        self._lower(node)
                shape = [rows, dim(program.output.meta["val"].shape[-1])]
                logits = self.importer.reshape(self.env[program.output], shape)
                if _dtype(program.output) != "float32":
                    logits = self.builder.emit(relax.op.astype(logits, "float32"))
                out = self.builder.emit_output(logits)
            self.builder.emit_func_output(out)

    def _bind(self, params: list[Any], caches: list[Node], weights: list[Node]) -> None:
        from gptq_compile.kernels.tvm_env import relax

        ids, positions, seq_of_token, slots, page_table, rows, cache_tuple, weight_tuple = params
        emit, program = self.builder.emit, self.program
        self.positions = positions
        for name, value in (("input_ids", ids), ("position_ids", positions)):
            if program.input(name).users:
                wide = emit(relax.op.astype(value, "int64"))
                self.env[program.input(name)] = emit(relax.op.reshape(wide, [1, self.tokens]))
        self.env[program.input("logit_rows")] = rows
        self.env[program.input("seq_of_token")] = seq_of_token
        self.env[program.input("slots")] = slots
        self.env[program.input("page_table")] = page_table
        for i, node in enumerate(caches):
            self.env[node] = emit(relax.TupleGetItem(cache_tuple, i))
        for i, node in enumerate(weights):
            self.env[node] = emit(relax.TupleGetItem(weight_tuple, i))

    def _lower(self, node: Node) -> None:
        if node in self.env:
            return  # computed together with its operand
        rule = _RULES.get(node.target)
        try:
            if node in self.groups:
                self.env[node] = fusion.emit(self, self.groups[node])
            elif rule is not None:
                self.env[node] = rule(self, node)
            else:
                self.kernels.lowered.translated[str(node.target)][self.kernels.entry] += 1
                self.env[node] = self.importer.translate(node)
        except PassError:
            raise
        except Exception as e:
            if type(e).__module__.startswith("gptq_compile"):
                raise
            raise PassError(f"{where(node)} cannot be lowered: {type(e).__name__}: {str(e)[:400]}") from e

    # -- helpers for the rules

    def flat(self, node: Node, trailing: int = 1) -> Any:
        """The value with its leading axes merged into one, keeping the last ``trailing``."""
        shape, rows = self.shape(node), self.leading(node, trailing)
        return self.importer.reshape(self.env[node], [rows, *shape[len(shape) - trailing :]]), rows

    def leading(self, node: Node, trailing: int = 1) -> Any:
        """The product of all axes but the last ``trailing``."""
        rows: Any = 1
        for d in self.shape(node)[: node.meta["val"].dim() - trailing]:
            rows = d if isinstance(rows, int) and rows == 1 else rows * d
        return rows

    def count(self, node: Node) -> int | None:
        """Rows of a value, if that is a number."""
        rows = self.leading(node)
        return rows if isinstance(rows, int) else None

    def whole_rows(self, node: Node) -> Any:
        """The value as rows: all features of a token, also where heads are an axis of their own."""
        shape = self.shape(node)
        if len(shape) < 4:
            return self.flat(node)[0]
        return self.importer.reshape(self.env[node], [shape[1], math.prod(int(d) for d in shape[2:])])

    def argument(self, node: Node) -> Any:
        """The value as kernels take it: positions come as they are passed in, without the program's widening."""
        return self.positions if node.name == "position_ids" else self.env[node]

    def shaped(self, value: Any, node: Node) -> Any:
        return self.importer.reshape(value, self.shape(node))

    def emit_rows(self, node: Node, case: Callable[..., Case], x: Node, extra: list[Node | None], width: int) -> Any:
        """Runs a row kernel ``(x[m, C], extra..., out[m, width])`` and restores the node's shape."""
        value, rows = self.flat(x)
        args = [value] + [self.env[e] for e in extra if e is not None]
        made = case(rows=rows if isinstance(rows, int) else None)
        return self.shaped(self.kernels.call(made, args, [rows, width], _dtype(node)), node)


def _dtype(node: Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _linear(entry: _Entry, node: Node) -> Any:
    x, weight, *rest = node.args
    weight, bias = fusion.stored(weight), rest[0] if rest else node.kwargs.get("bias")
    n, k = (int(d) for d in weight.meta["val"].shape)
    return _product(entry, node, [weight, bias], n, lambda rows, out: Case.make(
        "linear", _dtype(x), rows, in_features=k, out_features=n, has_bias=bias is not None, out_dtype=out,
        weight_dtype=_dtype(weight),
    ))  # fmt: skip


def _only_widened(node: Node) -> Node | None:
    """The cast to float32 that is the only user of a node, or None."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten._to_copy.default and _dtype(users[0]) == "float32":
        return users[0]
    return None


def _packed_linear(entry: _Entry, node: Node) -> Any:
    x, packed, bias, _, _, bits, group, out_features, has_zeros = node.args
    k = int(x.meta["val"].shape[-1])
    return _product(entry, node, [*packed, bias], out_features, lambda rows, out: packed_case(
        bits, group, k, out_features, has_zeros, bias is not None, _dtype(x), rows, out,
    ))  # fmt: skip


def _product(entry: _Entry, node: Node, extra: list[Node | None], width: int, case: Callable[[Any, str], Case]) -> Any:
    """Runs a linear kernel.

    A cast to float32 that is all that reads the product (the logits, and updates of a float32 residual stream) costs
    nothing when the kernel stores its sums as they are.
    """
    widened = _only_widened(node)
    out = widened or node
    value = entry.emit_rows(out, lambda rows: case(rows, _dtype(out)), node.args[0], extra, width)
    if widened is not None:
        entry.env[widened] = value
    return value


def _rms_norm(entry: _Entry, node: Node) -> Any:
    x, weight, eps, *offset = node.args
    c = int(x.meta["val"].shape[-1])
    case = lambda rows: Case.make(  # noqa: E731
        "rms_norm", _dtype(x), rows, channels=c, eps=float(eps), has_weight=weight is not None,
        weight_offset=float(offset[0]) if offset else 0.0, **_norm_dtypes(node, weight),
    )  # fmt: skip
    return entry.emit_rows(node, case, x, [weight], c)


def _layer_norm(entry: _Entry, node: Node) -> Any:
    x, weight, bias, eps = node.args
    c = int(x.meta["val"].shape[-1])
    case = lambda rows: Case.make(  # noqa: E731
        "layer_norm",
        _dtype(x),
        rows,
        channels=c,
        eps=float(eps),
        has_weight=weight is not None,
        has_bias=bias is not None,
        **_norm_dtypes(node, weight if weight is not None else bias),
    )
    return entry.emit_rows(node, case, x, [weight, bias], c)


def _norm_dtypes(node: Node, parameter: Node | None) -> dict[str, str]:
    """The types of a norm's result and parameters; its statistics are float32 and its input speaks for itself."""
    return {"out_dtype": _dtype(node), "weight_dtype": _dtype(parameter if parameter is not None else node.args[0])}


def _rotary(entry: _Entry, node: Node) -> Any:
    x, cos, sin, *interleaved = node.args
    heads, dim = (int(d) for d in x.meta["val"].shape[-2:])
    value, rows = entry.flat(x, 2)
    tables = [entry.flat(t)[0] for t in (cos, sin)]
    case = Case.make(
        "rotary_embedding", _dtype(x), rows if isinstance(rows, int) else None, heads=heads, head_dim=dim,
        rotary_dim=int(cos.meta["val"].shape[-1]), interleaved=bool(interleaved[0]) if interleaved else False,
        table_dtype=_dtype(cos), out_dtype=_dtype(node),
    )  # fmt: skip
    return entry.shaped(entry.kernels.call(case, [value, *tables], [rows, heads, dim], _dtype(node)), node)


def _gated_act(entry: _Entry, node: Node) -> Any:
    gate, up, act = node.args
    width = int(gate.meta["val"].shape[-1])
    flat_up, _ = entry.flat(up)
    value, rows = entry.flat(gate)
    case = Case.make(
        "gated_act", _dtype(gate), rows if isinstance(rows, int) else None, features=width, act=act,
        out_dtype=_dtype(node),
    )  # fmt: skip
    return entry.shaped(entry.kernels.call(case, [value, flat_up], [rows, width], _dtype(node)), node)


def _paged_attention(entry: _Entry, node: Node) -> Any:
    q, k, v, k_cache, v_cache, _, seq_of_token, slots, page_table, scale, *rest = node.args
    window, softcap, sinks, alibi = with_defaults(rest, [0, 0.0, None, None])
    heads, dim = (int(d) for d in q.meta["val"].shape[-2:])
    kv_heads, v_dim = (int(d) for d in v.meta["val"].shape[-2:])
    rows = entry.batch
    shared: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": dim, "v_head_dim": v_dim, "page_size": PAGE_SIZE}
    if _dtype(k_cache) != _dtype(q):
        shared["cache_dtype"] = _dtype(k_cache)
    keys, values = entry.flat(k, 2)[0], entry.flat(v, 2)[0]
    append = Case.make("kv_append", _dtype(q), rows, **shared)
    updated = entry.kernels.call_inplace(
        append, [keys, values, entry.env[slots], entry.env[k_cache], entry.env[v_cache]], [3, 4]
    )
    from gptq_compile.kernels.tvm_env import relax

    caches = [entry.builder.emit(relax.TupleGetItem(updated, i)) for i in (0, 1)]
    case = Case.make(
        "paged_attention", _dtype(q), rows, heads=heads, scale=float(scale), window=int(window), softcap=float(softcap),
        has_sinks=sinks is not None, has_alibi=alibi is not None, **shared,
    )  # fmt: skip
    query, n = entry.flat(q, 2)
    args = [query, *caches, entry.positions, entry.env[seq_of_token], entry.env[page_table]]
    for extra in (sinks, alibi):
        if extra is not None:
            value = entry.env[extra]
            if value.ty.dtype != "float32":
                value = entry.builder.emit(relax.op.astype(value, "float32"))
            args.append(value)
    return entry.shaped(entry.kernels.call(case, args, [n, heads, v_dim], _dtype(node)), node)


_RULES: dict[Any, Callable[[_Entry, Node], Any]] = {
    aten.linear.default: _linear,
    ops.packed_linear.default: _packed_linear,
    ops.rms_norm.default: _rms_norm,
    ops.layer_norm.default: _layer_norm,
    ops.rotary_embedding.default: _rotary,
    ops.gated_act.default: _gated_act,
    ops.paged_attention.default: _paged_attention,
    **lower_experts.RULES,
}
