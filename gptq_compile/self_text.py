# SPDX-License-Identifier: Apache-2.0
"""Lets the model write its own calibration text, with transformers' eager implementation and its KV cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from gptq_compile.calibration import CalibrationConfig, Generate, self_generated
from gptq_compile.errors import CalibrationError, ModelError
from gptq_compile.frontend.source import ModelSource
from gptq_compile.passes.gptq.config import QuantizeConfig

log = logging.getLogger(__name__)

_NOTE_EVERY = 128  # steps
_ON_GPU = 128  # sequences at a time; a step of a few takes a GPU as long


def settings_for(nsamples: int, seqlen: int, seed: int, device: str) -> CalibrationConfig:
    """What to write, with the number of sequences at a time that suits a device."""
    settings = CalibrationConfig(nsamples=nsamples, seqlen=seqlen, seed=seed)
    return settings if torch.device(device).type == "cpu" else replace(settings, batch=_ON_GPU)


def text_to_tune_on(
    source: ModelSource,
    config: QuantizeConfig,
    seqlen: int,
    device: str,
    note: Callable[[str], None],
    remember: Callable[[Generate], Generate] = lambda generate: generate,
) -> NDArray[np.int64]:
    """The sequences that are tuned on besides those for calibration; int64 ``[config.tune_nsamples, seqlen]``.

    Args:
        source: the original model. ``config``: how many, and the seed.
        seqlen: tokens of one.
        device: where the model runs. ``note``: told now and then how far it is.
        remember: wraps the sampler, to keep what was written.
    """
    # Seeds of batches count up from here; those of calibration text end below.
    settings = settings_for(config.tune_nsamples, seqlen, config.seed + config.nsamples, device)
    generate = remember(generator(source, device, config.tune_nsamples * seqlen, note))
    return self_generated(source.tokenizer, settings, source.vocab_size, generate)


def generator(source: ModelSource, device: str, total: int, note: Callable[[str], None]) -> Generate:
    """A sampler over the source model; the model is built when it is first called and freed with the sampler.

    Args:
        source: the model. ``device``: where it runs.
        total: tokens that will be asked for in all calls together.
        note: told now and then how far it is.

    Raises:
        CalibrationError: (when called) if the whole model does not fit into memory.
    """
    model: torch.nn.Module | None = None
    made = 0

    def generate(prompts: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
        nonlocal model, made
        if model is None:
            model = _materialize(source, device)
        begin, start = made, time.monotonic()

        def tell(step: int) -> None:
            nonlocal made
            made = begin + len(prompts) * step
            if step % _NOTE_EVERY == 0 or step == count:
                left = (time.monotonic() - start) / (made - begin) * (total - made)
                note(f"wrote {made} of {total} tokens, about {left:.0f} s left")

        return _fitting(model, torch.from_numpy(prompts).to(device), count, seed, tell).cpu().numpy()

    return generate


def _fitting(
    model: torch.nn.Module, prompts: torch.Tensor, count: int, seed: int, tell: Callable[[int], None]
) -> torch.Tensor:
    """`_sample`, in halves where the keys and values of all sequences do not fit into memory."""
    try:
        return _sample(model, prompts, count, seed, tell)
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    torch.cuda.empty_cache()
    return torch.cat([_fitting(model, half, count, seed + i, tell) for i, half in enumerate(prompts.chunk(2))])


def _materialize(source: ModelSource, device: str) -> torch.nn.Module:
    from gptq_compile.frontend import hooks
    from gptq_compile.frontend.trace import build_model

    with hooks.installed():
        try:
            model = build_model(source.config, "sdpa")
        except ModelError:  # the architecture only has its own attention
            model = build_model(source.config, "eager")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        for name, _ in list(model.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            value = source.params.get(name).to(device, dtype)
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
        model.tie_weights()  # type: ignore[operator]
        for buffer_name, value in list(model.named_buffers()):
            parent, _, leaf = buffer_name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = value.to(device)
    except (MemoryError, torch.OutOfMemoryError) as e:
        raise CalibrationError(
            "The model does not fit into memory to write its own calibration text. Give a text with --calibration FILE."
        ) from e
    return model.eval()


@torch.no_grad()
def _sample(
    model: torch.nn.Module, prompts: torch.Tensor, count: int, seed: int, tell: Callable[[int], None]
) -> torch.Tensor:
    """Samples at temperature 1 from the whole distribution; int64 ``[b, count]``; tells the step it finished."""
    rng = torch.Generator(prompts.device).manual_seed(seed)
    step, cache, made = prompts, None, []
    for index in range(count):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        probs = torch.softmax(out.logits[:, -1].float(), dim=-1)
        step = torch.multinomial(probs, 1, generator=rng)
        made.append(step)
        tell(index + 1)
    return torch.cat(made, dim=1)
