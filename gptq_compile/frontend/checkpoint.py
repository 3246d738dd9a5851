# SPDX-License-Identifier: Apache-2.0
"""The tensors of a Hugging Face folder: safetensors shards, validated from their headers and read one at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_compile.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
# Pickles run code when they are opened, so they are refused rather than read.
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_INTEGERS = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Checkpoint:
    """Tensors of a folder under the names the checkpoint gives them.

    Attributes:
        folder: where it lies.
        files: its safetensors files.
        shapes: checkpoint name -> shape, from the headers.
    """

    def __init__(self, folder: Path) -> None:
        """Opens every shard and reads its header; no tensor is read.

        Raises:
            ModelError: naming the shard that is missing, truncated or corrupt.
        """
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self.files, promised = _find_shards(folder)
        for path in self.files:
            self._read_header(path)
        for name, file in promised.items():
            if self._file_of.get(name) != folder / file:
                raise ModelError(
                    f"{folder / file} has no tensor {name!r}, which {_INDEX} says it holds: the shard is from another "
                    "model or was not written to its end. Download it again."
                )

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError) as e:
                raise ModelError(f"{path} is truncated or corrupt ({e}). Download it again.") from e
        return self._handles[path]

    def _read_header(self, path: Path) -> None:
        handle = self._handle(path)
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            if name in self._file_of:
                raise ModelError(f"The tensor {name!r} is both in {self._file_of[name]} and in {path.name}.")
            view = handle.get_slice(name)
            self.shapes[name] = tuple(view.get_shape())
            self._dtypes[name] = view.get_dtype()
            self._file_of[name] = path

    def file_of(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self._file_of[name]

    def is_float(self, name: str) -> bool:
        """Whether a tensor holds unquantized floating-point values.

        Raises:
            ModelError: for a dtype that only quantized checkpoints use (float8, packed 4-bit).
        """
        dtype = self._dtypes[name]
        if dtype not in _FLOATS and dtype not in _INTEGERS:
            raise ModelError(
                f"The tensor {name!r} in {self._file_of[name]} is stored as {dtype}: the checkpoint is already "
                "quantized. Give the float16, bfloat16 or float32 checkpoint it was made from."
            )
        return dtype in _FLOATS

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that :meth:`read` returns."""
        return torch.float32 if self.is_float(name) else _INTEGERS[self._dtypes[name]]

    def stored_dtype(self, name: str) -> str:
        """The dtype of a tensor in its file, as safetensors calls it: F16, I32 ..."""
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        """Reads one tensor; floating-point ones become float32.

        Raises:
            ModelError: if the file can no longer be read.
        """
        return self.read_stored(name).to(self.dtype(name))

    def read_stored(self, name: str) -> Tensor:
        """Reads one tensor in the type that it is stored in.

        Raises:
            ModelError: if the file can no longer be read.
        """
        try:
            return self._handle(self._file_of[name]).get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise ModelError(f"The tensor {name!r} of {self._file_of[name]} cannot be read ({e}).") from e


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder, and which file its index says each tensor is in (empty without an index)."""
    if (folder / _INDEX).is_file():
        promised = _read_index(folder / _INDEX)
        files = [folder / name for name in sorted(set(promised.values()))]
        for path in files:
            if not path.is_file():
                raise ModelError(
                    f"The shard {path} is missing, although {_INDEX} lists it. Download the model again or copy the "
                    f"missing file; {sum(p.is_file() for p in files)} of {len(files)} shards are there."
                )
        return files, promised
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE], {}
    shards = {int(m[1]): p for p in folder.glob("*.safetensors") if (m := _SHARD.fullmatch(p.name))}
    if shards:
        total = int(_SHARD.fullmatch(next(iter(shards.values())).name)[2])  # type: ignore[index]
        missing = sorted(set(range(1, total + 1)) - set(shards))
        if missing:
            raise ModelError(f"Shard {missing[0]} of {total} is missing in {folder}. Download the model again.")
        return [shards[i] for i in sorted(shards)], {}
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return loose, {}
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is opened. Convert it "
            "where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes "
            "safetensors; then give the new folder."
        )
    if any(folder.glob("*.gguf")):
        raise ModelError(f"{folder} has no {_SINGLE}, but a GGUF file: give the path of the .gguf file itself.")
    raise ModelError(
        f"{folder} has a config.json but no weights: neither {_SINGLE} nor {_INDEX}. Download the weights."
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        promised = json.loads(path.read_text("utf-8"))["weight_map"]
        names = [Path(file).name == file for file in promised.values()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ModelError(f"{path} is not a valid index of safetensors shards ({e!r}). Download it again.") from e
    if not names or not all(names):
        raise ModelError(f"{path} is not a valid index of safetensors shards (it lists no plain file names).")
    return promised
