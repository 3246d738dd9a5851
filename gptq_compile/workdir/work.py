# SPDX-License-Identifier: Apache-2.0
"""What a compilation keeps in its work folder: solves, calibration text, and which outputs are its own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptq_compile import __version__
from gptq_compile.calibration import Generate
from gptq_compile.frontend.source import ModelSource
from gptq_compile.options import CompileOptions
from gptq_compile.passes.gptq.solution import Solution
from gptq_compile.passes.gptq.store import dump, load
from gptq_compile.workdir.folder import WorkFolder

log = logging.getLogger(__name__)


class KeptSolutions:
    """Solves in a work folder, one entry each (see ``passes/gptq/store.py``)."""

    def __init__(self, folder: WorkFolder) -> None:
        self._folder = folder
        self._entry_of: dict[str, str] = {}  # linear -> entry
        for entry in folder.names("solve "):
            for linear in entry.removeprefix("solve ").split(", "):
                self._entry_of[linear] = entry
        self._loaded: dict[str, dict[str, Solution]] = {}

    def __len__(self) -> int:
        """Linears that were finished when the folder was opened, damaged ones included."""
        return len(self._entry_of)

    def finished(self, name: str) -> Solution | None:
        """The kept solution of a linear, or None; each is handed out once, so that it is not held twice."""
        entry = self._entry_of.get(name)
        if entry is None:
            return None
        if entry not in self._loaded:
            content = self._folder.read(entry)
            try:
                self._loaded[entry] = load(content) if content is not None else {}
            except (ValueError, KeyError, TypeError) as e:
                log.warning("The entry %r of %s cannot be read (%s); it is done again.", entry, self._folder.path, e)
                self._loaded[entry] = {}
        return self._loaded[entry].pop(name, None)

    def keep(self, solutions: Mapping[str, Solution]) -> None:
        """Keeps the linears of one solve."""
        self._folder.keep(f"solve {', '.join(solutions)}", dump(solutions))


class Work:
    """The work folder of one compilation; without one, everything here does nothing."""

    def __init__(self, folder: WorkFolder | None) -> None:
        self._folder = folder
        self.solutions = None if folder is None else KeptSolutions(folder)

    @classmethod
    @contextmanager
    def open(cls, path: Path | None, resume: bool) -> Iterator[Work]:
        """Opens the folder for the time of a run.

        Raises:
            OutputError: another process works there, or it holds work and ``resume`` is not set.
        """
        if path is None:
            yield cls(None)
            return
        with WorkFolder(path, resume=resume) as folder:
            yield cls(folder)

    def depend_on_settings(self, options: CompileOptions) -> None:
        """Refuses to go on if anything that decides a solve was set otherwise; target, dtype and tuning do not."""
        if self._folder is None:
            return
        import torch

        settings = {
            **{name: value for name, value in options.quantize.as_dict().items() if not name.startswith("tune_")},
            "calibration": options.calibration,
            "device": torch.device(options.resolved_device).type,
            "gptq-compile": __version__,
            "torch": torch.__version__,
        }
        self._folder.depend("settings", settings)

    def depend_on_model(self, source: ModelSource) -> None:
        """Refuses to go on if a file of the model is another one (reads them all)."""
        if self._folder is not None:
            self._folder.depend("model", {f"model file {k}": f"sha256 {v}" for k, v in source.hashes().items()})

    def depend_on_calibration(self, ids: NDArray[np.int64]) -> None:
        """Refuses to go on with other calibration sequences."""
        if self._folder is not None:
            digest = hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()
            values = {"calibration sequences": list(ids.shape), "calibration token ids": f"sha256 {digest}"}
            self._folder.depend("calibration", values)

    def remember(self, generate: Generate) -> Generate:
        """A generator of calibration text that keeps what it wrote and does not write it again."""
        folder = self._folder
        if folder is None:
            return generate

        def kept(prompts: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
            name, shape = f"text {seed}", (len(prompts), count)
            content = folder.read(name)
            if content is not None and len(content) == 8 * shape[0] * shape[1]:
                return np.frombuffer(content, "<i8").reshape(shape).astype(np.int64)
            made = generate(prompts, count, seed)
            folder.keep(name, np.ascontiguousarray(made, "<i8").tobytes())
            return made

        return kept

    def claim(self, output: Path) -> None:
        """Notes that an output is made by this run; it does not exist or was claimed before.

        A run can be killed when an output is in its place and before the run has ended; the resumed run then finds an
        output in the way, and may replace it because it is its own.
        """
        if self._folder is not None and not self.claimed(output):
            self._folder.keep(_claim(output), b"")

    def claimed(self, output: Path) -> bool:
        """Whether a run of this work folder makes an output."""
        return self._folder is not None and _claim(output) in self._folder


def _claim(output: Path) -> str:
    return f"output {output.expanduser().absolute()}"
