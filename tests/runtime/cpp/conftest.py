# SPDX-License-Identifier: Apache-2.0
"""The C++ library and its driver, built once a test run with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

HERE = pathlib.Path(__file__).resolve().parent
SETTINGS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1", "TVM_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Programs:
    """What was built: ``driver`` for the tests and ``generate``, the example."""

    driver: pathlib.Path
    generate: pathlib.Path


def tool(name: str) -> str | None:
    """A program beside the interpreter (pip's cmake) or on the path."""
    return shutil.which(name, path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Builds them, once for all processes of a parallel run."""
    cmake = tool("cmake")
    if cmake is None or tool("c++") is None or tool("make") is None:
        pytest.skip("needs cmake, make and a C++ compiler")
    import tvm_ffi

    parallel = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.getbasetemp()
    build = base / "cpp-build"
    with open(base / "cpp-build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        include = pathlib.Path(tvm_ffi.libinfo.find_include_path())
        for command in (
            [cmake, "-S", str(HERE), "-B", str(build), "-G", "Unix Makefiles", f"-DTVM_FFI_INCLUDE={include}"],
            [cmake, "--build", str(build), "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return Programs(build / "driver", build / "example" / "generate")


class Driver:
    """A running driver: ``driver("encode", text)``; texts and bytes are sent as they are, lists as ``1,2,3``."""

    def __init__(self, program: pathlib.Path, errors: pathlib.Path) -> None:
        self._errors = errors
        with errors.open("w") as stderr:
            self._process = subprocess.Popen(
                [program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **SETTINGS},
            )

    def __call__(self, command: str, *arguments: object, **settings: object) -> str:
        """Sends a command and returns the answer's line."""
        words = [command, *map(self._word, arguments)]
        for name, value in settings.items():
            for each in value if name == "stop" and isinstance(value, list) else [value]:
                words.append(f"{name}={self._word(each)}")
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the driver died: {self._errors.read_text()[-4000:]}"
        return answer.rstrip("\n")

    def close(self) -> None:
        """Ends it; a sanitizer's report or a leak is a failure."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0, self._errors.read_text()[-4000:]

    @staticmethod
    def _word(value: object) -> str:
        if isinstance(value, bool):
            return str(int(value))
        if isinstance(value, str):
            value = value.encode("utf-8", "surrogatepass")
        if isinstance(value, bytes):
            return value.hex() or "-"
        if isinstance(value, pathlib.Path | int | float):
            return str(value)
        assert isinstance(value, Sequence)
        return ",".join(map(str, value)) or "-"


@pytest.fixture
def start(programs: Programs, tmp_path: pathlib.Path) -> Iterator[Callable[[], Driver]]:
    """Starts drivers; each must end without a sanitizer's report."""
    started: list[Driver] = []

    def one() -> Driver:
        started.append(Driver(programs.driver, tmp_path / f"driver{len(started)}.err"))
        return started[-1]

    yield one
    for driver in started:
        driver.close()


@pytest.fixture
def driver(start: Callable[[], Driver]) -> Driver:
    """A running driver."""
    return start()
