# SPDX-License-Identifier: Apache-2.0
"""Writes a quantized program as a folder that ONNX Runtime and onnxruntime-genai run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gptq_compile.artifact.files import StagedFolder
from gptq_compile.errors import OutputError
from gptq_compile.frontend.source import ModelSource
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.toolchain import require_cc
from gptq_compile.onnx.custom_ops import QuantLinear
from gptq_compile.onnx.genai import genai_config
from gptq_compile.onnx.library.build import build_library
from gptq_compile.onnx.lowering import Lowering
from gptq_compile.onnx.matmulnbits import MatMulNBits
from gptq_compile.passes.fuse_linears import FuseLinears
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.program import Program

MODEL, DATA, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"
LIBRARY = "libgptq_compile_ops.so"


def products(ops: str, accuracy_level: int = 0) -> MatMulNBits | QuantLinear:
    """What multiplies by quantized matrices for a choice of ``--ops``.

    Raises:
        BuildError: the custom ones need a C compiler, and there is none.
    """
    if ops == "matmulnbits":
        return MatMulNBits(accuracy_level)
    require_cc()
    return QuantLinear()


def write_onnx(
    program: Program,
    source: ModelSource,
    settings: dict[str, Any],
    out: str | os.PathLike[str],
    *,
    ops: str = "matmulnbits",
    accuracy_level: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes ``model.onnx``, its weights, ``genai_config.json``, tokenizer and configs.

    Args:
        program: after ``gptq_quantize`` and before ``insert_kv_cache``.
        source: the model that it was made from.
        settings: how it was quantized, for the model's metadata.
        out: a place that does not exist or is an empty folder.
        ops: what quantized linears become: ``matmulnbits`` or ``custom``, for which a library is built too.
        accuracy_level: of ``MatMulNBits``: 0 as the runtime chooses, 1 float32, 4 activations rounded to int8.
        overwrite: replace an export that is there.

    Returns:
        The folder.

    Raises:
        PassError: an op has no form in ONNX; names it, the module and the way out.
        BuildError: there is no C compiler for the library, or it fails.
        OutputError: the folder exists, or the disk is full.
    """
    product = products(ops, accuracy_level)
    if product.divides:
        program = program.clone()
        PassManager([FuseLinears()], validate=False).run(program)
    lowering = Lowering(program, product)
    builder = lowering.run()
    with StagedFolder(out, overwrite=is_export if overwrite else None, disk_needed=builder.nbytes) as folder:
        if isinstance(product, QuantLinear):
            build_library(product.cases, Target.parse(str(settings.get("target", "cpu"))), folder.place(LIBRARY))
        metadata = _metadata(program, source, settings) | {"ops": ops}
        words = f"{source.name} ({source.config.model_type}), quantized by gptq-compile"
        try:
            builder.write(folder.place(MODEL), folder.place(DATA), metadata, words)
        except _onnx_errors() as e:
            raise OutputError(f"The ONNX model of {source.name} is not valid: {str(e).strip().splitlines()[0]}") from e
        library = LIBRARY if ops == "custom" else None
        if (config := genai_config(source, lowering, MODEL, library)) is not None:
            folder.add(config, GENAI)
        for name, content in source.tokenizer_files.items():
            folder.add(content, name)
        folder.add(source.config_json(), "config.json")
        folder.add(source.generation_json(), "generation_config.json")
        folder.commit()
    return folder.out


def is_export(folder: Path) -> bool:
    """Whether a folder is one that :func:`write_onnx` wrote: only those may be overwritten."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(folder / MODEL, load_external_data=False).producer_name == "gptq-compile"
    except (OSError, DecodeError):
        return False


def _metadata(program: Program, source: ModelSource, settings: dict[str, Any]) -> dict[str, str]:
    keys = ("wbits", "group_size", "sym", "method")
    layers = program.attrs.get("quantization", [])
    return {
        "producer": "gptq-compile",
        "source_model": source.source,
        "model_type": source.config.model_type,
        "context_length": str(source.context_length),
        **{key: json.dumps(settings[key]) for key in keys if key in settings},
        "layers": json.dumps([{k: layer[k] for k in ("name", "bits", "group_size") if k in layer} for layer in layers]),
    }


def _onnx_errors() -> tuple[type[Exception], ...]:
    from onnx.checker import ValidationError
    from onnx.shape_inference import InferenceError

    return ValidationError, InferenceError
