# SPDX-License-Identifier: Apache-2.0
"""Which of an artifact's libraries this processor can run."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from gptq_compile.runtime.errors import DeviceError

CPUINFO = "/proc/cpuinfo"
# What each level of x86-64 adds (System V ABI, AMD64 supplement, section 3.1.1), and what a compiler's name for a
# feature beyond it is, all in the words of /proc/cpuinfo: those that the kernel lets programs use.
_X86_LEVELS = {
    "x86-64-v2": ("sse4_2", "ssse3", "popcnt", "cx16"),
    "x86-64-v3": ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}
_ARM = "aarch64"
_FEATURES = {"avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni", "dotprod": "asimddp"}


def choose(archs: Sequence[str], wanted: str | None = None) -> str:
    """Picks the code to run.

    Args:
        archs: what the artifact's libraries are for, from what every machine must have to what few have.
        wanted: one of them, instead of the last that runs here.

    Returns:
        One of ``archs``. What cannot be judged (a processor's own name, a machine without /proc) is taken if it is
        the first or the one wanted.

    Raises:
        DeviceError: if the processor lacks something, which would end in SIGILL.
    """
    if not archs:
        raise DeviceError("The manifest names no processor that the artifact was compiled for. Compile it again.")
    if wanted is not None and wanted not in archs:
        raise DeviceError(f"This artifact has no code for {wanted}. It has code for {', '.join(archs)}.")
    machine = _ARM if archs[0].split("+")[0] == _ARM else "x86_64"
    if platform.machine() not in (machine, "AMD64" if machine == "x86_64" else "arm64"):
        raise DeviceError(
            f"This artifact was compiled for {machine.replace('_', '-')}, and this machine is {platform.machine()}. "
            "Compile it for that."
        )
    flags = _flags()
    if flags is None:
        return wanted or archs[0]
    if wanted is None:
        runnable = [arch for arch in archs if _missing(arch, flags) == []]
        if runnable:
            return runnable[-1]
    arch = wanted or archs[0]
    missing = _missing(arch, flags)
    if missing:
        way_out = f"Use one of {', '.join(archs)}" if wanted else f"Compile it with --target cpu:{_lowest(machine)}"
        raise DeviceError(
            f"This artifact was compiled for {arch} processors, and this one lacks {', '.join(missing)}. {way_out}."
        )
    return arch


def _lowest(machine: str) -> str:
    return _ARM if machine == _ARM else "x86-64-v2"


def _flags() -> set[str] | None:
    """What the processor has; None where the system does not say."""
    try:
        with open(CPUINFO, encoding="utf-8") as f:
            lines = (line for line in f if line.startswith(("flags", "Features")))
            return next((set(line.split(":", 1)[1].split()) for line in lines), None)
    except OSError:
        return None


def _missing(arch: str, flags: set[str]) -> list[str] | None:
    """What code for an architecture needs and the processor lacks; None if that is not known."""
    name, *features = arch.split("+")
    if (name != _ARM and name not in _X86_LEVELS) or any(feature not in _FEATURES for feature in features):
        return None
    levels = [("asimd",)] if name == _ARM else [needs for level, needs in _X86_LEVELS.items() if level <= name]
    needed = [flag for level in levels for flag in level] + [_FEATURES[feature] for feature in features]
    return [flag for flag in needed if flag not in flags]
