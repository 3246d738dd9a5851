# SPDX-License-Identifier: Apache-2.0
"""`layouts` packing with torch, on whatever device the codes are on: 8 billion codes take seconds instead of minutes.

The numpy version in `words` and `layouts` defines the format; this one must give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_compile.errors import ConfigError
from gptq_compile.kernels.layouts import CUDA_ROW_WORDS, LANES, LaneInterleaved, Layout, grouping_of
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.words import Grouping, block_codes, block_words, fields

_CHUNK = 1 << 26  # codes packed at a time: temporaries of a few times that many bytes


def encode_rows(grouping: Grouping, codes: Tensor) -> Tensor:
    """Packs codes u8 [N, K] to i32 [N, row_words] with the bits of `words.encode_rows`."""
    rows = codes.shape[0]
    full, size = grouping.groups - 1, grouping.group_size
    words = torch.empty(rows, grouping.row_words, dtype=torch.int32, device=codes.device)
    step = max(1, _CHUNK // max(1, codes.shape[1]))
    for r in range(0, rows, step):
        part = codes[r : r + step]
        if full:
            head = _encode(grouping.bits, part[:, : full * size].unflatten(1, (full, size)))
            words[r : r + step, : full * grouping.group_words] = head.flatten(1)
        words[r : r + step, full * grouping.group_words :] = _encode(grouping.bits, part[:, full * size :])
    return words


def _encode(bits: int, codes: Tensor) -> Tensor:
    """Packs runs of codes u8 [..., n], padded to whole blocks, to i32 [..., words]."""
    per_block = block_codes(bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_block))
    blocks = codes.unflatten(-1, (-1, per_block))
    words = torch.zeros(*blocks.shape[:-1], block_words(bits), dtype=torch.int32, device=codes.device)
    for j, parts in enumerate(fields(bits)):
        code = blocks[..., j].to(torch.int32)
        for part in parts:
            value = (code >> part.low) & ((1 << part.width) - 1)
            words[..., part.word] |= value << part.shift
    return words.flatten(-2)


def pack(layout: Layout, case: Case, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
    """`layout.pack` of tensors.

    Args:
        layout: the packed layout. ``case``: a ``quant_linear``.
        codes: u8 [N, K], below 2**bits.
        scales: [N, G], exact in float16.
        zeros: u8 [N, G] or None.

    Returns:
        The layout's tensors on the codes' device.

    Raises:
        ConfigError: codes or scales are out of range.
    """
    if codes.numel() and int(codes.max()) >> case["bits"]:
        raise ConfigError(f"Codes of {case['bits']} bits must be below {1 << case['bits']}, got {int(codes.max())}.")
    if not torch.equal(scales.half().float(), scales.float()):
        raise ConfigError("Scales must be finite and exactly representable in float16; round them before quantizing.")
    rows = {"qweight": encode_rows(grouping_of(case), codes), "scales": scales.half()}
    if zeros is not None:
        rows["zeros"] = zeros
    if isinstance(layout, LaneInterleaved):
        packed = {name: _interleave(tensor) for name, tensor in rows.items()}
    else:
        extra = -rows["qweight"].shape[1] % CUDA_ROW_WORDS
        packed = rows | {"qweight": torch.nn.functional.pad(rows["qweight"], (0, extra))}
    packed = {name: tensor.contiguous() for name, tensor in packed.items()}
    return packed | {"qweight": packed["qweight"].view(torch.uint32)}


def _interleave(tensor: Tensor) -> Tensor:
    """[N, C] -> [ceil(N / 16), C, 16], rows beyond N zero."""
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[0] % LANES))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2)
