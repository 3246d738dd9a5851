# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile export-onnx MODEL``: quantize a model and write it for ONNX Runtime."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from gptq_compile.cli import compile as compiling
from gptq_compile.cli.parser import Parser

_EPILOG = """\
examples:
  gptq-compile export-onnx HuggingFaceTB/SmolLM2-135M-Instruct --wbits 4 -o smollm2-onnx
  gptq-compile export-onnx ./smollm2 -o smollm2-onnx      (compiled for the CPU: takes its weights as they are)
  gptq-compile export-onnx ./model --wbits 3 --group-size 64 --calibration text.jsonl -o model-onnx
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    arguments = parser().parse_args(argv)
    arguments.format, arguments.target = "onnx", "cpu"  # quantization is the same for every target
    options = compiling.to_options(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see compile.main
    from gptq_compile.cli.reporters import reporter

    with reporter(options, as_json=arguments.json) as report:
        return compiling.compile_with(options, report, dry_run=arguments.dry_run)


def parser() -> argparse.ArgumentParser:
    """The command's arguments: those of compiling that decide how weights are quantized, and ONNX's own."""
    p = Parser(
        prog="gptq-compile export-onnx",
        usage="gptq-compile export-onnx MODEL -o DIR [--wbits 2|3|4|8] [options]",
        description="Quantizes a model and writes it as ONNX: model.onnx with its weights beside it,\n"
        "genai_config.json and the tokenizer, for onnxruntime and onnxruntime-genai. Nothing is compiled.",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a hub id (org/name), or a .gguf file")
    p.add_argument("-o", "--out", metavar="DIR", required=True, help="folder to make")
    group = p.add_argument_group("onnx")
    group.add_argument(
        "--ops",
        dest="onnx_ops",
        choices=("matmulnbits", "custom"),
        help="what quantized linears become: matmulnbits runs in onnxruntime as it is (default); custom is faster and "
        "smaller at 3 bits, and comes with a library of operators, which a C compiler must build",
    )
    group.add_argument(
        "--accuracy-level",
        type=int,
        metavar="N",
        help="of quantized linears: 0 as the runtime chooses, 1 float32, 4 activations rounded to int8 (default: 0)",
    )
    compiling.add_quantization(p.add_argument_group("quantization"))
    compiling.add_calibration(p.add_argument_group("calibration"))
    compiling.add_input(p.add_argument_group("input"))
    compiling.add_output(p.add_argument_group("output"))
    compiling.add_debugging(p.add_argument_group("looking inside"))
    return p
