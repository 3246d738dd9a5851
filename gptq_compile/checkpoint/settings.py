# SPDX-License-Identifier: Apache-2.0
"""What a compilation's settings mean where a GPTQ checkpoint goes in or comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gptq_compile.checkpoint.config import GptqConfig
from gptq_compile.errors import ConfigError
from gptq_compile.options import CompileOptions

_FLAGS = {"act_order": "--act-order", "sym": "--sym", "quantize_lm_head": "--quantize-lm-head"}


def settled(options: CompileOptions, given: GptqConfig | None, name: str) -> CompileOptions:
    """The options with what follows from the formats filled in.

    Args:
        options: as asked for.
        given: settings of the model if it is a GPTQ checkpoint already. ``name``: the model's.

    Raises:
        ConfigError: the model is quantized, and a setting asks for something else than what it is.
    """
    if given is None:
        quantize = options.quantize
        if options.format == "gptq" and not quantize.sym:
            quantize = replace(quantize, min_zero=1)  # version 1 stores zero points minus 1
        return replace(options, quantize=quantize, asked=options.settings_asked)
    stored: dict[str, Any] = {
        "wbits": given.bits,
        "group_size": given.group_size,
        "sym": given.sym,
        "act_order": bool(given.desc_act),
        "quantize_lm_head": given.lm_head,
    }
    grid = f"{given.bits} bits, {_group(given)}, {'symmetric' if given.sym else 'asymmetric'}"
    for setting in options.settings_asked:
        flag = _FLAGS.get(setting, "--" + setting.replace("_", "-"))
        if setting not in stored:
            raise ConfigError(
                f"{name} is quantized already ({grid}), and its codes are taken as they are, so {flag} has nothing to "
                "do. Leave it out, or give the checkpoint with float weights that it was made from."
            )
        if (asked := getattr(options.quantize, setting)) != stored[setting]:
            raise ConfigError(
                f"{name} is quantized already ({grid}), which contradicts {flag} ({setting} {asked!r}). Leave it out, "
                "or give the checkpoint with float weights that it was made from."
            )
    quantize = replace(
        type(options.quantize)(),
        **stored,
        static_groups=not given.desc_act,
        compute_dtype=options.quantize.compute_dtype,
    )
    return replace(options, quantize=quantize, lm_head_bits=options.lm_head_bits or 0, asked=())


def words(given: GptqConfig) -> str:
    """What a checkpoint is, for people."""
    by = f", written by {given.quantizer}" if given.quantizer else ""
    return f"codes of the checkpoint as they are ({given.format}{', desc_act' if given.desc_act else ''}{by})"


def _group(given: GptqConfig) -> str:
    return "one group per row" if given.group_size == -1 else f"groups of {given.group_size}"
