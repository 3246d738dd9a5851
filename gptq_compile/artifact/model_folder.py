# SPDX-License-Identifier: Apache-2.0
"""Writes Hugging Face model folders: safetensors in shards, configs and tokenizer, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_compile.artifact.files import StagedFolder
from gptq_compile.artifact.tensors import TensorWriter
from gptq_compile.errors import OutputError
from gptq_compile.frontend.source import ModelSource

SHARD_BYTES = 5_000_000_000  # what save_pretrained used to cut at, and what the hub likes


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder: its shape, the type it is stored in, and what reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_model_folder(
    source: ModelSource,
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    extra: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes a folder, one tensor in memory at a time.

    Args:
        source: gives tokenizer and generation config.
        tensors: name -> what is stored. ``config``: of config.json.
        out: a place that does not exist or is an empty folder.
        extra: further files.
        shard_bytes: most bytes of one file.
        overwrite: replace a folder with a ``config.json`` that is there.

    Returns:
        The folder.

    Raises:
        OutputError: the folder exists, the disk is full, or a tensor has another shape than it says.
    """
    shards = _shards({name: stored.size for name, stored in tensors.items()}, shard_bytes)
    needed = sum(stored.size for stored in tensors.values())
    with StagedFolder(out, overwrite=is_model if overwrite else None, disk_needed=needed) as folder:
        where: dict[str, str] = {}
        for i, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            # Wide types first keeps everything aligned without the padding tensors of an artifact.
            names = sorted(names, key=lambda name: -tensors[name].dtype.itemsize)
            reserve = sum(len(name) + 160 for name in names)
            with TensorWriter(folder.place(file), {"format": "pt"}, reserve=reserve, alignment=1) as writer:
                for name in names:
                    made = tensors[name].load()
                    if tuple(made.shape) != tensors[name].shape:
                        wanted = list(tensors[name].shape)
                        raise OutputError(f"The tensor {name!r} has shape {list(made.shape)} instead of {wanted}.")
                    writer.add(name, made.to(tensors[name].dtype))
                    where[name] = file
        if len(shards) > 1:
            index = {"metadata": {"total_size": needed}, "weight_map": where}
            folder.add(json.dumps(index, indent=2).encode(), "model.safetensors.index.json")
        folder.add(json.dumps(config, indent=2).encode(), "config.json")
        folder.add(source.generation_json(), "generation_config.json")
        for name, content in {**source.tokenizer_files, **(extra or {})}.items():
            folder.add(content, name)
        folder.commit()
    return folder.out


def is_model(folder: Path) -> bool:
    """Whether a folder looks like what :func:`write_model_folder` writes."""
    return (folder / "config.json").is_file()


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut where a file would exceed the limit (a larger tensor has a file of its own)."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
