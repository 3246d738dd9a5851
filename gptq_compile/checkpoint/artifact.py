# SPDX-License-Identifier: Apache-2.0
"""What was compiled for the CPU, as a checkpoint: its packed weights unpacked to the codes they were made of.

An artifact carries config, tokenizer and every weight, the quantized ones in the layout of its kernels
(`kernels/layouts.py`, whose packing is exact). So it can be exported, or compiled again, without the model it came
from. Artifacts for a GPU are refused: linears that read one value are one there.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptq_compile.checkpoint.config import GptqConfig
from gptq_compile.checkpoint.reader import QuantizedCheckpoint
from gptq_compile.errors import ModelError
from gptq_compile.frontend.checkpoint import Checkpoint
from gptq_compile.kernels import layouts
from gptq_compile.passes.adopt_codes import QuantizedWeight
from gptq_compile.passes.dialect import packed_case

_MANIFEST = "manifest.json"
_TRANSPOSED = ".T"  # ends the name of a weight that the model stores as [in, out]
_FROM_MODEL = "Give the model it was compiled from instead."


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The manifest of an artifact, or None where the folder is none.

    Raises:
        ModelError: the manifest cannot be read, or the artifact's weights cannot be taken out of it.
    """
    file = folder / _MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text("utf-8"))
        if manifest.get("format") != "gptq-compile":
            return None
        kind, layers = manifest["target"]["kind"], manifest["quantization"]["layers"]
        asymmetric = not manifest["quantization"]["sym"]
        found = [(str(e["name"]), tuple(map(int, e["shape"])), int(e["bits"]), int(e["group_size"])) for e in layers]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{file} is not a valid manifest ({e!r}). {_FROM_MODEL}") from e
    if kind != "cpu":
        raise ModelError(
            f"{folder} was compiled for {kind}, whose linears are merged and reordered; only what was compiled for the "
            f"CPU can be read back. {_FROM_MODEL}"
        )
    if not found:
        raise ModelError(f"{folder} has no quantized linears. {_FROM_MODEL}")
    return {"layers": found, "asymmetric": asymmetric}


class ArtifactCheckpoint(QuantizedCheckpoint):
    """Weights of an artifact under the names of the checkpoint it came from; attributes as in its base."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Opens the weights and checks that every quantized linear is whole.

        Args:
            folder: of the artifact. ``settings``: of `read_settings`.

        Raises:
            ModelError: naming the linear whose tensors are missing or of another shape.
        """
        Checkpoint.__init__(self, folder)
        layers = settings["layers"]
        bits, group = Counter((b, g) for _, _, b, g in layers).most_common(1)[0][0]
        head = any(name.startswith("lm_head.") for name, *_ in layers)
        sym = not settings["asymmetric"]
        self.config = GptqConfig(
            bits, group, sym=sym, version=2, desc_act=False, lm_head=head, quantizer="gptq-compile"
        )
        self.notes: list[str] = []
        self.weights: dict[str, QuantizedWeight] = {}
        self._transposed: set[str] = set()
        packed = {name.rsplit(".", 2)[0]: name.rsplit(".", 2)[1] for name in self.shapes if name.endswith(".qweight")}
        for base, shape, width, size in layers:
            if base not in packed or len(shape) != 2:
                raise ModelError(
                    f"{folder} does not hold the linear {base!r} by itself (experts, for example, are packed "
                    f"together). {_FROM_MODEL}"
                )
            if f"{base}.order" in self.shapes:
                raise ModelError(f"The columns of {base!r} in {folder} are in another order. {_FROM_MODEL}")
            weight = base.removesuffix(_TRANSPOSED)
            name = f"{base}.{packed[base]}"
            self.weights[weight] = self._unpacked(name, shape, width, size, f"{name}.zeros" in self.shapes)
            self._file_of[weight], self._dtypes[weight] = self._file_of[f"{name}.qweight"], "F32"
            if weight != base:
                self._transposed.add(weight)
            for part in ("qweight", "scales", "zeros"):
                self.shapes.pop(f"{name}.{part}", None)
            self.shapes[weight] = shape[::-1] if weight != base else shape

    def _unpacked(self, name: str, shape: tuple[int, int], bits: int, size: int, has_zeros: bool) -> QuantizedWeight:
        rows, columns = shape
        group = columns if size in (-1, columns) else size
        layout = layouts.by_name(name.rsplit(".", 1)[1])
        case = packed_case(bits, group, columns, rows, has_zeros, False, "float32")
        tensors = layout.tensors(case)
        for part, (wanted, _) in tensors.items():
            if self.shapes.get(f"{name}.{part}") != tuple(wanted):
                raise ModelError(
                    f"The tensor {name + '.' + part!r} of {self.folder} has shape {self.shapes.get(f'{name}.{part}')} "
                    f"instead of {tuple(wanted)}. Compile the model again."
                )

        def arrays() -> dict[str, np.ndarray]:
            return {part: self.read_stored(f"{name}.{part}").numpy() for part in tensors}

        @functools.lru_cache(maxsize=1)
        def grid() -> tuple[np.ndarray, np.ndarray | None]:
            return layout.unpack_grid(case, arrays())

        def zeros() -> Tensor:
            found = grid()[1]
            assert found is not None
            return torch.from_numpy(np.ascontiguousarray(found))

        return QuantizedWeight(
            bits=bits,
            group_size=group,
            shape=shape,
            groups=-(-columns // group),
            codes=lambda: torch.from_numpy(np.ascontiguousarray(layout.unpack(case, arrays()))),
            scales=lambda: torch.from_numpy(np.asarray(grid()[0], dtype=np.float32)),
            zeros=zeros if has_zeros else None,
            g_idx=None,
        )
