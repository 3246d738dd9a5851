# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a tiny model, written by this program and by hand, and an unpacker that shares no code with it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptq_compile.artifact.dequantized import dequantized_weights, write_dequantized
from gptq_compile.checkpoint.writer import write_checkpoint
from gptq_compile.frontend.source import ModelSource, load_source
from gptq_compile.frontend.trace import trace
from gptq_compile.passes.adopt_codes import AdoptCodes
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pipeline import trace_passes
from gptq_compile.passes.program import Program


def unpacked(tensors: dict[str, torch.Tensor], module: str, bits: int, version: int) -> np.ndarray:
    """float32 weight ``[out, in]`` of a module as ``formats.md``'s formula says it, field by field."""

    def fields(words: np.ndarray, count: int) -> np.ndarray:
        stream = sum(int(w) << (32 * i) for i, w in enumerate(words.view(np.uint32)))
        return np.array([(stream >> (bits * i)) & ((1 << bits) - 1) for i in range(count)])

    scales = tensors[f"{module}.scales"].float().numpy()
    g_idx = tensors[f"{module}.g_idx"].numpy()
    qweight, qzeros = tensors[f"{module}.qweight"].numpy(), tensors[f"{module}.qzeros"].numpy()
    q = np.stack([fields(np.ascontiguousarray(qweight[:, n]), len(g_idx)) for n in range(qweight.shape[1])])
    z = np.stack([fields(np.ascontiguousarray(row), scales.shape[1]) for row in qzeros]) + (version == 1)
    return (scales.T[:, g_idx] * (q - z.T[:, g_idx])).astype(np.float32)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replaces the tensors of a folder with one file."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    """Changes settings in both config files; None removes one."""
    for name in ("config.json", "quantize_config.json"):
        whole = json.loads((folder / name).read_text())
        part = whole["quantization_config"] if name == "config.json" else whole
        for key, value in changes.items():
            if value is None:
                part.pop(key, None)
            else:
                part[key] = value
        (folder / name).write_text(json.dumps(whole))


@functools.cache
def traced(model: Path) -> tuple[ModelSource, Program]:
    """A model and its program as `gptq_quantize` takes it; made once, because tracing takes seconds."""
    source = load_source(str(model))
    program = trace(source.config, source.params)
    PassManager(trace_passes(), validate=False).run(program)
    return source, program


def adopted(folder: Path, model: Path) -> tuple[ModelSource, Program, AdoptCodes]:
    """A checkpoint of a model as a program; the trace is that of the model."""
    source, program = load_source(str(folder)), traced(model)[1].clone()
    for name in source.params:
        entry = source.params.entry(name)
        program.params.add(name, entry.shape, entry.dtype, entry.load)
    adopt = AdoptCodes(source.codes)
    PassManager([adopt]).run(program)
    return source, program, adopt


@pytest.fixture(scope="session")
def write(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``write(form, model=tiny, dequantized=None, **quantize settings)``: a checkpoint, made in a new folder."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32)))

    def make(form: str, model: Path | None = None, dequantized: Path | None = None, **settings: Any) -> Path:
        source, program = traced(model or tiny_model)
        program = program.clone()
        given = {"wbits": 4, "group_size": 32, "method": "rtn", "min_zero": int(form == "gptq"), **settings}
        config = QuantizeConfig(**given)
        PassManager([GptqQuantize(config, ids)], validate=False).run(program)
        if dequantized is not None:
            write_dequantized(source, dequantized_weights(program), dequantized)
        return write_checkpoint(program, source, config, tmp_path_factory.mktemp("checkpoint") / "out", form=form)

    return make


@pytest.fixture(scope="session")
def written(write: Callable[..., Path]) -> Path:
    """A 4-bit asymmetric checkpoint of version 1; do not change it."""
    return write("gptq")


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))
