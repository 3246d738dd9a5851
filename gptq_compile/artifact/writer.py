# SPDX-License-Identifier: Apache-2.0
"""Writes an artifact: library, packed weights, tokenizer, configs and a manifest with the hash of every file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gptq_compile.artifact.files import StagedFolder, sha256
from gptq_compile.artifact.tensors import TensorWriter
from gptq_compile.errors import OutputError
from gptq_compile.runtime.manifest import SCHEMA_VERSION, WEIGHT_DTYPES

FORMAT = "gptq-compile"
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


def is_artifact(folder: Path) -> bool:
    """Whether a folder is an artifact, of any version: only those may be overwritten."""
    try:
        return json.loads((folder / MANIFEST).read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


class ArtifactWriter:
    """An artifact folder that appears whole when :meth:`finish` has been called, and otherwise not at all.

    Used as a context manager::

        with ArtifactWriter(out, disk_needed=size) as artifact:
            artifact.add_file(library, "model.so")
            artifact.add_weights(packed)
            artifact.finish(manifest)
    """

    def __init__(self, out: str | os.PathLike[str], *, overwrite: bool = False, disk_needed: int = 0) -> None:
        """Describes the folder; nothing is touched before the context is entered.

        Args:
            out: a place that does not exist or is an empty folder.
            overwrite: replace an artifact that is there (never another kind of folder).
            disk_needed: bytes that will be written, compared with the free ones before anything is.
        """
        self._folder = StagedFolder(out, overwrite=is_artifact if overwrite else None, disk_needed=disk_needed)
        self._weights: list[dict[str, Any]] = []

    @property
    def out(self) -> Path:
        """Where the artifact will be."""
        return self._folder.out

    def check(self) -> None:
        """Checks the place and the disk without touching either; for the plan, before hours of work.

        Raises:
            OutputError: the folder exists and is not empty, is a file, or the disk has too little space.
        """
        self._folder.check()

    def __enter__(self) -> ArtifactWriter:
        self._folder.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._folder.__exit__(kind, error, tb)

    def add_file(self, content: str | os.PathLike[str] | bytes, name: str) -> None:
        """Copies a file or writes bytes as ``name`` (``lib/x.so`` makes the subfolder).

        Raises:
            OutputError: a name that is taken or leads out of the folder.
        """
        if name == MANIFEST:
            raise OutputError(f"{MANIFEST} is written by finish().")
        self._folder.add(content if isinstance(content, bytes) else Path(content), name)

    def place(self, name: str) -> Path:
        """Where to write file ``name`` oneself; its parent folder exists."""
        return self._folder.place(name)

    def add_files(self, files: Mapping[str, Path | bytes]) -> None:
        """Adds several files: name -> path or content."""
        for name, content in files.items():
            self.add_file(content, name)

    def add_weights(
        self, tensors: Iterable[tuple[str, Any]], *, file: str = WEIGHTS, metadata: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Streams tensors into a safetensors file; the order is that of the weights tuple.

        Args:
            tensors: pairs of a name and a numpy array or torch tensor, each written before the next is asked for.
            file: another call may write another file.
            metadata: text kept in the file's header.

        Returns:
            The manifest's entries of these tensors, which :meth:`finish` puts in.
        """
        entries = []
        with TensorWriter(self._folder.place(file), {"format": FORMAT, **(metadata or {})}) as out:
            for name, tensor in tensors:
                entry = out.add(name, tensor)
                if entry["dtype"] not in WEIGHT_DTYPES:
                    raise OutputError(
                        f"The weight {name!r} has dtype {entry['dtype']}, which the runtime does not take."
                    )
                entries.append(entry if file == WEIGHTS else {**entry, "file": file})
        self._weights += entries
        return entries

    def finish(self, manifest: Mapping[str, Any]) -> Path:
        """Writes the manifest and moves the folder to its place.

        Args:
            manifest: everything but ``format``, ``schema_version``, ``weights`` and ``files``, which are put in here.

        Returns:
            The artifact's folder.

        Raises:
            OutputError: if the manifest names a library that was not added, or repeats what is put in here.
        """
        if taken := sorted({"format", "schema_version", "weights", "files"} & set(manifest)):
            raise OutputError(f"The manifest's {', '.join(taken)} are filled in by the writer.")
        names = self._folder.files()
        library = manifest.get("library")
        if library is not None and library not in names:
            raise OutputError(f"The manifest names the library {library}, which was not added.")
        files = {}
        for name in names:
            path = self._folder.path / name
            files[name] = {"sha256": sha256(path), "size": path.stat().st_size}
        document = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            **manifest,
            "weights": self._weights,
            "files": files,
        }
        try:
            # allow_nan: NaN and Infinity are not JSON, and other languages' parsers refuse them.
            text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise OutputError(f"The manifest cannot be written as JSON: {e}.") from e
        self._folder.add(text.encode(), MANIFEST)
        self._folder.commit()
        return self.out
