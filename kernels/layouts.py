# SPDX-License-Identifier: Apache-2.0
"""Packed weight layouts of ``quant_linear``: which tensors a kernel takes, and exact pack and unpack.

`layout_for` names the one layout of a case; a kernel refuses cases of another one. The tensors, in the order the
kernels take them after ``x``, are ``qweight`` (u32 words), ``scales`` (float16) and, for cases with zero points,
``zeros`` (u8). W[n, k] = scales[n, k // g] * (code[n, k] - zeros[n, k // g]); without zeros the zero point is
2**(bits - 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gptq_compile.errors import ConfigError
from gptq_compile.kernels import fragments
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import Grouping, decode_rows, encode_rows

LANES = 16
CUDA_ROW_WORDS = 4
"""Words a CUDA thread loads at once (16 bytes); rows are padded to a multiple."""


def grouping_of(case: Case) -> Grouping:
    """Returns how the rows of a ``quant_linear`` case are cut into groups and words."""
    return Grouping.of(case["bits"], case["in_features"], case["group_size"])


def _checked(case: Case, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """Checks shapes and values; returns the scales as float16."""
    grouping = grouping_of(case)
    shape = (case["out_features"], case["in_features"])
    grid = (case["out_features"], grouping.groups)
    if codes.dtype != np.uint8 or codes.shape != shape:
        raise ConfigError(f"Codes must be uint8 {shape}, but are {codes.dtype} {codes.shape}.")
    if codes.size and int(codes.max()) >> grouping.bits:
        raise ConfigError(f"Codes of {grouping.bits} bits must be below {1 << grouping.bits}, got {codes.max()}.")
    if scales.shape != grid:
        raise ConfigError(f"Scales must have shape {grid} (rows, groups), but have {scales.shape}.")
    if (zeros is not None) != bool(case["has_zeros"]):
        raise ConfigError(f"Zero points were {'' if zeros is not None else 'not '}given, but has_zeros says otherwise.")
    if zeros is not None and (zeros.dtype != np.uint8 or zeros.shape != grid):
        raise ConfigError(f"Zero points must be uint8 {grid}, but are {zeros.dtype} {zeros.shape}.")
    half = scales.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scales.astype(np.float32)):
        raise ConfigError("Scales must be finite and exactly representable in float16; round them before quantizing.")
    return half


def _pad_rows(array: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(array, [(0, -array.shape[0] % multiple)] + [(0, 0)] * (array.ndim - 1))


@dataclass(frozen=True)
class LaneInterleaved:
    """CPU layout: tiles of 16 output rows, so that the SIMD dimension is output rows.

    ``qweight`` u32 [ceil(N/16), row_words, 16], ``scales`` float16 and ``zeros`` u8 [ceil(N/16), groups, 16].
    Rows beyond N have code, scale and zero point 0.
    """

    name: str = "lane_interleaved"

    def tensors(self, case: Case) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns shape and dtype of every packed tensor, in the kernels' argument order."""
        grouping = grouping_of(case)
        tiles = -(-case["out_features"] // LANES)
        result: dict[str, tuple[tuple[int, ...], str]] = {
            "qweight": ((tiles, grouping.row_words, LANES), "uint32"),
            "scales": ((tiles, grouping.groups, LANES), "float16"),
        }
        if case["has_zeros"]:
            result["zeros"] = ((tiles, grouping.groups, LANES), "uint8")
        return result

    def pack(
        self, case: Case, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Packs codes u8 [N, K], scales [N, G] (exact in float16) and zeros u8 [N, G] or None.

        Raises:
            ConfigError: if a shape, dtype or value does not fit the case.
        """
        half = _checked(case, codes, scales, zeros)
        rows = {"qweight": encode_rows(grouping_of(case), codes), "scales": half}
        if zeros is not None:
            rows["zeros"] = zeros
        return {name: self._interleave(array) for name, array in rows.items()}

    def unpack(self, case: Case, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the codes u8 [N, K] that `pack` was given."""
        return decode_rows(grouping_of(case), self._rows(case, tensors["qweight"]))

    def unpack_grid(self, case: Case, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns scales f32 [N, G] and zeros u8 [N, G] or None, as `pack` was given them."""
        zeros = self._rows(case, tensors["zeros"]) if case["has_zeros"] else None
        return self._rows(case, tensors["scales"]).astype(np.float32), zeros

    @staticmethod
    def _interleave(rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(_pad_rows(rows, LANES).reshape(-1, LANES, rows.shape[1]).transpose(0, 2, 1))

    @staticmethod
    def _rows(case: Case, tiles: np.ndarray) -> np.ndarray:
        rows = tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])
        return np.ascontiguousarray(rows[: case["out_features"]])


@dataclass(frozen=True)
class RowWords:
    """CUDA layout of shapes that `FragmentTiles` does not fit: rows of contiguous words, each on 16 bytes.

    ``qweight`` u32 [N, row_words rounded up to 4], ``scales`` float16 and ``zeros`` u8 [N, groups].
    """

    name: str = "row_words"

    def tensors(self, case: Case) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns shape and dtype of every packed tensor, in the kernels' argument order."""
        grouping = grouping_of(case)
        rows = case["out_features"]
        words = -(-grouping.row_words // CUDA_ROW_WORDS) * CUDA_ROW_WORDS
        result: dict[str, tuple[tuple[int, ...], str]] = {
            "qweight": ((rows, words), "uint32"),
            "scales": ((rows, grouping.groups), "float16"),
        }
        if case["has_zeros"]:
            result["zeros"] = ((rows, grouping.groups), "uint8")
        return result

    def pack(
        self, case: Case, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Packs codes u8 [N, K], scales [N, G] (exact in float16) and zeros u8 [N, G] or None.

        Raises:
            ConfigError: if a shape, dtype or value does not fit the case.
        """
        half = _checked(case, codes, scales, zeros)
        words = encode_rows(grouping_of(case), codes)
        result = {"qweight": np.pad(words, [(0, 0), (0, -words.shape[1] % CUDA_ROW_WORDS)]), "scales": half}
        if zeros is not None:
            result["zeros"] = np.ascontiguousarray(zeros)
        return result

    def unpack(self, case: Case, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the codes u8 [N, K] that `pack` was given."""
        grouping = grouping_of(case)
        return decode_rows(grouping, tensors["qweight"][:, : grouping.row_words])

    def unpack_grid(self, case: Case, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns scales f32 [N, G] and zeros u8 [N, G] or None, as `pack` was given them."""
        zeros = np.ascontiguousarray(tensors["zeros"]) if case["has_zeros"] else None
        return tensors["scales"].astype(np.float32), zeros


@dataclass(frozen=True)
class FragmentTiles:
    """CUDA layout of whole tiles: 16 rows x 64 k in the order tensor cores take them (see `fragments`).

    ``qweight`` u32 [ceil(N/16), ceil(K/64), 32 * bits], ``scales`` float16 and ``zeros`` u8 [ceil(N/16), groups, 8, 2],
    where [..., g, h] belongs to row g + 8h of the tile. Rows beyond N have code, scale and zero point 0.

    Attributes:
        natural: which order of k the codes have (see `fragments`).
    """

    name: str = "fragment_tiles"
    natural: bool = False

    def tensors(self, case: Case) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns shape and dtype of every packed tensor, in the kernels' argument order."""
        grouping = grouping_of(case)
        tiles = -(-case["out_features"] // fragments.TILE_ROWS)
        words = fragments.LANES * grouping.bits
        result: dict[str, tuple[tuple[int, ...], str]] = {
            "qweight": ((tiles, fragments.chunks(grouping.in_features), words), "uint32"),
            "scales": ((tiles, grouping.groups, 8, 2), "float16"),
        }
        if case["has_zeros"]:
            result["zeros"] = ((tiles, grouping.groups, 8, 2), "uint8")
        return result

    def pack(
        self, case: Case, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Packs codes u8 [N, K], scales [N, G] (exact in float16) and zeros u8 [N, G] or None.

        Raises:
            ConfigError: if a shape, dtype or value does not fit the case.
        """
        half = _checked(case, codes, scales, zeros)
        result = {"qweight": fragments.encode(case["bits"], codes, self.natural), "scales": fragments.encode_grid(half)}
        if zeros is not None:
            result["zeros"] = fragments.encode_grid(zeros)
        return result

    def unpack(self, case: Case, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the codes u8 [N, K] that `pack` was given."""
        return fragments.decode(
            case["bits"], tensors["qweight"], case["out_features"], case["in_features"], self.natural
        )

    def unpack_grid(self, case: Case, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns scales f32 [N, G] and zeros u8 [N, G] or None, as `pack` was given them."""
        rows = case["out_features"]
        zeros = fragments.decode_grid(tensors["zeros"], rows) if case["has_zeros"] else None
        return fragments.decode_grid(tensors["scales"], rows).astype(np.float32), zeros


def slab_case(case: Case) -> Case:
    """The ``quant_linear`` case as which all experts of a ``quant_expert_linear`` are packed: one below the other.

    Each has its out_features rounded up to whole tiles, so that expert e starts at row ``e * padded_rows(case)``.
    """
    attrs = {name: case[name] for name in ("bits", "group_size", "in_features", "has_zeros", "experts")}
    rows = int(case["experts"]) * padded_rows(case)
    return Case.make("quant_linear", case.dtype, None, out_features=rows, has_bias=False, **attrs)


def padded_rows(case: Case) -> int:
    """Weight rows of one expert in the packed tensors."""
    return -(-int(case["out_features"]) // LANES) * LANES


NATURAL_TILES = FragmentTiles("natural_tiles", natural=True)
Layout = LaneInterleaved | RowWords | FragmentTiles


def reads_natural(target: Target) -> bool:
    """Whether the kernels of a target read `NATURAL_TILES`: in code for Hopper alone, whose wgmma wants that order."""
    return target.archs == ("sm_90a",)


def layout_for(case: Case, target: Target) -> Layout:
    """Returns the packed layout of a ``quant_linear`` (or ``fused_linear``) case on a target.

    Raises:
        ConfigError: if the case is neither.
    """
    if case.op not in ("quant_linear", "fused_linear"):
        raise ConfigError(f"Only quant_linear has a packed layout, not {case.op}.")
    if target.kind == "cpu":
        return LaneInterleaved()
    # The kernel of experts reads rows.
    rows = case.get("experts") is not None or fragments.why_not(grouping_of(case)) is not None
    return RowWords() if rows else NATURAL_TILES if reads_natural(target) else FragmentTiles()


def by_name(name: str) -> Layout:
    """Returns the layout called `name`.

    Raises:
        ConfigError: if there is none.
    """
    for layout in (LaneInterleaved(), RowWords(), FragmentTiles(), NATURAL_TILES):
        if layout.name == name:
            return layout
    raise ConfigError(f"There is no packed layout called {name!r}.")
