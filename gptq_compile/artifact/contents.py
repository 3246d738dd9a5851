# SPDX-License-Identifier: Apache-2.0
"""What an artifact says about itself."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from gptq_compile import __version__
from gptq_compile.frontend.source import ModelSource
from gptq_compile.kernels.cache_format import row_width
from gptq_compile.kernels.target import Target
from gptq_compile.options import CompileOptions
from gptq_compile.passes.program import Program


def library_name(target: Target, variant: Target) -> str:
    """The file of one of a target's variants: ``model.so`` for what every machine must have, else with its name."""
    if variant == target.variants[0]:
        return "model.so"
    return f"model.{variant.archs[0].replace('+', '-')}.so"


def manifest(
    program: Program, source: ModelSource, options: CompileOptions, lowered: Sequence[Any], built: Sequence[Any]
) -> dict[str, Any]:
    """What the artifact says about itself; no times of the clock, so that the same inputs give the same bytes.

    Args:
        program: what was lowered.
        source: the model.
        options: the settings.
        lowered: one for each of the target's variants.
        built: the libraries, as many.
    """
    layers_done = [
        {key: value for key, value in layer.items() if key != "seconds"}
        for layer in program.attrs.get("quantization", [])
    ]
    target = options.resolved_target
    caches = program.inputs[[n.name for n in program.inputs].index("page_table") + 1 :]
    layers = []
    extra = row_width(options.resolved_kv_cache, 0)
    for k, v in zip(caches[::2], caches[1::2], strict=True):
        heads, dim, v_dim = (int(d) for d in (k.meta["val"].shape[1], k.meta["val"].shape[3], v.meta["val"].shape[3]))
        layers.append({"kv_heads": heads, "head_dim": dim - extra, "v_head_dim": v_dim - extra})
    kernels = [_kernels(each) for each in lowered]
    libraries = [
        {
            "arch": variant.archs[0],
            "file": library_name(target, variant),
            "kernels": {case: choice for case, choice in chosen.items() if choice != kernels[0].get(case)},
        }
        for variant, chosen in zip(target.variants, kernels, strict=True)
    ]
    versions = {name: _version(name) for name in ("torch", "transformers", "apache-tvm", "apache-tvm-ffi")}
    return {
        "model": {
            "name": source.name,
            "source": source.source,
            "model_type": source.config.model_type,
            "vocab_size": program.info.vocab_size,
            "context_length": source.context_length,
            "bos_token_id": source.bos_token_id,
            "eos_token_ids": source.eos_token_ids,
            "add_bos": source.add_bos,
            "inputs": source.hashes(),
        },
        "target": {
            "kind": target.kind,
            "archs": list(target.archs),
            "machine_code": [a for b in built for a in b.archs],
        },
        "dtype": options.resolved_dtype,
        "quantization": {
            **options.as_dict(),
            **({"checkpoint": program.attrs["checkpoint"]} if "checkpoint" in program.attrs else {}),
            **({"budget": program.attrs["budget"]} if "budget" in program.attrs else {}),
            **({"tuning": program.attrs["tuning"]} if "tuning" in program.attrs else {}),
            "layers": layers_done,
        },
        "kv_cache": {
            "page_size": int(caches[0].meta["val"].shape[2]),
            "dtype": options.resolved_kv_cache,
            "layers": layers,
        },
        "entries": {
            "forward": "forward",
            "forward_tokens": lowered[0].tokens,
            "decode": {str(b): name for b, name in lowered[0].decode.items()},
            **{name: name for name in ("sample", "repetition_penalty", "mark_seen", "advance")},
        },
        "kernels": kernels[0],
        "refused_together": lowered[0].apart,
        "translated": {op: dict(calls) for op, calls in lowered[0].translated.items()},
        "library": "model.so",
        **({"libraries": libraries} if len(libraries) > 1 else {}),
        "generation": source.generation,
        "chat": source.chat,
        "versions": {"gptq-compile": __version__, "python": platform.python_version(), **versions},
    }


def _kernels(lowered: Any) -> dict[str, Any]:
    return {
        case: {"kernel": choice.kernel.name, "refused": dict(choice.refused), "calls": dict(lowered.calls[case])}
        for case, choice in lowered.kernels.items()
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
