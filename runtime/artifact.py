# SPDX-License-Identifier: Apache-2.0
"""A compiled model's folder: every listed file is there and is the one that was written."""

from __future__ import annotations

import hashlib
import os
import pathlib

import numpy as np

from gptq_compile.runtime import verified
from gptq_compile.runtime.errors import ArtifactError
from gptq_compile.runtime.manifest import Manifest, Weight, read_manifest
from gptq_compile.runtime.safetensors import SafetensorsFile


class Artifact:
    """A validated artifact folder; nothing in it has been executed."""

    def __init__(self, folder: str | os.PathLike[str], verify: bool = True, again: bool = False) -> None:
        """Reads the manifest and checks every file it lists.

        Args:
            folder: what ``gptq-compile`` wrote.
            verify: compare the sha256 of every file; a large one that had the right hash before and was not touched
                since (`verified`) is not read. Otherwise only of the shared libraries, which will be executed, and
                the sizes of the others.
            again: read the large ones too.

        Raises:
            ArtifactError: naming the file or field that is wrong.
        """
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise ArtifactError(f"{self.folder} is not a folder. Give the folder that gptq-compile wrote.")
        self.manifest: Manifest = read_manifest(self.folder / "manifest.json")
        self._check_files(verify, again)
        self._safetensors: dict[str, SafetensorsFile] = {}
        self._check_weights()

    def path(self, name: str) -> pathlib.Path:
        """The full path of a listed file."""
        return self.folder / name

    def weight(self, weight: Weight) -> np.ndarray:
        """Returns one weight as a memory-mapped array (bfloat16 as uint16)."""
        return self._safetensors[weight.file].array(weight.name)

    def map_ahead(self) -> None:
        """Has the system map the weights while the rest is loaded; see `SafetensorsFile.map_ahead`."""
        for file in self._safetensors.values():
            file.map_ahead()

    def _check_files(self, verify: bool, again: bool) -> None:
        root = self.folder.resolve()
        # The loader looks for dependencies in lib/, so what lies there unlisted could be executed unchecked.
        for path in sorted(self.folder.glob("lib/*")):
            if f"lib/{path.name}" not in self.manifest.files:
                raise ArtifactError(f"{path} is not in the manifest's list of files. Remove it.")
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise ArtifactError(f"{path} is missing, although the manifest lists it. Copy the artifact again.")
            if not path.resolve().is_relative_to(root):
                raise ArtifactError(f"{path} leads out of the artifact folder. Replace the link by the file itself.")
            size = path.stat().st_size
            if size != entry.size:
                raise ArtifactError(
                    f"{path} has {size} bytes and should have {entry.size}: it is truncated or was replaced. "
                    "Copy the artifact again."
                )
        for name, entry in self.manifest.files.items():
            library = _is_library(name)
            if not (verify or library):
                continue
            path = self.folder / name
            small = library or entry.size < verified.SMALLEST
            if not (small or again) and verified.is_known(path, entry.sha256):
                continue
            try:
                with path.open("rb") as f:
                    before = os.fstat(f.fileno())
                    digest = hashlib.file_digest(f, "sha256").hexdigest()
            except OSError as error:
                raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
            if digest != entry.sha256:
                raise ArtifactError(
                    f"{path} is not the file that was compiled (sha256 {digest[:12]}..., expected "
                    f"{entry.sha256[:12]}...). Copy the artifact again; nothing of it was executed."
                )
            if not small:
                verified.remember(path, digest, before)

    def _check_weights(self) -> None:
        for weight in self.manifest.weights:
            if weight.file not in self._safetensors:
                self._safetensors[weight.file] = SafetensorsFile(self.folder / weight.file)
            info = self._safetensors[weight.file].tensors.get(weight.name)
            where = f"{self.folder / weight.file}, tensor {weight.name!r}"
            if info is None:
                raise ArtifactError(f"{where}: the manifest lists it, but the file does not have it.")
            if info.shape != weight.shape or info.dtype != weight.dtype:
                raise ArtifactError(
                    f"{where}: it is {info.dtype} {list(info.shape)}, and the manifest says {weight.dtype} "
                    f"{list(weight.shape)}."
                )


def _is_library(name: str) -> bool:
    """Whether a file is a shared library: ``model.so``, ``lib/libcudart.so.13``."""
    base = name.rsplit("/", 1)[-1]
    return base.endswith(".so") or ".so." in base
