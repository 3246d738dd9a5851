# SPDX-License-Identifier: Apache-2.0
"""What machine code is asked for: ``cpu``, ``cpu:x86-64-v3,x86-64-v4+avx512vnni``, ``cuda`` or ``cuda:sm_80,sm_90``."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from gptq_compile.errors import ConfigError

DEFAULT_CUDA_ARCHS = ("sm_80", "sm_89", "sm_90")
BASELINE = "x86-64-v3"
DEFAULT_CPU_ARCHS = (BASELINE, "x86-64-v4+avx512vnni")
# What may be added to a processor's name, in LLVM's words; the runtimes know how Linux calls each.
CPU_FEATURES = ("avx512vnni", "avxvnni", "dotprod")


@dataclass(frozen=True)
class Target:
    """A device kind and the architectures to build for.

    Attributes:
        kind: ``"cpu"`` or ``"cuda"``.
        archs: CUDA architectures (``sm_80`` ...), lowest first. For the CPU the LLVM ``-mcpu`` names with what is
            added to them (``x86-64-v4+avx512vnni``), in the order given: the first is what every machine must have.
    """

    kind: str
    archs: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Target:
        """Reads a ``--target`` value.

        Raises:
            ConfigError: if the kind is unknown, or an architecture is none: for CUDA of the form ``sm_NN`` or
                ``sm_NNa``, for the CPU an LLVM name with ``+feature`` for each of `CPU_FEATURES` beyond it.
        """
        kind, _, rest = text.partition(":")
        if kind == "cpu":
            return Target("cpu", _cpu_archs(rest, text) if rest else DEFAULT_CPU_ARCHS)
        if kind != "cuda":
            raise ConfigError(f"Unknown target {text!r}. Use cpu, cuda, or cuda:sm_80,sm_90.")
        archs = tuple(rest.split(",")) if rest else DEFAULT_CUDA_ARCHS
        for arch in archs:
            if not re.fullmatch(r"sm_\d{2,3}a?", arch):
                raise ConfigError(
                    f"Unknown CUDA architecture {arch!r} in target {text!r}. Use names such as sm_80, sm_89, sm_90."
                )
            if int(re.sub(r"\D", "", arch)) < 80:
                raise ConfigError(f"CUDA architecture {arch} is not supported: the kernels need sm_80 or newer.")
        return Target("cuda", tuple(sorted(set(archs), key=lambda a: int(re.sub(r"\D", "", a)))))

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(self.archs)}"

    @property
    def variants(self) -> tuple[Target, ...]:
        """Targets of which each becomes one library: for the CPU one per architecture, for CUDA this one."""
        return tuple(Target("cpu", (arch,)) for arch in self.archs) if self.kind == "cpu" else (self,)

    @property
    def is_arm(self) -> bool:
        """Whether the code is for 64-bit ARM processors."""
        return self.kind == "cpu" and _is_arm(self.archs[0])

    def has(self, feature: str) -> bool:
        """Whether code for all of the architectures may use a feature of the processor.

        Args:
            feature: as LLVM calls it: ``avx2``, ``avx512f``, ``avx512vnni``, ``neon``, ``dotprod``.

        Returns:
            False for CUDA.
        """
        return self.kind == "cpu" and all(feature in _features(arch) for arch in self.archs)

    def tvm(self) -> Any:
        """Returns the ``tvm.target.Target`` with its host; code is generated for the first architecture."""
        from gptq_compile.kernels.tvm_env import tvm

        host = _llvm(self.archs[0] if self.kind == "cpu" else BASELINE)
        if self.kind == "cpu":
            return tvm.target.Target(host)
        return tvm.target.Target({"kind": "cuda", "arch": self.archs[0]}, host=tvm.target.Target(host))


def _cpu_archs(rest: str, text: str) -> tuple[str, ...]:
    archs = tuple(dict.fromkeys(rest.split(",")))
    for arch in archs:
        name, *features = arch.split("+")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ConfigError(f"Target {text!r} has an empty name of a processor. Use names such as {BASELINE}.")
        unknown = [feature for feature in features if feature not in CPU_FEATURES]
        if unknown:
            raise ConfigError(
                f"Unknown processor feature {unknown[0]!r} in target {text!r}. Use one of {', '.join(CPU_FEATURES)}."
            )
    if len({_is_arm(arch) for arch in archs}) > 1:
        raise ConfigError(f"Target {text!r} mixes x86-64 and aarch64, which cannot be one artifact. Compile two.")
    return archs


def _is_arm(arch: str) -> bool:
    return arch.split("+")[0] == "aarch64"


def _llvm(arch: str) -> dict[str, Any]:
    """The fields of a TVM target for one processor; ``aarch64`` is the 64-bit ARM architecture without extensions."""
    name, *features = arch.split("+")
    target: dict[str, Any] = {"kind": "llvm", "mcpu": name, "num-cores": 2}
    if _is_arm(arch):
        target |= {"mcpu": "generic", "mtriple": "aarch64-linux-gnu"}
        features = ["neon", *features]
    if features:
        target["mattr"] = [f"+{feature}" for feature in features]
    return target


@functools.cache
def _features(arch: str) -> frozenset[str]:
    """What LLVM may use in code for one architecture."""
    from gptq_compile.kernels.tvm_env import tvm

    features = tvm.target.codegen.llvm_get_cpu_features(tvm.target.Target(_llvm(arch)))
    return frozenset(str(feature) for feature in features)
