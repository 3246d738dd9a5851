# SPDX-License-Identifier: Apache-2.0
"""The entries that turn logits into tokens and prepare the next step; they depend on the vocabulary only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptq_compile.kernels.registry import Case
from gptq_compile.passes.evaluate import PAGE_SIZE
from gptq_compile.passes.program import Program


def add_sampling_entries(program: Program, builder: Any, kernels: Any) -> None:
    """Adds ``sample``, ``repetition_penalty``, ``mark_seen`` and ``advance``.

    Args:
        program: for its vocabulary.
        builder: the Relax block builder, between functions.
        kernels: emits calls of kernels: ``call`` and ``call_inplace``; ``entry`` is set to what is being built.
    """
    from gptq_compile.kernels.tvm_env import relax, tvm

    vocab = program.info.vocab_size

    def entry(name: str, arguments: dict[str, tuple[list[Any], str]], emit: Callable[[list[Any]], Any]) -> None:
        kernels.entry = name
        params = [relax.Var(n, relax.TensorType(shape, dtype)) for n, (shape, dtype) in arguments.items()]
        with builder.function(name, params):
            with builder.dataflow():
                out = builder.emit_output(emit(params))
            builder.emit_func_output(out)

    b, p = tvm.tirx.Var("b", "int64"), tvm.tirx.Var("p", "int64")
    case = lambda op: Case.make(op, "float32", None, vocab_size=vocab)  # noqa: E731
    f32, i32 = ([b], "float32"), ([b], "int32")
    entry(
        "sample",
        {"logits": ([b, vocab], "float32"), "temperature": f32, "top_k": i32, "top_p": f32, "min_p": f32, "seeds": i32,
         "positions": i32},
        lambda a: kernels.call(case("sample"), a, [b], "int32"),
    )  # fmt: skip
    entry(
        "repetition_penalty",
        {"logits": ([b, vocab], "float32"), "seen": ([b, vocab], "uint8"), "penalty": f32},
        lambda a: kernels.call_inplace(case("repetition_penalty"), a, [0]),
    )
    entry(
        "mark_seen",
        {"seen": ([b, vocab], "uint8"), "tokens": i32},
        lambda a: kernels.call_inplace(case("mark_seen"), a, [0]),
    )
    entry(
        "advance",
        {"tokens": i32, "page_table": ([b, p], "int32"), "input_ids": i32, "positions": i32, "slots": i32},
        lambda a: kernels.call_inplace(Case.make("advance", "float32", None, page_size=PAGE_SIZE), a, [2, 3, 4]),
    )
