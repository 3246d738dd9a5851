# SPDX-License-Identifier: Apache-2.0
"""The ``quantization_config`` of a GPTQ checkpoint: parsed with all its spellings, checked, and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_compile.checkpoint.layout import BITS
from gptq_compile.errors import ModelError

FILE = "quantize_config.json"
VERSIONS = {"gptq": 1, "gptq_v2": 2}  # checkpoint_format -> how zero points are stored
_SYNONYMS = {
    "bits": ("bits", "wbits", "w_bit"),
    "group_size": ("group_size", "groupsize", "q_group_size"),
    "sym": ("sym",),
    "desc_act": ("desc_act",),
    "checkpoint_format": ("checkpoint_format", "format"),
    "lm_head": ("lm_head",),
    "dynamic": ("dynamic",),
    "pack_dtype": ("pack_dtype",),
    "quant_method": ("quant_method", "method"),
}
_FLOAT = "Give the float16, bfloat16 or float32 checkpoint it was made from."


@dataclass(frozen=True)
class GptqConfig:
    """What a checkpoint says about its quantized linears.

    Attributes:
        bits: of a code: 2, 3, 4 or 8. ``group_size``: input features that share a scale, -1 for all.
        sym: whether zero points are all ``2^(bits-1)``. ``desc_act``: whether groups follow a permuted order of input
            features; None if the config does not say.
        version: 1 or 2, how zero points are stored.
        dynamic: ``(negative, pattern, overrides)`` of linears with settings of their own, first match counts.
        lm_head: whether the head is quantized too. ``quantizer``: what wrote it, as it says.
    """

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool | None = None
    version: int = 1
    dynamic: tuple[tuple[bool, re.Pattern[str], Mapping[str, Any]], ...] = field(default=(), compare=False)
    lm_head: bool = False
    quantizer: str = ""

    @property
    def format(self) -> str:
        """The name of the version in configs."""
        return next(name for name, version in VERSIONS.items() if version == self.version)

    def of_module(self, name: str) -> tuple[int, int] | None:
        """Bits and group size of a linear; None if it is not quantized."""
        for negative, pattern, overrides in self.dynamic:
            if pattern.match(name):
                if negative:
                    return None
                return overrides.get("bits", self.bits), overrides.get("group_size", self.group_size)
        return self.bits, self.group_size


def parse(raw: Any, folder: Path) -> GptqConfig | None:
    """Reads the settings of a folder.

    Args:
        raw: ``quantization_config`` of its config.json, or None.
        folder: may hold a ``quantize_config.json``, which old checkpoints have instead and new ones beside.

    Returns:
        The settings, or None if the checkpoint is not quantized.

    Raises:
        ModelError: another method than GPTQ, a format that is not supported, or settings that are wrong or contradict.
    """
    beside = _read(folder / FILE)
    if not raw and beside is None:
        return None
    if raw and not isinstance(raw, dict):
        raise ModelError(f"{folder} is already quantized, but its quantization_config is not a table. {_FLOAT}")
    place = f"The quantization_config of {folder}" if raw else f"{folder / FILE}"
    values = _canonical(raw or {}, place)
    for key, value in _canonical(beside or {}, str(folder / FILE)).items():
        if key in values and key != "quant_method" and values[key] != value:
            raise ModelError(
                f"{folder} contradicts itself: its config.json says {key} is {values[key]!r}, and {FILE} says "
                f"{value!r}. Take both from one source."
            )
        values.setdefault(key, value)
    method = values.get("quant_method", "gptq" if beside is not None else None)
    if method != "gptq":
        raise ModelError(
            f"The checkpoint {folder} is already quantized, by method {method!r}; of those only GPTQ checkpoints are "
            f"read. {_FLOAT}"
        )
    return _checked(values, place, {**(beside or {}), **(raw or {})})


def _checked(values: dict[str, Any], place: str, raw: Mapping[str, Any]) -> GptqConfig:
    form = values.get("checkpoint_format", "gptq")
    if raw.get("is_marlin_format"):
        form = "marlin"
    if form not in VERSIONS:
        raise ModelError(
            f"{place} says that the weights are in the layout {form!r}; of GPTQ checkpoints, those of layout gptq and "
            f"gptq_v2 are read. {_FLOAT}"
        )
    if (word := values.get("pack_dtype", "int32")) != "int32":
        raise ModelError(f"{place} says that codes are packed into {word!r}; only int32 words are read. {_FLOAT}")
    for key in ("bits", "group_size"):
        if key not in values:
            raise ModelError(f"{place} does not say {key!r}, which a GPTQ checkpoint needs. Take it from its source.")
    bits, group = _grid(values, place)
    for key in ("sym", "desc_act", "lm_head"):
        if not isinstance(values.get(key, False), bool):
            raise ModelError(f"{place} says {key} is {values[key]!r}; it is true or false.")
    meta = raw.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    if isinstance(quantizer, list):
        quantizer = ", ".join(map(str, quantizer))
    return GptqConfig(
        bits=bits,
        group_size=group,
        sym=values.get("sym", True),
        desc_act=values.get("desc_act"),
        version=VERSIONS[form],
        dynamic=_dynamic(values.get("dynamic"), place),
        lm_head=values.get("lm_head", False),
        quantizer=str(quantizer or ""),
    )


def _grid(values: Mapping[str, Any], place: str) -> tuple[int, int]:
    bits, group = values["bits"], values["group_size"]
    if type(bits) is not int or bits not in BITS:
        raise ModelError(f"{place} says codes have {bits!r} bits; checkpoints with 2, 3, 4 and 8 are read.")
    if type(group) is not int or (group < 1 and group != -1):
        raise ModelError(f"{place} says group_size is {group!r}; it is a positive number, or -1 for whole rows.")
    return bits, group


def _dynamic(rules: object, place: str) -> tuple[tuple[bool, re.Pattern[str], Mapping[str, Any]], ...]:
    if not rules:
        return ()
    if not isinstance(rules, dict):
        raise ModelError(f"{place} has {rules!r} where 'dynamic' has a table of patterns.")
    parsed = []
    for pattern, overrides in rules.items():
        negative, expression = pattern.startswith("-:"), pattern.removeprefix("-:").removeprefix("+:")
        try:
            compiled = re.compile(expression)
        except re.error as e:
            raise ModelError(f"{place} has the pattern {pattern!r} in 'dynamic', which is not valid ({e}).") from e
        own = {} if negative else overrides
        if not isinstance(own, dict):
            raise ModelError(f"{place} has {overrides!r} for {pattern!r} in 'dynamic', which is not a table.")
        own = _canonical(own, place)
        _grid({"bits": own.get("bits", 4), "group_size": own.get("group_size", -1)}, f"{place}, at {pattern!r},")
        for key in set(own) & {"sym", "checkpoint_format", "pack_dtype"}:
            raise ModelError(f"{place} sets {key!r} for {pattern!r} alone in 'dynamic', which is not supported.")
        parsed.append((negative, compiled, own))
    return tuple(parsed)


def _canonical(raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The settings under one name each; null counts as absent.

    Raises:
        ModelError: two spellings of one setting differ.
    """
    values: dict[str, Any] = {}
    for key, names in _SYNONYMS.items():
        given = [(n, raw[n]) for n in names if raw.get(n) is not None]
        for name, value in given[1:]:
            if value != given[0][1]:
                raise ModelError(
                    f"{place} contradicts itself: {given[0][0]} is {given[0][1]!r} and {name} is {value!r}."
                )
        if given:
            values[key] = given[0][1]
    return values


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{file} is not valid JSON ({e}). Download it again.") from e
    if not isinstance(raw, dict):
        raise ModelError(f"{file} is not a table of settings. Download it again.")
    return raw
