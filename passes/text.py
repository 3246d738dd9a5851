# SPDX-License-Identifier: Apache-2.0
"""A program as text, for dumps, tests and reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gptq_compile.passes.program import Program, module_path

_SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def to_text(program: Program) -> str:
    """One line a node: ``%name: f32[1, n, 64] = op(args)  # module``, parameters by name.

    Symbolic dimensions are printed as ``n`` (tokens), ``m`` (rows of logits) and further letters in order.
    """
    symbols: dict[str, str] = {}
    for node in program.inputs:
        for dim in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(dim, torch.SymInt) and str(dim) not in symbols:
                symbols[str(dim)] = "nmbpcdefghijkl"[len(symbols)] if len(symbols) < 14 else f"s{len(symbols)}"

    def dim_text(dim: Any) -> str:
        text = str(dim)
        for raw, letter in symbols.items():
            text = text.replace(raw, letter)
        return text

    def type_text(val: Any) -> str:
        if isinstance(val, torch.Tensor):
            return f"{_SHORT.get(val.dtype, str(val.dtype))}[{', '.join(dim_text(d) for d in val.shape)}]"
        if isinstance(val, (list, tuple)):
            return f"({', '.join(type_text(v) for v in val)})"
        return type(val).__name__ if not isinstance(val, torch.SymInt) else f"int={dim_text(val)}"

    def arg_text(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return arg.meta.get("param") or f"%{arg.name}"
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(arg_text(a) for a in arg)}]"
        return repr(arg)

    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind = "param" if "param" in node.meta else "input"
            lines.append(f"{kind} {arg_text(node)}: {type_text(node.meta.get('val'))}")
        elif node.op == "output":
            lines.append(f"return {arg_text(node.args[0][0])}")
        else:
            args = [arg_text(a) for a in node.args] + [f"{k}={arg_text(v)}" for k, v in node.kwargs.items()]
            path = module_path(node)
            suffix = f"  # {path}" if path else ""
            name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
            lines.append(f"%{node.name}: {type_text(node.meta.get('val'))} = {name}({', '.join(args)}){suffix}")
    return "\n".join(lines) + "\n"
