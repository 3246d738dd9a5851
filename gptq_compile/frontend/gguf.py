# SPDX-License-Identifier: Apache-2.0
"""GGUF files: transformers' name maps and un-permutations, gguf's dequantization, one tensor at a time.

transformers' own ``from_pretrained(gguf_file=...)`` needs the ``accelerate`` package and dequantizes everything at
once; its tables (which tensor is which parameter, which rows llama.cpp permuted) need neither and are used directly.
Architectures that only transformers' newer loader knows go through ``from_pretrained``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptq_compile.errors import ModelError
from gptq_compile.frontend.binding import checked, finish, load_with_transformers
from gptq_compile.frontend.wording import first_line
from gptq_compile.passes.program import ParamStore

log = logging.getLogger(__name__)

# What reading bytes that are not there, or not what they should be, raises.
_DAMAGE = (ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError, struct.error)


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Lets transformers parse a file's header once instead of once per use, and build gguf's name map once per model
    instead of once per module: 9 s instead of 33 s for a 135M-parameter model."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


class _Entry(NamedTuple):
    """One tensor of the file: its shape in torch's order, its ggml type, and its bytes as a memory map."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    data: np.ndarray

    def dequantize(self) -> np.ndarray:
        """The values, float32."""
        from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

        kind = GGMLQuantizationType(self.ggml_type)
        if kind == GGMLQuantizationType.F32:
            return self.data.view(np.float32).reshape(self.shape)
        if kind == GGMLQuantizationType.F16:
            return self.data.view(np.float16).reshape(self.shape).astype(np.float32)
        return dequantize(self.data.reshape(quant_shape_to_byte_shape(self.shape, kind)), kind)


def read_metadata(path: Path) -> dict[str, Any]:
    """The file's metadata (arrays of strings as their length).

    Raises:
        ModelError: if it is no GGUF file or ends within its header.
    """
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        return read_gguf_metadata(str(path))[0]
    except _DAMAGE as e:
        raise _damaged(path, e) from e


def _damaged(path: Path, e: Exception) -> ModelError:
    return ModelError(f"{path} is truncated or is not a GGUF file ({first_line(e)}). Download it again.")


def _entries(path: Path) -> list[_Entry]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from transformers.integrations.gguf.reader import _mapped, _read_metadata, _read_tensor_table

    blob = _mapped(str(path))
    try:
        metadata, count, position = _read_metadata(blob, str(path))
        table, position = _read_tensor_table(blob, count, position)
    except _DAMAGE as e:
        raise _damaged(path, e) from e
    alignment = metadata.get("general.alignment", 32)
    start = -(-position // alignment) * alignment
    entries = []
    for name, shape, ggml_type, offset in table:
        try:
            elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
        except (ValueError, KeyError):
            raise ModelError(
                f"The tensor {name!r} in {path} has the ggml type {ggml_type}, which the installed gguf package does "
                "not know. Update it with pip install -U gguf."
            ) from None
        begin = start + offset
        end = begin + int(np.prod(shape, dtype=np.int64)) // elements * size
        if end > blob.size:
            raise ModelError(
                f"{path} is truncated: the tensor {name!r} ends at byte {end}, and the file has {blob.size}. "
                "Download it again."
            )
        entries.append(_Entry(name, tuple(shape), ggml_type, blob[begin:end]))
    return entries


def load_config(path: Path) -> Any:
    """The transformers config that the file's metadata describe.

    Raises:
        ModelError: if the file is damaged or of an architecture transformers does not know.
    """
    from transformers import AutoConfig

    architecture = read_metadata(path)["general.architecture"]
    _entries(path)  # a truncated file is called so, before transformers stumbles over it
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except ImportError as e:
        raise ModelError("GGUF files need the gguf package: pip install gguf.") from e
    except Exception as e:
        raise ModelError(
            f"transformers cannot read the GGUF architecture {architecture!r} of {path} ({first_line(e)}). "
            "Give the Hugging Face folder of this model instead."
        ) from e


def load_params(path: Path, model: Any) -> ParamStore:
    """The file's tensors under the model's parameter names, dequantized when asked for.

    Args:
        path: the GGUF file.
        model: an instance with parameters on meta.

    Raises:
        ModelError: the file is truncated, a parameter has no tensor, or one of another shape.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        GGUF_SUPPORTED_ARCHITECTURES,
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    entries = _entries(path)
    config = model.config
    architecture = read_metadata(path)["general.architecture"]
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES and config.model_type not in GGUF_SUPPORTED_ARCHITECTURES:
        return load_with_transformers(model, path.parent, gguf_file=path.name)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as e:
        raise ModelError(f"The GGUF architecture {architecture!r} of {path} cannot be read ({first_line(e)}).") from e
    sources: dict[str, list[_Entry]] = {}
    for entry in entries:
        # Experts' maps lack the suffix that the file's names have.
        name = names.get(entry.name) or names.get(entry.name.removesuffix(".weight"))
        if name is None:
            log.info("The model has no parameter for the GGUF tensor %r, which is left out.", entry.name)
        else:
            sources.setdefault(name, []).append(entry)
    params = ParamStore()
    wanted = model.state_dict()
    for name, parts in sources.items():
        if name not in wanted:
            continue
        shape = tuple(wanted[name].shape)
        if sum(int(np.prod(p.shape)) for p in parts) != wanted[name].numel():
            raise ModelError(
                f"The tensor {parts[0].name!r} in {path} has shape {list(parts[0].shape)}, but the config of the "
                f"{config.model_type} model asks for {list(shape)} as {name!r}."
            )
        load = _loader(name, parts, shape, processor, names, path)
        params.add(name, shape, torch.float32, checked(load, f"{name!r} in {path}"))
    finish(params, model, str(path))
    return params


def _loader(
    name: str, parts: list[_Entry], shape: tuple[int, ...], processor: Any, names: dict[str, str], path: Path
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        # A processor either returns the tensor or, for merged experts, collects the parts under "tensors".
        collected: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for part in parts:
            result = processor.process(
                weights=part.dequantize(), name=part.name, tensor_key_mapping=names, parsed_parameters=collected
            )
            if result.name is not None:
                collected["tensors"][name] = torch.from_numpy(np.array(result.weights, dtype=np.float32))
        tensor = collected["tensors"].get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            raise ModelError(
                f"The tensor {parts[0].name!r} in {path} does not become {name!r} of shape {list(shape)}"
                + (f" but {list(tensor.shape)}." if tensor is not None else ".")
            )
        return tensor

    return load
