# SPDX-License-Identifier: Apache-2.0
"""Binds a checkpoint's tensors to a model's parameter names, with the renamings and conversions transformers knows.

A checkpoint often uses other names than the model class of today: GPT-2 without the ``transformer.`` prefix, one tensor
per expert where the model has one for all. transformers keeps these differences as data (a list of transforms per
model type). The same list is applied here, one parameter at a time, so nothing is read before it is asked for.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_compile.errors import ModelError
from gptq_compile.frontend.checkpoint import Checkpoint
from gptq_compile.frontend.wording import first_line
from gptq_compile.passes.program import ParamStore

log = logging.getLogger(__name__)


@dataclass
class _Conversion:
    """One transformers converter with the checkpoint tensors it takes: ``(checkpoint name, matched pattern)``."""

    first_target: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)

    def run(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameter name -> tensor of everything this conversion makes."""
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.sources:
            converter.add_tensor(self.first_target, key, pattern, lambda key=key: read(key))
        made = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def bind(model: Any, checkpoint: Checkpoint, origins: dict[str, str] | None = None) -> ParamStore:
    """The checkpoint's tensors under the model's parameter names, read on demand and checked when read.

    Args:
        model: an instance with parameters on meta; gives names, shapes and ties.
        checkpoint: the opened shards.
        origins: filled with parameter name -> checkpoint name of the tensors that are taken as they are.

    Raises:
        ModelError: a parameter has no tensor, or one of another shape.
    """
    wanted = dict(model.state_dict())
    try:
        renamed, conversions, left = _match(model, checkpoint, wanted)
        converted = {c.first_target: c.run(model, lambda key: _on_meta(checkpoint, key)) for c in conversions}
    except ModelError:
        raise
    except Exception as e:
        # The list of transforms is not a public API of transformers, its loader is.
        log.warning(
            "%s goes through transformers' own loader, in memory (%s: %s).", checkpoint.folder, type(e).__name__, e
        )
        return load_with_transformers(model, checkpoint.folder)
    params = ParamStore()
    if origins is not None:
        origins.update(renamed)
    for name, key in renamed.items():
        origin = f"{name!r} in {checkpoint.file_of(key)}"
        load = checked(lambda key=key: checkpoint.read(key), origin)  # type: ignore[misc]
        _add(params, model, name, checkpoint.shapes[key], wanted[name], load, origin)
    for conversion in conversions:
        origin = f"in {checkpoint.file_of(conversion.sources[0][0])}"
        for name, value in converted[conversion.first_target].items():
            if name in wanted:
                load = checked(_one_of(conversion, name, model, checkpoint), f"{name!r} {origin}")
                _add(params, model, name, tuple(value.shape), wanted[name], load, f"{name!r} {origin}")
    for key in left:
        log.info("The model has no parameter for the checkpoint's tensor %r, which is left out.", key)
    finish(params, model, str(checkpoint.folder))
    return params


def _on_meta(checkpoint: Checkpoint, key: str) -> Tensor:
    return torch.empty(checkpoint.shapes[key], dtype=checkpoint.dtype(key), device="meta")


def _one_of(conversion: _Conversion, name: str, model: Any, checkpoint: Checkpoint) -> Callable[[], Tensor]:
    return lambda: conversion.run(model, checkpoint.read)[name].contiguous()


def _match(
    model: Any, checkpoint: Checkpoint, wanted: dict[str, Tensor]
) -> tuple[dict[str, str], list[_Conversion], list[str]]:
    """Decides where each checkpoint tensor goes, as ``transformers.core_model_loading`` does.

    Returns:
        Parameter name -> checkpoint name of those taken as they are; the conversions; the names nobody wants.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    taken: dict[str, str] = {}
    conversions: dict[str, _Conversion] = {}
    left = []
    for key in sorted(checkpoint.shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            left.append(key)
        elif pattern is None:
            taken[name] = key
        else:
            conversion = conversions.setdefault(name, _Conversion(name, by_pattern[pattern]))
            conversion.sources.append((key, pattern))
    return taken, list(conversions.values()), left


def _add(
    params: ParamStore,
    model: Any,
    name: str,
    shape: tuple[int, ...],
    like: Tensor,
    load: Callable[[], Tensor],
    origin: str,
) -> None:
    if shape != tuple(like.shape):
        raise ModelError(
            f"The tensor {origin} has shape {list(shape)}, but the config of the {model.config.model_type} model "
            f"asks for {list(like.shape)}. Check that config.json belongs to these weights."
        )
    params.add(name, shape, torch.float32 if like.is_floating_point() else like.dtype, load)


def checked(load: Callable[[], Tensor], origin: str) -> Callable[[], Tensor]:
    """Wraps a loader so that the first read refuses NaN and infinity (safetensors does not look).

    Args:
        load: reads the tensor.
        origin: its quoted name and file, for the message.
    """
    clean = False

    def checked_get() -> Tensor:
        nonlocal clean
        tensor = load()
        if not clean and tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):
            # The sum is one pass without a temporary; it can overflow with finite terms, so a hit is counted.
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ModelError(
                    f"The tensor {origin} holds {bad} NaN or infinite values of {tensor.numel()}; the checkpoint is "
                    "damaged or diverged in training. Download it again or use another one."
                )
        clean = True
        return tensor

    return checked_get


def finish(params: ParamStore, model: Any, origin: str) -> None:
    """Ties what the model ties and makes sure that every parameter has a tensor.

    A checkpoint with two different tensors for what its config ties is taken at its word, as transformers does; then
    ``model.config.tie_word_embeddings`` becomes false.

    Raises:
        ModelError: naming the first parameter without one.
    """
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(param), name)
        if canonical == name:
            continue
        if canonical in params and name in params and not torch.equal(params.get(name), params.get(canonical)):
            log.warning(
                "%s has different tensors for %r and %r, which its config ties; they stay apart.",
                origin,
                canonical,
                name,
            )
            model.config.tie_word_embeddings = False
        elif canonical in params:
            params.drop(name)
            params.tie(name, canonical)
        elif name in params:
            params.tie(canonical, name)
            first[id(param)] = name
    optional = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [n for n, _ in model.named_parameters() if n not in params and not any(p.search(n) for p in optional)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(
            f"{origin} has no tensor for {missing[0]!r}{more}, which the {model.config.model_type} model needs. "
            "Check that all shards are there and that config.json belongs to these weights."
        )


def load_with_transformers(model: Any, folder: Path, **kwargs: Any) -> ParamStore:
    """Loads the whole model in memory with ``from_pretrained`` and takes its state dict: for what nothing else reads.

    Args:
        model: an instance on meta; gives the names wanted and the ties.
        folder: the checkpoint's folder.
        kwargs: passed on, for example ``gguf_file``.
    """
    from transformers import AutoModelForCausalLM

    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except Exception as e:
        raise ModelError(f"transformers cannot load the weights of {folder} ({first_line(e)}).") from e
    loaded, info = result
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder} has no tensor for {missing[0]!r}, needed by a {loaded.config.model_type} model.")
    return params_of(loaded, str(folder), like=model)


def params_of(model: Any, origin: str = "the model in memory", *, like: Any = None) -> ParamStore:
    """The parameters of a model that is already in memory, as float32, under its own names.

    Args:
        model: a transformers model with real weights.
        origin: where they came from, for messages.
        like: the model whose names and ties are wanted (default: ``model``).
    """
    params = ParamStore()
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        load = checked(lambda t=tensor, d=dtype: t.detach().to(d), f"{name!r} of {origin}")  # type: ignore[misc]
        params.add(name, tuple(tensor.shape), dtype, load)
    finish(params, like if like is not None else model, origin)
    return params
