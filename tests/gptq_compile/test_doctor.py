# SPDX-License-Identifier: Apache-2.0
"""Every finding has its mend, and what is needed decides the exit code."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib

import pytest

from gptq_compile import doctor
from gptq_compile.cli.main import main
from gptq_compile.kernels.target import Target

CPU, CUDA = Target.parse("cpu"), Target.parse("cuda:sm_90")


def named(findings: list[doctor.Finding], name: str) -> doctor.Finding:
    [finding] = [f for f in findings if f.name == name]
    return finding


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, to be changed; a package that is taken out is not installed."""
    installed = {name: f"{low}.1" for name, (low, _) in _all_packages().items()}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return installed


def _all_packages() -> dict[str, tuple[str, str | None]]:
    return doctor.RUNTIME_PACKAGES | doctor.COMPILE_PACKAGES | doctor.OPTIONAL_PACKAGES


def test_a_good_machine_lacks_nothing(versions: dict[str, str], tmp_path: pathlib.Path) -> None:
    findings = doctor.examine(CPU, tmp_path)
    assert [f.name for f in findings if f.status == "missing"] == []
    assert all(f.mend for f in findings if f.status != "ok")
    assert all(f.found for f in findings)


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("torch", None, "missing"),
        ("torch", "2.10.1", "missing"),
        ("transformers", "6.0.0", "missing"),
        ("apache-tvm", "0.28.0", "missing"),
        ("apache-tvm", "0.27.0.post1", "ok"),
        ("torch", "2.13.0+cpu", "ok"),
        ("tokenizers", None, "missing"),
        ("sentencepiece", None, "warning"),
        ("datasets", "3.9", "warning"),
    ],
)
def test_versions(
    name: str, version: str | None, status: str, versions: dict[str, str], tmp_path: pathlib.Path
) -> None:
    if version is None:
        del versions[name]
    else:
        versions[name] = version
    finding = named(doctor.examine(CPU, tmp_path), name)
    assert finding.status == status
    assert status == "ok" or (name in finding.mend or "gptq-compile" in finding.mend)


def test_the_other_tvm_is_found(versions: dict[str, str], tmp_path: pathlib.Path) -> None:
    versions["tvm"] = "1.0.0"
    finding = named(doctor.examine(CPU, tmp_path), "no other tvm")
    assert finding.status == "missing" and "pip uninstall tvm" in finding.mend


def test_running_needs_no_compiler(
    versions: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in doctor.COMPILE_PACKAGES | doctor.OPTIONAL_PACKAGES:
        del versions[name]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [f for f in doctor.examine(None, tmp_path) if f.status == "missing"] == []


def test_compilers_are_needed_for_their_targets(
    versions: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CC", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("gptq_compile.kernels.toolchain.DEFAULT_CUDA_ROOT", tmp_path)
    cpu, cuda = doctor.examine(CPU, tmp_path), doctor.examine(CUDA, tmp_path)
    assert named(cpu, "C compiler").status == "missing" and "gcc" in named(cpu, "C compiler").mend
    assert named(cpu, "nvcc").status == "warning" and named(cuda, "nvcc").status == "missing"


def test_an_nvcc_that_does_not_know_the_architecture(
    versions: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo "release 12.4, V12.4.1";; *) echo sm_80; echo sm_86;; esac\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert named(doctor.examine(CPU, tmp_path), "nvcc").status == "ok"
    finding = named(doctor.examine(CUDA, tmp_path), "nvcc")
    assert finding.status == "missing" and "sm_90" in finding.found


def test_a_disk_that_is_nearly_full() -> None:
    finding = doctor._disk(pathlib.Path("/"), lambda path: (10**12, 10**12, 10**8))
    assert finding.status in ("warning", "missing") and "0.1 GB" in finding.found and finding.mend


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("0.27.0.post1", (0, 27, 0)), ("5", (5,)), ("dev", ())]
)
def test_release_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert doctor.release(text) == numbers


def test_exit_code_and_words(
    versions: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    assert "This machine can compile for cpu" in capsys.readouterr().out
    del versions["transformers"]
    assert main(["doctor", "--folder", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert (
        "cannot compile for cpu:x86-64-v3,x86-64-v4+avx512vnni yet: transformers" in text and "-> pip install" in text
    )
    assert main(["doctor", "--runtime-only", "--json", "--folder", str(tmp_path)]) == 0
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"python", "numpy", "disk"} <= {f["name"] for f in findings}
    assert "torch" not in {f["name"] for f in findings}
