# SPDX-License-Identifier: Apache-2.0
"""One artifact holds code for several processors; the best that runs here is taken."""

from __future__ import annotations

import pathlib
from types import ModuleType

import pytest

from gptq_compile.runtime import processor
from gptq_compile.runtime.device import open_device
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import ArtifactError, DeviceError

V2 = "sse4_2 ssse3 popcnt cx16"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
ARCHS = ["x86-64-v3", "x86-64-v4+avx512vnni"]


class Machine:
    """Pretends to be another machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
        self._monkeypatch, self._file = monkeypatch, folder / "cpuinfo"
        monkeypatch.setattr(processor, "CPUINFO", str(self._file))

    def be(self, flags: str, name: str = "x86_64") -> None:
        self._monkeypatch.setattr(processor.platform, "machine", lambda: name)
        key = "Features" if name == "aarch64" else "flags"
        self._file.write_text(f"processor\t: 0\n{key}\t\t: fpu {flags}\n\nprocessor\t: 1\n{key}\t\t: nothing\n")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [(V3, ARCHS[0]), (V4, ARCHS[0]), (f"{V4} avx512_vnni", ARCHS[1]), (f"{V3} avx512_vnni", ARCHS[0])],
)
def test_the_last_that_runs_is_taken(machine: Machine, flags: str, chosen: str) -> None:
    machine.be(flags)
    assert processor.choose(ARCHS) == chosen
    assert open_device(None, "cpu", ARCHS)[0] == "cpu"


def test_a_processor_without_avx2_is_refused(machine: Machine) -> None:
    machine.be(f"{V2} avx")
    with pytest.raises(DeviceError, match=r"compiled for x86-64-v3 processors, .* lacks avx2, bmi1.*cpu:x86-64-v2"):
        open_device(None, "cpu", ARCHS)
    assert processor.choose(["x86-64-v2"]) == "x86-64-v2"


def test_one_can_be_asked_for(machine: Machine) -> None:
    machine.be(f"{V4} avx512_vnni")
    assert processor.choose(ARCHS, ARCHS[0]) == ARCHS[0]
    with pytest.raises(DeviceError, match=r"no code for x86-64-v4\. It has code for x86-64-v3, x86-64-v4\+avx512vnni"):
        open_device("cpu:x86-64-v4", "cpu", ARCHS)
    machine.be(V3)
    with pytest.raises(DeviceError, match=r"lacks avx512f, .*avx512_vnni\. Use one of x86-64-v3"):
        open_device(f"cpu:{ARCHS[1]}", "cpu", ARCHS)


def test_other_machines(machine: Machine) -> None:
    machine.be("asimd", "aarch64")
    with pytest.raises(DeviceError, match="compiled for x86-64, and this machine is aarch64"):
        processor.choose(ARCHS)
    arm = ["aarch64", "aarch64+dotprod"]
    assert processor.choose(arm) == "aarch64"
    machine.be("asimd asimddp", "aarch64")
    assert processor.choose(arm) == "aarch64+dotprod"
    machine.be(V3)
    with pytest.raises(DeviceError, match="compiled for aarch64, and this machine is x86_64"):
        processor.choose(arm)
    with pytest.raises(DeviceError, match="names no processor"):
        processor.choose([])


def test_what_cannot_be_judged_is_only_taken_where_nothing_else_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    machine.be(V3)
    assert processor.choose(["znver4"]) == "znver4"
    assert processor.choose(["x86-64-v3", "znver4"]) == "x86-64-v3"
    assert processor.choose(["x86-64-v3", "znver4"], "znver4") == "znver4"
    monkeypatch.setattr(processor, "CPUINFO", str(tmp_path / "nothing"))
    assert processor.choose(ARCHS) == "x86-64-v3"


def test_the_engine_loads_what_was_chosen(copy: pathlib.Path, toy: ModuleType, machine: Machine) -> None:
    data = toy.manifest()
    data["target"]["archs"] = ["x86-64-v2", "x86-64-v3"]
    data["libraries"] = [{"arch": "x86-64-v2", "file": "model.so"}, {"arch": "x86-64-v3", "file": "model.v3.so"}]
    (copy / "model.v3.so").write_text("no library")
    toy.write_manifest(copy, data)
    machine.be(V2)
    with Engine.load(copy, cache_tokens=96) as engine:
        assert engine.device == "cpu (x86-64-v2)"
    machine.be(V3)
    with pytest.raises(ArtifactError, match=r"model\.v3\.so does not load"):
        Engine.load(copy, cache_tokens=96)
    with Engine.load(copy, "cpu:x86-64-v2", cache_tokens=96) as engine:
        assert engine.generate([5, 6], max_new_tokens=2, return_dict_in_generate=True).token_ids
    data["libraries"][1]["file"] = "model.v4.so"
    toy.write_manifest(copy, data)
    with pytest.raises(ArtifactError, match=r"libraries\[1\]\.file is 'model\.v4\.so', which is not in the list"):
        Engine.load(copy)
