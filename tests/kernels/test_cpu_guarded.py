# SPDX-License-Identifier: Apache-2.0
"""CPU kernels read and write nothing outside of their arguments; see `guarded`."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys

import pytest

from gptq_compile.kernels.target import DEFAULT_CPU_ARCHS
from gptq_compile.runtime import processor
from gptq_compile.runtime.errors import DeviceError

GROUPS = {
    DEFAULT_CPU_ARCHS[0]: ("ops", "cache-int8", "linear", "bits2", "bits3", "bits4", "bits8", "stray"),
    DEFAULT_CPU_ARCHS[1]: ("bits3", "cache-float16"),
}


@functools.cache
def guarded(arch: str) -> dict[str, tuple[list[str], int]]:
    """Group -> what it printed and its exit code; one program runs all of an architecture."""
    command = [sys.executable, "-m", "tests.kernels.guarded", arch, *GROUPS[arch]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    ended, printed = {}, []
    for line in done.stdout.splitlines():
        group, _, status = line.partition(": exit code ")
        if group in GROUPS[arch] and status:
            ended[group] = (printed, int(status))
            printed = []
        else:
            printed.append(line)
    assert set(ended) == set(GROUPS[arch]), done.stdout
    return ended


# By hand, every group of every architecture: python -m tests.kernels.guarded ARCH GROUP.
@pytest.mark.parametrize(
    ("arch", "group"), [(arch, g) for arch, groups in GROUPS.items() for g in groups if g != "stray"]
)
def test_kernels_stay_inside_of_their_arguments(arch: str, group: str) -> None:
    try:
        processor.choose(list(DEFAULT_CPU_ARCHS), arch)
    except DeviceError as error:
        pytest.skip(str(error))
    printed, status = guarded(arch)[group]
    *names, last = printed or ["nothing ran"]
    assert status == 0, f"exit code {status}\n" + "\n".join(printed[-30:])
    assert int(last.split()[0]) == len(names) > 5


def test_a_read_past_the_end_is_found() -> None:
    assert guarded(DEFAULT_CPU_ARCHS[0])["stray"][1] == -signal.SIGSEGV
