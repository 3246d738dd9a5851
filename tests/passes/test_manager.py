# SPDX-License-Identifier: Apache-2.0
"""PassManager: validation catches wrong passes, failures leave a reproducer, dumps and stop_after do what they say."""

from __future__ import annotations

import json

import pytest
import torch

from gptq_compile.errors import ModelError, PassError
from gptq_compile.passes.manager import Pass, PassManager

aten = torch.ops.aten


class Double(Pass):
    """Doubles the logits: a wrong pass unless it says that it does not preserve them."""

    name = "double"

    def run(self, program):
        out = program.graph.find_nodes(op="output")[0]
        with program.graph.inserting_before(out):
            out.args = ((program.call(aten.mul.Tensor, (program.output, 2.0)),),)
        return True


class DeclaredDouble(Double):
    name = "declared_double"
    preserves = False


class Infinite(Double):
    name = "infinite"

    def run(self, program):
        out = program.graph.find_nodes(op="output")[0]
        with program.graph.inserting_before(out):
            out.args = ((program.call(aten.div.Tensor, (program.output, 0.0)),),)
        return True


class Nothing(Pass):
    name = "nothing"

    def run(self, program):
        return False


class Raises(Pass):
    name = "raises"

    def __init__(self, error):
        self.error = error

    def run(self, program):
        raise self.error


class Refuses(Nothing):
    name = "refuses"

    def ensures(self, program):
        raise PassError("The rewrite is not complete.")


@pytest.fixture(scope="module")
def traced(request):
    from types import SimpleNamespace

    namespace: SimpleNamespace = request.getfixturevalue("small_module")
    return namespace.program(lambda p, x, _: x @ p.w, w=torch.eye(16))


@pytest.fixture
def program(traced):
    return traced.clone()


def test_a_wrong_pass_is_caught(program):
    with pytest.raises(PassError) as e:
        PassManager([Nothing(), Double()]).run(program)
    assert str(e.value) == (
        "Pass double changed what the program computes: logits differ by NMSE 1.00e+00, allowed 1e-09."
    )


def test_a_declared_change_is_measured_and_let_through(program):
    manager = PassManager([DeclaredDouble()])
    manager.run(program)
    record = manager.records[0]
    assert record.modified and record.nmse == pytest.approx(1.0)
    assert record.nodes_after == record.nodes_before + 1


def test_without_validation_nothing_is_compared(program):
    manager = PassManager([Double()], validate=False)
    manager.run(program)
    assert manager.records[0].nmse is None


def test_infinite_logits_are_refused(program):
    with pytest.raises(PassError, match=r"^After pass infinite the program's logits are not finite\.$"):
        PassManager([Infinite()]).run(program)


def test_a_crash_names_the_pass_and_leaves_a_reproducer(program, tmp_path):
    folder = tmp_path / "reproducer"
    with pytest.raises(PassError, match=r"^Pass raises failed: ZeroDivisionError: one over zero$"):
        PassManager([Nothing(), Raises(ZeroDivisionError("one over zero"))], reproducer=folder).run(program)
    assert sorted(f.name for f in folder.iterdir() if f.suffix != ".safetensors") == [
        "before.txt",
        "error.txt",
        "pipeline.json",
    ]
    assert "aten.matmul.default" in (folder / "before.txt").read_text()
    assert "ZeroDivisionError: one over zero" in (folder / "error.txt").read_text()
    summary = json.loads((folder / "pipeline.json").read_text())
    assert summary["failed"] == "raises" and summary["ran"] == ["nothing"]


def test_our_own_errors_pass_through_unchanged(program):
    with pytest.raises(ModelError, match=r"^The model is odd\.$"):
        PassManager([Raises(ModelError("The model is odd."))]).run(program)


def test_ensures_is_asked(program):
    with pytest.raises(PassError, match=r"^The rewrite is not complete\.$"):
        PassManager([Refuses()]).run(program)


def test_stop_after_dumps_and_progress(program, tmp_path):
    seen: list[str] = []
    manager = PassManager(
        [Nothing(), DeclaredDouble(), Raises(RuntimeError())],
        stop_after="declared_double",
        dump_ir=tmp_path,
        on_pass=seen.append,
    )
    manager.run(program)
    assert seen == [r.name for r in manager.records] == ["nothing", "declared_double"]
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "00_input.txt",
        "01_after_nothing.txt",
        "02_after_declared_double.txt",
    ]
    assert "2.0)" not in (tmp_path / "01_after_nothing.txt").read_text()
    assert "aten.mul.Tensor(%index_select, 2.0)" in (tmp_path / "02_after_declared_double.txt").read_text()


def test_stop_after_an_unknown_pass_lists_the_known(program):
    with pytest.raises(PassError, match=r"^There is no pass called 'twice'\. The pipeline has: nothing, double\.$"):
        PassManager([Nothing(), Double()], stop_after="twice").run(program)
