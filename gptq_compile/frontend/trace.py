# SPDX-License-Identifier: Apache-2.0
"""Traces a causal language model into a :class:`Program` on the meta device: no weights are read."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind

from gptq_compile.errors import ModelError
from gptq_compile.frontend import hooks
from gptq_compile.passes.program import ModelInfo, ParamStore, Program, where

log = logging.getLogger(__name__)

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length")
_SYNONYMS = {
    torch.ops.aten.concat.default: torch.ops.aten.cat.default,
    torch.ops.aten.concatenate.default: torch.ops.aten.cat.default,
    torch.ops.aten.multiply.Tensor: torch.ops.aten.mul.Tensor,
    torch.ops.aten.divide.Tensor: torch.ops.aten.div.Tensor,
    torch.ops.aten.true_divide.Tensor: torch.ops.aten.div.Tensor,
    torch.ops.aten.subtract.Tensor: torch.ops.aten.sub.Tensor,
    torch.ops.aten.negative.default: torch.ops.aten.neg.default,
    torch.ops.aten.swapaxes.default: torch.ops.aten.transpose.int,
    torch.ops.aten.swapdims.default: torch.ops.aten.transpose.int,
}
_TRACE_TOKENS = 7  # any length works: the dimension is dynamic


class _CausalLM(nn.Module):
    """The traced signature: ``(input_ids[1, n], position_ids[1, n], logit_rows[m]) -> logits[1, m, vocab]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        # RoBERTa's kind counts positions from the padding id on when given none, and not at all when given some.
        counts_ids = any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules())
        self.takes_positions = "position_ids" in accepted and not counts_ids
        self.extra = {k: False for k in ("use_cache", "output_attentions", "output_hidden_states") if k in accepted}

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        logits = self.model(input_ids=input_ids, **positions, **self.extra, return_dict=True).logits
        return logits.index_select(1, logit_rows)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Creates parameters without memory or initialization but leaves buffers real.

    Buffers such as rotary frequencies are computed by the constructor and stored in no checkpoint, so they must hold
    their values; parameters come from the checkpoint.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_model(config: Any, attention: str) -> nn.Module:
    """Instantiates the model of a config in float32, parameters on meta and buffers with their values.

    Raises:
        ModelError: if transformers has no causal language model for this config.
    """
    from transformers import AutoModelForCausalLM

    parts = [config, *(p for p in [config.get_text_config()] if p is not config)]
    stored = [part.dtype for part in parts]
    try:
        with _parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attention,
                experts_implementation=hooks.IMPLEMENTATION,
                dtype=torch.float32,
            )
    except ValueError as e:
        raise ModelError(f"transformers cannot build a causal language model of type {config.model_type!r}: {e}") from e
    finally:
        for part, dtype in zip(parts, stored, strict=True):  # the constructor leaves float32 in the caller's config
            part.dtype = dtype
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False  # not every forward takes use_cache as an argument
    return model.eval().requires_grad_(False)


def context_length(config: Any) -> int:
    """Most positions a model takes, from whichever key its config uses."""
    text = config.get_text_config()
    for key in _CONTEXT_KEYS:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def trace(config: Any, params: ParamStore, *, name: str = "", source: str = "") -> Program:
    """Traces the model of a transformers config.

    Args:
        config: a ``PretrainedConfig``.
        params: the checkpoint's tensors under the model's parameter names; traced constants are added to it.
        name: short name of the model. ``source``: where it came from.

    Returns:
        A program with inputs ``input_ids [1, n]``, ``position_ids [1, n]``, ``logit_rows [m]`` (int64), which returns
        the logits ``[1, m, vocab]`` of the rows asked for.

    Raises:
        ModelError: if the model cannot be traced, naming the op, the module and the way out.
    """
    failures: list[Exception] = []
    with hooks.installed():
        for attention in _attention_modes(config):
            try:
                model = build_model(config, attention)
                exported, buffers = _export(model)
                if attention == hooks.IMPLEMENTATION and not exported.graph.find_nodes(
                    op="call_function", target=torch.ops.gptq_compile.attention.default
                ):
                    raise ModelError("the model does not use transformers' attention interface")
                break
            except Exception as e:
                log.info("Tracing %s with %s attention failed: %s", config.model_type, attention, e)
                failures.append(e)
        else:
            raise _untraceable(config, failures) from failures[0]
    return _to_program(exported, model, buffers, params, config, name, source)


def _attention_modes(config: Any) -> tuple[str, ...]:
    """How to trace attention, most promising first: through the interface, or as the model spells it out."""
    from transformers import AutoModelForCausalLM

    try:
        module = sys.modules[AutoModelForCausalLM._model_mapping[type(config)].__module__]
    except KeyError:
        return (hooks.IMPLEMENTATION, "eager")
    if hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return (hooks.IMPLEMENTATION, "eager")
    return ("eager", hooks.IMPLEMENTATION)


def _untraceable(config: Any, failures: list[Exception]) -> ModelError:
    def words(e: Exception) -> str:
        lines = [line.strip() for line in str(e).strip().splitlines() if line.strip()]
        if lines and lines[0].startswith("Constraints violated"):
            return "its operations put conditions on the number of tokens: " + "; ".join(lines[1:2])[:300]
        return lines[0][:300] if lines else type(e).__name__

    first, second = failures
    frame, tb = "", first.__traceback__
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if "modeling_" in file:
            frame = f" at {file.rsplit('/', 1)[-1]}:{tb.tb_lineno} in {tb.tb_frame.f_code.co_name}"
        tb = tb.tb_next
    return ModelError(
        f"The {config.model_type} model cannot be traced{frame}: {words(first)}. (In the other form of attention: "
        f"{words(second)}.) A model must be a causal decoder whose control flow does not depend on token values; "
        "see the list of supported features in the README."
    )


def _export(model: nn.Module) -> tuple[torch.export.ExportedProgram, dict[str, Tensor]]:
    """Exports on meta; returns the program and the real values of the buffers."""
    buffers = {k: v.detach().clone() for k, v in model.named_buffers() if v.device.type != "meta"}
    model = model.to("meta")
    m = torch.export.Dim("m", min=2, max=1 << 20)
    ids = torch.zeros((1, _TRACE_TOKENS), dtype=torch.long, device="meta")
    rows = torch.zeros(_TRACE_TOKENS - 2, dtype=torch.long, device="meta")
    context = context_length(model.config)
    # Models that slice tables (masks, biases) of their context length hold up to it, some only one short of it.
    for longest in (context, context - 1):
        n = torch.export.Dim("n", min=2, max=longest)
        with torch.no_grad(), warnings.catch_warnings(), hooks.KeepConstants():
            warnings.simplefilter("ignore")
            try:
                exported = torch.export.export(
                    _CausalLM(model), (ids, ids.clone(), rows), dynamic_shapes=({1: n}, {1: n}, {0: m}), strict=False
                )
                return exported.run_decompositions({}), buffers
            except torch._dynamo.exc.UserError as e:
                if "Constraints violated" not in str(e) or longest < context:
                    raise
    raise AssertionError("the last length raises")


def _to_program(
    exported: torch.export.ExportedProgram,
    model: nn.Module,
    buffers: dict[str, Tensor],
    params: ParamStore,
    config: Any,
    name: str,
    source: str,
) -> Program:
    params = params.copy()
    first_name: dict[int, str] = {}
    for pname, param in model.named_parameters(remove_duplicate=False):
        canonical = first_name.setdefault(id(param), pname)
        if canonical != pname and canonical in params:
            params.tie(pname, canonical)
        elif canonical != pname and pname in params:
            params.tie(canonical, pname)
    signature = exported.graph_signature
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            continue
        target = str(spec.target).removeprefix("model.")
        if spec.kind == InputKind.BUFFER and target in buffers and target not in params:
            params.set(target, buffers[target])
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            target = f"constants.{target}"
            constant = exported.constants[spec.target]  # type: ignore[index]
            if constant.device.type == "meta" and node.users:
                raise ModelError(
                    f"The {config.model_type} model makes a tensor of constants while it runs, whose values the trace "
                    f"cannot see: {where(next(iter(node.users)))}."
                )
            params.set(target, constant)
        if node.users and target not in params:
            raise ModelError(
                f"The checkpoint has no tensor for {target!r}, which the {config.model_type} model uses. "
                "Check that all shards are present and that the config belongs to these weights."
            )
        if node.users and params.shape(target) != tuple(node.meta["val"].shape):
            raise ModelError(
                f"Tensor {target!r} has shape {list(params.shape(target))} in the checkpoint, but the config of the "
                f"{config.model_type} model asks for {list(node.meta['val'].shape)}."
            )
        node.meta["param"] = target
    for out in signature.output_specs:
        if out.kind != OutputKind.USER_OUTPUT:
            raise ModelError(f"The {config.model_type} model changes its buffer {out.target!r} while it runs.")
    info = ModelInfo(
        name=name or config.model_type,
        source=source,
        model_type=config.model_type,
        vocab_size=int(exported.graph.find_nodes(op="output")[0].args[0][0].meta["val"].shape[-1]),
        context_length=context_length(config),
        config=config.to_dict(),
    )
    program = Program(exported.graph_module, params, info)
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and not node.users and "param" in node.meta:
            program.graph.erase_node(node)
        elif node.op == "call_function":
            node.target = _SYNONYMS.get(node.target, node.target)
    return program
