# SPDX-License-Identifier: Apache-2.0
"""What machine code is asked for: ``cpu``, ``cuda`` or ``cuda:sm_80,sm_90``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gptq_compile.errors import ConfigError

DEFAULT_CUDA_ARCHS = ("sm_80", "sm_89", "sm_90")


@dataclass(frozen=True)
class Target:
    """A device kind and the architectures to build for.

    Attributes:
        kind: ``"cpu"`` or ``"cuda"``.
        archs: CUDA architectures (``sm_80`` ...), lowest first; for the CPU the LLVM ``-mcpu`` name.
    """

    kind: str
    archs: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Target:
        """Reads a ``--target`` value.

        Raises:
            ConfigError: if the kind is unknown or an architecture is not of the form ``sm_NN`` or ``sm_NNa``.
        """
        kind, _, rest = text.partition(":")
        if kind == "cpu":
            return Target("cpu", (rest or "x86-64-v3",))
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

    def tvm(self) -> Any:
        """Returns the ``tvm.target.Target`` with its host; CUDA code is generated for the lowest architecture."""
        from gptq_compile.kernels.tvm_env import tvm

        host = {"kind": "llvm", "mcpu": self.archs[0] if self.kind == "cpu" else "x86-64-v3", "num-cores": 2}
        if self.kind == "cpu":
            return tvm.target.Target(host)
        return tvm.target.Target({"kind": "cuda", "arch": self.archs[0]}, host=tvm.target.Target(host))
