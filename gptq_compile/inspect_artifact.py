# SPDX-License-Identifier: Apache-2.0
"""Reads what an artifact says about itself; nothing in it is executed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_compile.report.stored import stored_figures
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
class Choice:
    """Cases of one op for which the same kernel was taken for the same reasons.

    Attributes:
        op: what is computed. ``kernel``: that computes it. ``on``: the processor, where libraries for several differ.
        cases: what exactly: shapes, types, rows.
        calls: entry -> how often it calls the kernel; empty for artifacts made before this was counted.
        refused: (kernel, why) of each faster one.
    """

    op: str
    kernel: str
    cases: tuple[str, ...]
    calls: Mapping[str, int]
    refused: tuple[tuple[str, str], ...]
    on: str = ""

    @property
    def name(self) -> str:
        """The kernel, and the processor if it is for one of several."""
        return f"{self.kernel} on {self.on}" if self.on else self.kernel

    @property
    def where(self) -> str:
        """The calls in words."""
        return counted(self.calls)

    @property
    def why(self) -> tuple[str, ...]:
        """The refusals in words: one sentence for all kernels that gave the same reason."""
        reasons: dict[str, list[str]] = {}
        for kernel, reason in self.refused:
            reasons.setdefault(reason, []).append(kernel)
        return tuple(f"{', '.join(kernels)}: {reason}" for reason, kernels in reasons.items())


def counted(calls: Mapping[str, int]) -> str:
    """Entry -> count in words: ``210 in forward, decode_1, 2, 4; 1 in sample``."""
    entries: dict[int, list[str]] = {}
    for entry, count in calls.items():
        names = entries.setdefault(count, [])
        batch = entry.removeprefix("decode_")
        names.append(batch if batch != entry and any(n.startswith("decode_") for n in names) else entry)
    return "; ".join(f"{count} in {', '.join(names)}" for count, names in entries.items())


@dataclass(frozen=True)
class PassTime:
    """What one pass took; ``changed`` the program or not, ``nodes`` before and after."""

    name: str
    seconds: float
    changed: bool
    nodes: tuple[int, int]


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
        choices: the same, equal ones together.
        together: the same for ops that one kernel could have computed together, and that have a kernel each.
        translated: op that TVM makes kernels for -> entry -> how often it stands there.
        passes: what each pass took; ``build``: step from the lowered module to the library -> seconds. Both are read
            from the report in the folder, and empty without one.
        cache_bytes_per_token: KV cache of one token over all layers.
    """

    folder: Path
    manifest: Manifest
    sizes: Mapping[str, int]
    dtypes: Mapping[str, tuple[int, int]]
    layers: tuple[LayerError, ...]
    kernels: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, Mapping[str, str]]
    choices: tuple[Choice, ...]
    together: tuple[Choice, ...]
    translated: Mapping[str, Mapping[str, int]]
    passes: tuple[PassTime, ...]
    build: Mapping[str, float]
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
        sizes[_part(name, {manifest.library, *manifest.libraries.values()})] += entry.size
    dtypes: dict[str, tuple[int, int]] = {}
    for weight in manifest.weights:
        count, total = dtypes.get(weight.dtype, (0, 0))
        dtypes[weight.dtype] = (count + 1, total + math.prod(weight.shape) * _ITEM_BYTES.get(weight.dtype, 1))
    kernels: dict[str, list[str]] = {}
    refused: dict[str, dict[str, str]] = {}
    chosen_kernels = _all_kernels(manifest)
    for case, choice in chosen_kernels.items():
        chosen = _mapping(choice)
        kernels.setdefault(str(chosen.get("kernel")), []).append(case)
        if reasons := _mapping(chosen.get("refused")):
            refused[case] = {str(k): str(v) for k, v in reasons.items()}
    figures = stored_figures(Path(folder))
    return Inspection(
        folder=Path(folder),
        manifest=manifest,
        sizes=dict(sizes),
        dtypes=dtypes,
        layers=tuple(_layer(entry) for entry in _mapping(manifest.raw.get("quantization")).get("layers", [])),
        kernels={k: tuple(v) for k, v in kernels.items()},
        refused=refused,
        choices=tuple(c for on, kernels_of in _libraries(manifest) for c in _choices(kernels_of, on)),
        together=_choices(
            {case: {"refused": why} for case, why in _mapping(manifest.raw.get("refused_together")).items()}
        ),
        translated={op: _counts(calls) for op, calls in _mapping(manifest.raw.get("translated")).items()},
        passes=tuple(_pass(p) for p in _list(figures.get("passes"))),
        build={k: _number(v) or 0.0 for k, v in _mapping(figures.get("build")).items()},
        cache_bytes_per_token=manifest.cache_bytes_per_token,
    )


def _choices(kernels: Any, on: str = "") -> tuple[Choice, ...]:
    """Cases of a section of the manifest, grouped by op, kernel and refusals; ops in the order of their first cases."""
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], tuple[list[str], Counter[str]]] = {}
    for case, value in _mapping(kernels).items():
        choice = _mapping(value)
        refused = tuple((str(k), str(why)) for k, why in _mapping(choice.get("refused")).items())
        key = (case.partition("(")[0], str(choice.get("kernel")), refused)
        cases, calls = groups.setdefault(key, ([], Counter()))
        cases.append(case)
        calls.update(_counts(choice.get("calls")))
    found = [Choice(op, kernel, tuple(c), dict(n), refused, on) for (op, kernel, refused), (c, n) in groups.items()]
    order = list(dict.fromkeys(choice.op for choice in found))
    return tuple(sorted(found, key=lambda choice: order.index(choice.op)))


def _counts(value: Any) -> dict[str, int]:
    return {k: int(_number(v) or 0) for k, v in _mapping(value).items()}


def _pass(value: Any) -> PassTime:
    v = _mapping(value)
    before, after = (int(_number(v.get(k)) or 0) for k in ("nodes_before", "nodes_after"))
    return PassTime(
        str(v.get("name", "?")), _number(v.get("seconds")) or 0.0, v.get("modified") is True, (before, after)
    )


def _all_kernels(manifest: Manifest) -> dict[str, Any]:
    """Cases and what was chosen for them; where another library has another kernel, the case says for which."""
    return {f"{k} on {on}" if on else k: v for on, kernels in _libraries(manifest) for k, v in kernels.items()}


def _libraries(manifest: Manifest) -> list[tuple[str, Mapping[str, Any]]]:
    """(processor, what was chosen): first for all, then for each library what differs."""
    others = [_mapping(library) for library in _list(manifest.raw.get("libraries"))]
    different = [(str(x.get("arch")), _mapping(x.get("kernels"))) for x in others]
    return [("", _mapping(manifest.raw.get("kernels"))), *different]


def _part(name: str, libraries: set[str]) -> str:
    if name in libraries:
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


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
