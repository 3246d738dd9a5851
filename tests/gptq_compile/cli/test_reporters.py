# SPDX-License-Identifier: Apache-2.0
"""What is shown while a compilation runs, and after it."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any

import pytest
from rich.console import Console

from gptq_compile.cli import output, summary
from gptq_compile.cli.compile import compile_with, parser, to_options
from gptq_compile.cli.reporters import JsonReporter, PlainReporter, TerminalReporter
from gptq_compile.errors import ConfigError
from gptq_compile.options import CompileOptions


def options(*arguments: str) -> CompileOptions:
    return to_options(parser().parse_args(["org/model", *arguments]))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compilation that reports and does nothing else."""
    from gptq_compile import api
    from gptq_compile.passes.gptq_quantize import LinearReport

    def compile_model(options: CompileOptions, progress: Any, *, dry_run: bool) -> api.CompileResult:
        progress.stage("open")
        plan = api.Plan("model", "llama", 1_500_000, 512, 2, 10**6, 3 * 10**6, 10**6, 4.25, 10**7, options.as_dict())
        progress.plan(plan)
        progress.stage("quantize")
        nan = float("nan")
        reports = [
            LinearReport("a.weight", (8, 8), 4, 8, "gptq", 0.01, 0.04, 0.01, 0, None, 0.1),
            LinearReport("b.weight", (8, 8), 4, 8, "rtn", nan, nan, 0.1, 0, "Hessian [not] positive", 0.1),
        ]
        for index, report in enumerate(reports, 1):
            progress.linear(report, index, 2)
        progress.note("a [note]")
        return api.CompileResult(options.out, plan, {"open": 1.0, "quantize": 61.0}, reports, [], 10**6)

    monkeypatch.setattr(api, "compile_model", compile_model)


def test_plain_lines(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    with PlainReporter(options("-o", "out")) as report:
        assert compile_with(report.options, report, dry_run=False) == 0
    text = capsys.readouterr().out
    assert "3.0 MB in float16 -> 1.0 MB (3.00x smaller; 4.25 bits a quantized weight)" in text
    assert "2/2 b.weight: 4 bits, rounded" in text and "a [note]" in text
    assert "0.01 against 0.04 of rounding, 75% less" in text
    assert "1 linears, first b.weight: Hessian [not] positive" in text
    assert "gptq-compile run out" in text and "1 min 02 s" in text
    assert "\033" not in text and not any(line != line.rstrip() for line in text.splitlines())


def test_bars_on_a_terminal(fake: None) -> None:
    screen = io.StringIO()
    report = TerminalReporter(options("-o", "out"))
    report.console = Console(file=screen, force_terminal=True, width=110)
    report._bars.live.console = report.console
    with report:
        assert compile_with(report.options, report, dry_run=False) == 0
    text = screen.getvalue()
    assert "quantizing" in text and "a [note]" in text and "gptq-compile run out" in text


def test_events_are_json_without_nan(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    with JsonReporter(options("-o", "out")) as report:
        compile_with(report.options, report, dry_run=False)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    events = [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["stage", "plan", "stage", "linear", "linear", "note", "done"]
    assert events[4]["error"] is None and events[-1]["error"] == 0.01 and events[-1]["error_rtn"] == 0.04
    assert all(e["time"] >= 0 for e in events)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--bits", "3"], "wbits", 3),
        (["--groupsize", "64"], "group_size", 64),
        (["--sym"], "sym", True),
        (["--sym", "--asym"], "sym", False),
        (["--no-act-order"], "act_order", False),
        (["--no-desc-act"], "act_order", False),
        (["--no-act-order", "--desc-act"], "act_order", True),
        (["--no-static-groups"], "static_groups", False),
        (["--percdamp", "0.05"], "damp", 0.05),
        (["--mse"], "mse", True),
        (["--sequential", "block"], "sequential", "block"),
        (["--quantize-lm-head"], "quantize_lm_head", True),
        (["--token-weighting", "none"], "token_weighting", "none"),
        (["--method", "rtn"], "method", "rtn"),
        (["--avg-bits", "3.5"], "avg_bits", 3.5),
        (["--max-size", "90MB"], "max_size", 90_000_000),
        (["--max-size", "1.5 GiB"], "max_size", 3 << 29),
        (["--max-size", "1234"], "max_size", 1234),
        (["--max-ppl-increase", "5%"], "max_ppl_increase", 0.05),
        (["--max-ppl-increase", "0.5"], "max_ppl_increase", 0.5),
        (["--nsamples", "3", "--seqlen", "7", "--seed", "9"], "seqlen", 7),
    ],
)
def test_flags_and_their_aliases(arguments: list[str], field: str, value: object) -> None:
    assert getattr(options(*arguments).quantize, field) == value


def test_settings_that_are_not_given_keep_their_defaults() -> None:
    given = options("--nsamples", "128")
    assert given == CompileOptions(model="org/model", out=given.out)
    on_a_cpu = options("--device", "cpu").quantize  # the model writes less text for itself where that takes hours
    assert (on_a_cpu.nsamples, on_a_cpu.seqlen) == (16, 512)
    assert options("--device", "cuda").quantize == given.quantize
    assert options("--device", "cpu", "--calibration", "text.txt").quantize == given.quantize
    assert given.out == pathlib.Path("model-cpu-w4")
    assert options("--target", "cuda:sm_90", "--wbits", "3").out == pathlib.Path("model-cuda-w3")
    assert options("--avg-bits", "3.5").out == pathlib.Path("model-cpu-w3.5")
    assert options("--max-size", "90MB").out == pathlib.Path("model-cpu-90MB")
    more = options("--batch-buckets", "4,1,4", "--no-validate", "--offline", "--revision", "r", "--dtype", "float16")
    assert more.batch_buckets == (1, 4) and not more.validate and more.offline and more.revision == "r"
    assert more.dtype == "float16" and not more.trust_remote_code


def test_what_linears_multiply_depends_on_the_target() -> None:
    assert options().resolved_activations == options().as_dict()["activations"] == "int8"
    for arguments in (["--activations", "float"], ["--dtype", "float16"], ["--target", "cuda"]):
        assert options(*arguments).resolved_activations == "float"
    for arguments in (["--dtype", "float16"], ["--target", "cuda"]):
        with pytest.raises(ConfigError, match="for float32 on the CPU"):
            options("--activations", "int8", *arguments)


def test_the_cache_of_the_cpu_may_be_of_another_type() -> None:
    assert options().resolved_kv_cache == options().as_dict()["kv_cache"] == "float16"
    assert options("--dtype", "float16").resolved_kv_cache == options("--target", "cuda").resolved_kv_cache == "float16"
    assert options("--target", "cuda", "--dtype", "float32").resolved_kv_cache == "float32"
    for cache in ("float32", "float16", "int8"):
        assert options("--kv-cache", cache).resolved_kv_cache == cache
    assert options("--kv-cache", "float16", "--target", "cuda").resolved_kv_cache == "float16"
    for arguments in (["--dtype", "float16"], ["--target", "cuda"]):
        with pytest.raises(ConfigError, match="A KV cache of int8 is for float32 on the CPU"):
            options("--kv-cache", "int8", *arguments)
    with pytest.raises(ConfigError, match="the KV cache is 'int4'; use one of float32, float16, int8"):
        CompileOptions("model", pathlib.Path("out"), kv_cache="int4")


def test_numbers_for_people() -> None:
    assert [output.size(n) for n in (0, 999, 1500, 2_500_000, 3e9, 4e12)] == [
        "0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "3.0 GB", "4.0 TB",
    ]  # fmt: skip
    assert [output.duration(s) for s in (0.04, 59.9, 60, 3725)] == ["0.0 s", "59.9 s", "1 min 00 s", "1 h 02 min"]
    assert summary.mean_errors([]) is None


def test_the_next_command_can_be_pasted(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.chdir(tmp_path)
    words = shlex.split(summary.run_command(tmp_path / "a folder"))
    assert words == ["gptq-compile", "run", "a folder", "What is a compiler?"]
