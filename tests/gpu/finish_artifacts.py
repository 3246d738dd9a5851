# SPDX-License-Identifier: Apache-2.0
"""Fills cross-compiled artifacts with freshly quantized weights on a machine that has a GPU but no TVM.

Machine code is cross-compiled where TVM is; only it and the manifest travel (an artifact without its weights). Here the
model is quantized again with GPTQ, packed by the names that the manifest lists, and written next to a Hugging Face
folder with the same dequantized weights::

    python tests/gpu/finish_artifacts.py MODEL OUT --skeleton cu4 wbits=4 group_size=128 --skeleton cu3 ...
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality import parse_setting
from gptq_compile.artifact.dequantized import dequantized_weights, write_dequantized
from gptq_compile.artifact.writer import ArtifactWriter
from gptq_compile.frontend.source import load_source
from gptq_compile.frontend.trace import trace
from gptq_compile.kernels.target import Target
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pipeline import lowering_passes, trace_passes
from gptq_compile.passes.tune_scales import TuneScales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--skeleton", nargs="+", action="append", required=True)
    args = parser.parse_args()
    source = load_source(args.model)
    for name in list(source.params):
        source.params.set(name, source.params.get(name))
    base = trace(source.config, source.params, name=source.name)
    PassManager(trace_passes(), validate=False).run(base)
    calibration = torch.from_numpy(np.load(args.calibration).astype(np.int64))[: args.rows]
    for folder, *pairs in args.skeleton:
        start = time.perf_counter()
        skeleton = Path(folder)
        manifest = json.loads((skeleton / "manifest.json").read_text())
        program = base.clone()
        config = QuantizeConfig(**parse_setting(pairs))
        GptqQuantize(config, calibration, "cuda").run(program)
        TuneScales(config, base, calibration, "cuda").run(program)  # nothing without tune_epochs
        dequantized = dequantized_weights(program, getattr(torch, manifest["dtype"]))
        write_dequantized(source, dequantized, args.out / f"{skeleton.name}-hf")
        target = Target.parse(f"{manifest['target']['kind']}:{','.join(manifest['target']['archs'])}")
        PassManager(lowering_passes(target, manifest["dtype"]), validate=False).run(program)
        listed = manifest.pop("weights")
        for key in ("format", "schema_version"):
            manifest.pop(key)
        files = manifest.pop("files")
        manifest["quantization"] = {**parse_setting(pairs), "layers": program.attrs["quantization"]}
        with ArtifactWriter(args.out / skeleton.name, overwrite=True) as writer:
            for name in files:
                if name != "weights.safetensors":
                    writer.add_file(skeleton / name, name)
            writer.add_weights((entry["name"], program.params.get(entry["name"])) for entry in listed)
            writer.finish(manifest)
        print(f"{skeleton.name}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
