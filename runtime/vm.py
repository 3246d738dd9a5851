# SPDX-License-Identifier: Apache-2.0
"""The compiled module: loads ``model.so`` into TVM's virtual machine and names its entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptq_compile.runtime.artifact import Artifact
from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.errors import ArtifactError
from gptq_compile.runtime.ffi import ffi

_POOLED_ALLOCATOR = 2


class Model:
    """An artifact's entries and weights on one device. Signatures are those of the runtime contract.

    Attributes:
        forward: ragged prefill.
        decode: bucket size -> one decode step of exactly that many rows.
        sample: logits -> tokens.
        repetition_penalty: logits and seen -> logits, in place.
        mark_seen: records tokens in seen, in place.
        advance: tokens -> next step's input ids, positions and slots, in place.
        weights: the weights tuple, created once.
    """

    def __init__(self, artifact: Artifact, device: CpuDevice) -> None:
        """Loads the library (its hash has been checked) and the weights.

        Raises:
            ArtifactError: if the library does not load or lacks an entry.
        """
        manifest = artifact.manifest
        path = artifact.path(manifest.libraries.get(device.arch, manifest.library))
        try:
            self._module = ffi().load_module(str(path))
            self._vm = self._module["vm_load_executable"]()
            arguments: list[int] = []
            devices = device.vm_devices()
            for i in range(0, len(devices), 2):
                arguments += [devices[i], devices[i + 1], _POOLED_ALLOCATOR]
            self._vm["vm_initialization"](*arguments)
        except Exception as error:
            raise ArtifactError(f"{path} does not load: {first_line(error)}.") from error
        self.forward = self._entry(path, manifest.forward)
        self.decode = {size: self._entry(path, name) for size, name in manifest.decode.items()}
        self.sample = self._entry(path, manifest.sample)
        self.repetition_penalty = self._entry(path, manifest.repetition_penalty)
        self.mark_seen = self._entry(path, manifest.mark_seen)
        self.advance = self._entry(path, manifest.advance)
        self.weights = as_tuple([device.weight(artifact.weight(w), w.dtype) for w in manifest.weights])

    def _entry(self, path: Any, name: str) -> Any:
        try:
            return self._vm[name]
        except AttributeError:
            raise ArtifactError(f"{path} has no entry {name!r}, which the manifest lists.") from None


def as_tuple(tensors: Sequence[Any]) -> Any:
    """Packs tensors into the FFI array that the VM takes for a tuple parameter."""
    return ffi().convert(list(tensors))


def first_line(error: Exception) -> str:
    """The first line of an error's text; the FFI appends a backtrace."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
