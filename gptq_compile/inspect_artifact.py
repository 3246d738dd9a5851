# SPDX-License-Identifier: Apache-2.0
"""Reads what an artifact says about itself; nothing in it is executed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_compile.runtime.artifact import Artifact
from gptq_compile.runtime.manifest import Manifest

_ITEM_BYTES = {"float32": 4, "int32": 4, "uint32": 4, "int64": 8, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class LayerError:
    """How well one linear was quantized; errors are relative squared output errors, None where not measured."""

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    method: str
    error: float | None
    error_rtn: float | None
    damp: float | None
    note: str | None


@dataclass(frozen=True)
class Inspection:
    """An artifact in numbers.

    Attributes:
        manifest: as read and checked. ``folder``: where.
        sizes: part -> bytes: library, weights, runtime libraries, tokenizer and configs.
        dtypes: dtype -> (tensors, bytes) of the packed weights.
        layers: one a quantized linear, in the order they were solved.
        kernels: kernel -> cases it was picked for.
        refused: case -> (kernel that refused -> why).
        cache_bytes_per_token: KV cache of one token over all layers.
    """

    folder: Path
    manifest: Manifest
    sizes: Mapping[str, int]
    dtypes: Mapping[str, tuple[int, int]]
    layers: tuple[LayerError, ...]
    kernels: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, Mapping[str, str]]
    cache_bytes_per_token: int

    @property
    def size(self) -> int:
        """Bytes of everything that the manifest lists."""
        return sum(self.sizes.values())


def inspect_artifact(folder: str | Path, verify: bool = False) -> Inspection:
    """Reads an artifact.

    Args:
        folder: what ``gptq-compile`` wrote.
        verify: also check the sha256 of every file (otherwise of the libraries only).

    Raises:
        ArtifactError: if it is incomplete or not what was written.
    """
    manifest = Artifact(folder, verify, again=True).manifest
    sizes: Counter[str] = Counter()
    for name, entry in manifest.files.items():
        sizes[_part(name, manifest.library)] += entry.size
    dtypes: dict[str, tuple[int, int]] = {}
    for weight in manifest.weights:
        count, total = dtypes.get(weight.dtype, (0, 0))
        dtypes[weight.dtype] = (count + 1, total + math.prod(weight.shape) * _ITEM_BYTES.get(weight.dtype, 1))
    kernels: dict[str, list[str]] = {}
    refused: dict[str, dict[str, str]] = {}
    for case, choice in _mapping(manifest.raw.get("kernels")).items():
        chosen = _mapping(choice)
        kernels.setdefault(str(chosen.get("kernel")), []).append(case)
        if reasons := _mapping(chosen.get("refused")):
            refused[case] = {str(k): str(v) for k, v in reasons.items()}
    return Inspection(
        folder=Path(folder),
        manifest=manifest,
        sizes=dict(sizes),
        dtypes=dtypes,
        layers=tuple(_layer(entry) for entry in _mapping(manifest.raw.get("quantization")).get("layers", [])),
        kernels={k: tuple(v) for k, v in kernels.items()},
        refused=refused,
        cache_bytes_per_token=manifest.cache_bytes_per_token,
    )


def _part(name: str, library: str) -> str:
    if name == library:
        return "machine code"
    if name.endswith(".safetensors"):
        return "weights"
    return "runtime libraries" if name.startswith("lib/") else "tokenizer and configs"


def _layer(entry: Any) -> LayerError:
    values = _mapping(entry)
    return LayerError(
        name=str(values.get("name", "?")),
        shape=tuple(values.get("shape") or ()),
        bits=int(values.get("bits") or 0),
        group_size=int(values.get("group_size") or 0),
        method=str(values.get("method", "?")),
        error=_number(values.get("error")),
        error_rtn=_number(values.get("error_rtn")),
        damp=_number(values.get("damp")),
        note=values.get("note"),
    )


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
