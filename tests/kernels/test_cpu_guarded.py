# SPDX-License-Identifier: Apache-2.0
"""CPU kernels read and write nothing outside of their arguments; see `guarded`."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from gptq_compile.kernels.target import DEFAULT_CPU_ARCHS
from gptq_compile.runtime import processor
from gptq_compile.runtime.errors import DeviceError


def guarded(arch: str, group: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.guarded", arch, group], capture_output=True, text=True, check=False
    )


# By hand, every group of every architecture: python -m tests.kernels.guarded ARCH GROUP.
@pytest.mark.parametrize(
    ("arch", "group"),
    [(DEFAULT_CPU_ARCHS[0], g) for g in ("ops", "cache-int8", "linear", "bits2", "bits3", "bits4", "bits8")]
    + [(DEFAULT_CPU_ARCHS[1], g) for g in ("bits3", "cache-float16")],
)
def test_kernels_stay_inside_of_their_arguments(arch: str, group: str) -> None:
    try:
        processor.choose(list(DEFAULT_CPU_ARCHS), arch)
    except DeviceError as error:
        pytest.skip(str(error))
    done = guarded(arch, group)
    *names, last = done.stdout.splitlines() or ["nothing ran"]
    assert done.returncode == 0, f"{last}: exit code {done.returncode}\n{done.stderr[-2000:]}"
    assert int(last.split()[0]) == len(names) > 5


def test_a_read_past_the_end_is_found() -> None:
    assert guarded("x86-64-v3", "stray").returncode == -signal.SIGSEGV
