# SPDX-License-Identifier: Apache-2.0
"""The quantized linears of a GPTQ checkpoint: found, checked against its config, and unpacked one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_compile.checkpoint.config import GptqConfig
from gptq_compile.checkpoint.layout import BITS, unpack, unpack_zeros, words_for
from gptq_compile.errors import ModelError
from gptq_compile.frontend.checkpoint import Checkpoint
from gptq_compile.passes.adopt_codes import QuantizedWeight

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_SAMPLED = 8  # linears whose codes are looked at to tell how zero points are stored
_DAMAGED = "The file is damaged or its config is of another model; download it again."


@dataclass(frozen=True)
class Zeros:
    """How stored zero points are read: see :func:`gptq_compile.checkpoint.layout.unpack_zeros`."""

    version: int
    carries: bool


@dataclass(frozen=True)
class Module:
    """One quantized linear: names and shapes, checked; tensors are read when asked for.

    Attributes:
        name: its path in the checkpoint. ``bits``, ``group_size``: of its grid, -1 resolved.
        in_features, out_features, groups: its shape.
        order: int32 ``[in_features]`` group of each input feature, or None for groups in natural order.
        groups_of: int64 ``[groups]``: which stored group the group of that number is, or None for the same.
    """

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    groups: int
    order: Tensor | None
    groups_of: Tensor | None
    read: Callable[[str], Tensor]

    def codes(self) -> Tensor:
        """uint8 ``[out, in]``."""
        return unpack(self.read("qweight"), self.bits, self.in_features).t().contiguous()

    def scales(self) -> Tensor:
        """float32 ``[out, groups]``, float16 numbers.

        Raises:
            ModelError: NaN, infinity, or beyond float16.
        """
        stored = self.read("scales").float()
        scales = stored.half().float()
        if not bool(torch.isfinite(scales).all()):
            bad = int((~torch.isfinite(scales)).sum())
            raise ModelError(f"The tensor {self.name + '.scales'!r} holds {bad} values that are no float16 numbers.")
        return self._ordered(scales)

    def zeros(self, how: Zeros) -> Tensor:
        """uint8 ``[out, groups]``."""
        return self._ordered(unpack_zeros(self.read("qzeros"), self.bits, self.out_features, how.version, how.carries))

    def _ordered(self, grid: Tensor) -> Tensor:
        return (grid if self.groups_of is None else grid[self.groups_of]).t().contiguous()


def find_modules(checkpoint: Checkpoint, config: GptqConfig) -> dict[str, Module]:
    """The quantized linears by name.

    Args:
        checkpoint: opened shards. ``config``: its settings.

    Raises:
        ModelError: tensors are missing, or have another shape, type or order than the config says.
    """
    names = {n.rpartition(".")[0] for n in checkpoint.shapes if n.rpartition(".")[2] == "qweight"}
    for name in checkpoint.shapes:
        base, _, part = name.rpartition(".")
        if part in ("qzeros", "g_idx") and base not in names:
            raise ModelError(f"{checkpoint.folder} has {name!r} but no tensor {base + '.qweight'!r}. {_DAMAGED}")
    if not names:
        raise ModelError(
            f"The config of {checkpoint.folder} says that it is quantized with GPTQ, but it has no tensor called "
            "'....qweight'. Take config and weights from one source."
        )
    return {name: _module(name, checkpoint, config) for name in sorted(names)}


def _module(name: str, checkpoint: Checkpoint, config: GptqConfig) -> Module:
    def shape(part: str, rank: int, dtypes: tuple[str, ...]) -> tuple[int, ...]:
        full = f"{name}.{part}"
        if full not in checkpoint.shapes:
            raise ModelError(f"{checkpoint.folder} has no tensor {full!r}, which goes with {name}.qweight. {_DAMAGED}")
        if checkpoint.stored_dtype(full) not in dtypes or len(checkpoint.shapes[full]) != rank:
            raise ModelError(
                f"The tensor {full!r} of {checkpoint.folder} is {checkpoint.stored_dtype(full)} "
                f"{list(checkpoint.shapes[full])}; in a GPTQ checkpoint it is {' or '.join(dtypes)} with {rank} "
                f"dimension{'s' if rank > 1 else ''}. {_DAMAGED}"
            )
        return checkpoint.shapes[full]

    settings = config.of_module(name)
    if settings is None:
        raise ModelError(f"The config of {checkpoint.folder} says that {name} is not quantized, but it has codes.")
    bits, group = settings
    rows, out = shape("qweight", 2, ("I32",))
    groups, scale_columns = shape("scales", 2, ("F16", "BF16", "F32"))
    zero_shape = shape("qzeros", 2, ("I32",))
    if f"{name}.g_idx" in checkpoint.shapes:
        columns = shape("g_idx", 1, ("I32", "I64"))[0]
    else:
        columns = rows * 32 // bits
    if rows != words_for(columns, bits):
        fitting = [b for b in BITS if rows == words_for(columns, b)]
        hint = f", as many as codes of {fitting[0]} bits take" if fitting else ""
        raise ModelError(
            f"The config says that codes have {bits} bits, so {name}.qweight should have {words_for(columns, bits)} "
            f"rows of words for {columns} input features; it has {rows}{hint}. {_DAMAGED}"
        )
    size = columns if group == -1 else group
    if columns < 1 or out < 1 or groups != -(-columns // size):
        raise ModelError(
            f"{name} has {columns} input features, {-(-columns // size)} groups of {size} as the config says, but "
            f"{groups} rows of scales. {_DAMAGED}"
        )
    if scale_columns != out or zero_shape != (groups, words_for(out, bits)):
        raise ModelError(
            f"{name} has {out} output features and {groups} groups, but scales of shape {[groups, scale_columns]} and "
            f"zero points of shape {list(zero_shape)} instead of {[groups, words_for(out, bits)]}. {_DAMAGED}"
        )
    size = min(size, columns)
    order, groups_of = _order(name, checkpoint, config, columns, groups, size)
    read = lambda part: checkpoint.read_stored(f"{name}.{part}")  # noqa: E731
    return Module(name, bits, size, columns, out, groups, order, groups_of, read)


def _order(
    name: str, checkpoint: Checkpoint, config: GptqConfig, columns: int, groups: int, size: int
) -> tuple[Tensor | None, Tensor | None]:
    """The group of each input feature and, if the short group is not the last one, the order of groups."""
    if f"{name}.g_idx" not in checkpoint.shapes:
        if config.desc_act:
            raise ModelError(
                f"{checkpoint.folder} has no tensor {name + '.g_idx'!r}, which the config (desc_act) needs. {_DAMAGED}"
            )
        return None, None
    index = checkpoint.read_stored(f"{name}.g_idx").long()
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise ModelError(
            f"{name}.g_idx holds group {low if low < 0 else high}, but groups are 0 to {groups - 1}. {_DAMAGED}"
        )
    if torch.equal(index, torch.arange(columns) // size):
        return None, None
    if config.desc_act is False:
        raise ModelError(
            f"The config of {checkpoint.folder} says desc_act is false, but {name}.g_idx is not in natural order: the "
            "two contradict, and readers that trust one or the other compute different things. Take both from one "
            "source."
        )
    counts = torch.bincount(index, minlength=groups)
    wanted = torch.full_like(counts, size)
    wanted[-1] = columns - size * (groups - 1)
    groups_of = torch.argsort(-counts, stable=True)
    if not torch.equal(counts[groups_of], wanted):
        odd = int((counts != size).nonzero()[0])
        raise ModelError(
            f"{name}.g_idx puts {int(counts[odd])} input features into group {odd}; all groups but one have {size}. "
            f"{_DAMAGED}"
        )
    number = torch.argsort(groups_of)  # stored group -> its number when the short one comes last
    natural = torch.equal(groups_of, torch.arange(groups))
    return number[index].to(torch.int32), None if natural else groups_of


def how_zeros_are_stored(modules: dict[str, Module], config: GptqConfig) -> tuple[Zeros, list[str]]:
    """Decides by the values which version's zero points a checkpoint has; labels are wrong often enough.

    Symmetric ones say it themselves: all are ``2^(bits-1)``, minus 1 in version 1. Of asymmetric ones, weights of some
    linears are dequantized: their mean is near 0, and one step away from it if zero points are read wrongly.

    Returns:
        How to read them, and what to tell the user.

    Raises:
        ModelError: the config says symmetric but zero points differ.
    """
    carries = "gptqmodel" in config.quantizer.lower()
    labelled = Zeros(config.version, carries)
    other = replace(labelled, version=3 - config.version)
    if config.sym:
        versions = {_symmetric_version(module, config) for module in modules.values()}
        if len(versions) > 1:
            raise ModelError(
                "Some linears of the checkpoint store zero points as version 1 of the format does and some as version "
                "2, so it is not one checkpoint. Download it again."
            )
        mislabelled = versions != {config.version}
    else:
        names = sorted(modules)
        chosen = [modules[n] for n in names[:: max(1, len(names) // _SAMPLED)][:_SAMPLED]]
        means = {how: _mean(chosen, how) for how in (labelled, other)}
        mislabelled = abs(means[other]) < 0.25 and abs(means[labelled]) > 0.75
    if not mislabelled:
        return labelled, []
    actual = "version 2 (gptq_v2: as they are)" if other.version == 2 else "version 1 (gptq: minus 1)"
    return other, [
        f"The checkpoint is labelled {config.format}, but its zero points are stored as in {actual}; they are read so."
    ]


def _symmetric_version(module: Module, config: GptqConfig) -> int:
    stored = module.zeros(Zeros(2, False))
    middle = 1 << (module.bits - 1)
    for version, value in ((1, middle - 1), (2, middle)):
        if bool((stored == value).all()):
            return version
    odd = int(stored[(stored != middle) & (stored != middle - 1)][:1].sum()) if stored.numel() else 0
    raise ModelError(
        f"The config says that grids are symmetric, so that all zero points of {module.bits} bits are stored as "
        f"{middle - 1} (gptq) or {middle} (gptq_v2), but {module.name}.qzeros holds others, such as {odd}. Either the "
        "config is wrong (sym) or the file is damaged."
    )


def _mean(modules: list[Module], how: Zeros) -> float:
    """Mean of code minus zero point, in steps."""
    total, count = 0.0, 0
    for module in modules:
        codes, zeros = module.codes(), module.zeros(how)
        group = torch.arange(module.in_features) // module.group_size if module.order is None else module.order.long()
        sizes = torch.bincount(group, minlength=module.groups).double()
        total += float(codes.sum(dtype=torch.float64)) - float((zeros.double() * sizes).sum())
        count += codes.numel()
    return total / count


def quantized_weight(module: Module, how: Zeros, sym: bool) -> QuantizedWeight:
    """What the compiler takes instead of a float weight."""
    return QuantizedWeight(
        bits=module.bits,
        group_size=module.group_size,
        shape=(module.out_features, module.in_features),
        groups=module.groups,
        codes=module.codes,
        scales=module.scales,
        zeros=None if sym else lambda: module.zeros(how),
        g_idx=module.order,
    )
