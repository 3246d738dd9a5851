# SPDX-License-Identifier: Apache-2.0
"""Everything a compilation depends on, checked before any model is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_compile.errors import ConfigError
from gptq_compile.kernels.target import Target
from gptq_compile.passes.gptq.config import BITS, QuantizeConfig
from gptq_compile.report.stored import REPORT

DTYPES = ("float32", "float16")
ACTIVATIONS = ("int8", "float")
KV_CACHES = ("float32", "float16", "int8")
CHECKPOINTS = ("gptq", "gptq_v2")
ONNX_OPS = ("matmulnbits", "custom")
FORMATS = ("artifact", *CHECKPOINTS, "onnx")


@dataclass(frozen=True)
class CompileOptions:
    """Settings of one ``gptq-compile`` run.

    Attributes:
        model: a Hugging Face folder, a hub id or a GGUF file.
        out: the folder to make.
        format: what to make: an artifact, a GPTQ checkpoint for other tools (``gptq`` or ``gptq_v2``), or a model for
            ONNX Runtime (``onnx``); only artifacts are compiled.
        onnx_ops: what an ONNX model's quantized linears become: ``matmulnbits``, or ``custom`` for operators of our own
            and a library that runs them.
        accuracy_level: of an ONNX model's quantized linears: 0 as the runtime chooses, 1 float32, 4 activations rounded
            to 8 bits.
        target: ``cpu``, ``cuda`` or ``cuda:sm_80,sm_90``.
        quantize: how weights are quantized.
        calibration: a ``.txt``/``.jsonl``/``.npy`` file, a ``datasets`` name, or ``self`` for text of the model's own.
        dtype: activation type; by default float32 on the CPU and float16 on CUDA.
        activations: what quantized linears on the CPU multiply: ``int8``, rounded for each group of features, or
            ``float``. By default what is fastest: ``int8`` for float32 on the CPU, and ``float`` elsewhere.
        kv_cache: type of keys and values kept for later tokens: ``float32``, ``float16``, or ``int8`` with a scale for
            each token and head. By default ``float16`` for float32 on the CPU, else that of the activations; other
            types than theirs are for float32 on the CPU.
        batch_buckets: batch sizes that get a decode entry of their own.
        lm_head_bits: to how many bits an output projection that is not quantized with the rest is rounded, 0 for none;
            by default 8 for the CPU, where a step has to read all of it, and 0 elsewhere.
        device: where torch quantizes; by default CUDA where torch has it.
        dequantized: also write a Hugging Face folder with the dequantized weights here.
        report: HTML file that says what was done. An artifact has one inside, and this one is a copy; beside what is
            made in other formats it is OUT.report.html by default.
        trace: file for Perfetto that says what was done when.
        work_dir: folder where finished solves and calibration text are kept while the run goes on. ``resume``: go on
            with what is there.
        validate: run the program's reference before and after every pass and compare.
        dump_ir: folder for the IR after every pass. ``stop_after``: name of the last pass to run.
        reproducer: folder written when a pass fails.
        revision, offline, trust_remote_code: how a hub id is resolved.
        overwrite: replace what this program wrote there before.
        asked: names of the settings in ``quantize``, and ``calibration``, that the user gave. What is quantized already
            is refused with settings that it cannot have. By default those that differ from the defaults.
    """

    model: str
    out: Path
    format: str = "artifact"
    onnx_ops: str = "matmulnbits"
    accuracy_level: int = 0
    target: str = "cpu"
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    calibration: str = "self"
    dtype: str | None = None
    activations: str | None = None
    kv_cache: str | None = None
    batch_buckets: tuple[int, ...] = (1, 2, 4, 8)
    lm_head_bits: int | None = None
    device: str | None = None
    dequantized: Path | None = None
    report: Path | None = None
    trace: Path | None = None
    work_dir: Path | None = None
    resume: bool = False
    validate: bool = True
    dump_ir: Path | None = None
    stop_after: str | None = None
    reproducer: Path | None = None
    revision: str | None = None
    offline: bool = False
    trust_remote_code: bool = False
    overwrite: bool = False
    asked: tuple[str, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self.resolved_target  # noqa: B018  parses, and raises for a bad one
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}.")
        if self.activations not in (None, *ACTIVATIONS):
            raise ConfigError(f"activations are {self.activations!r}; use one of {', '.join(ACTIVATIONS)}.")
        if self.activations == "int8" and not self._float_on_cpu:
            raise ConfigError("Activations of 8 bits are for float32 on the CPU; leave --activations out.")
        if self.kv_cache not in (None, *KV_CACHES):
            raise ConfigError(f"the KV cache is {self.kv_cache!r}; use one of {', '.join(KV_CACHES)}.")
        if self.kv_cache not in (None, self.resolved_dtype) and not self._float_on_cpu:
            raise ConfigError(
                f"A KV cache of {self.kv_cache} is for float32 on the CPU; here it has the activations' type, "
                f"{self.resolved_dtype}. Leave --kv-cache out."
            )
        if not self.batch_buckets or any(b < 1 or b > 256 for b in self.batch_buckets):
            raise ConfigError(f"batch buckets are {list(self.batch_buckets)}; use sizes from 1 to 256.")

        if self.lm_head_bits not in (None, 0, *BITS):
            raise ConfigError(f"lm_head_bits is {self.lm_head_bits!r}; use 2, 3, 4 or 8 bits, or 0 to leave the head.")
        if self.lm_head_bits and self.format != "artifact":
            raise ConfigError("lm_head_bits is for what is compiled; --quantize-lm-head quantizes a checkpoint's head.")
        if self.format not in FORMATS:
            raise ConfigError(f"format is {self.format!r}; use one of {', '.join(FORMATS)}.")
        if self.onnx_ops not in ONNX_OPS:
            raise ConfigError(f"ONNX operators are {self.onnx_ops!r}; use one of {', '.join(ONNX_OPS)}.")
        if self.accuracy_level and self.onnx_ops != "matmulnbits":
            raise ConfigError("An accuracy level is for the operator MatMulNBits; leave it out with --ops custom.")
        if self.accuracy_level not in range(5):
            raise ConfigError(f"accuracy level is {self.accuracy_level}; use a number from 0 to 4.")
        if self.resume and self.work_dir is None:
            raise ConfigError("--resume goes on with what is in a work folder; name that with --work-dir DIR.")

    @property
    def settings_asked(self) -> tuple[str, ...]:
        """What the user set about quantization, with the default filled in."""
        if self.asked is not None:
            return self.asked
        default, given = QuantizeConfig().as_dict(), self.quantize.as_dict()
        names = [name for name, value in given.items() if value != default[name]]
        return (*names, *(["calibration"] if self.calibration != "self" else []))

    @property
    def resolved_target(self) -> Target:
        """The parsed target."""
        return Target.parse(self.target)

    @property
    def resolved_dtype(self) -> str:
        """The activation type with the target's default filled in."""
        return self.dtype or ("float32" if self.resolved_target.kind == "cpu" else "float16")

    @property
    def _float_on_cpu(self) -> bool:
        return (self.resolved_target.kind, self.resolved_dtype) == ("cpu", "float32")

    @property
    def resolved_activations(self) -> str:
        """What quantized linears multiply, with the default filled in."""
        return self.activations or ("int8" if self._float_on_cpu else "float")

    @property
    def resolved_kv_cache(self) -> str:
        """Type of the KV cache, with the default filled in."""
        return self.kv_cache or ("float16" if self._float_on_cpu else self.resolved_dtype)

    @property
    def resolved_lm_head_bits(self) -> int:
        """Bits of the output projection, with the target's default filled in."""
        if self.lm_head_bits is not None:
            return self.lm_head_bits
        return 8 if self.format == "artifact" and self.resolved_target.kind == "cpu" else 0

    @property
    def resolved_device(self) -> str:
        """The torch device with the default filled in."""
        if self.device is not None:
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def report_paths(self) -> tuple[Path, ...]:
        """Where the report goes, with the default filled in."""
        inside = [self.out / REPORT] if self.format == "artifact" else []
        out = self.out.absolute()
        outside = self.report or (None if inside else out.with_name(f"{out.name}.report.html"))
        return (*inside, *([] if outside is None else [outside]))

    def as_dict(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        return {
            "target": str(self.resolved_target),
            "dtype": self.resolved_dtype,
            "activations": self.resolved_activations,
            "kv_cache": self.resolved_kv_cache,
            "calibration": self.calibration,
            "batch_buckets": list(self.batch_buckets),
            "lm_head_bits": self.resolved_lm_head_bits,
            **self.quantize.as_dict(),
        }
