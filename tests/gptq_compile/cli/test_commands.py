# SPDX-License-Identifier: Apache-2.0
"""Every command on one tiny compiled model."""

from __future__ import annotations

import json
import math
import pathlib
import signal
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

import gptq_compile
from gptq_compile.cli.main import main

ROOT = pathlib.Path(__file__).resolve().parents[3]
TEXT = "the quick brown fox jumps over the lazy dog; " * 12


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_compile_reports_plan_linears_and_result_as_events(compiled: Any) -> None:
    events = compiled.events
    plan = next(e for e in events if e["event"] == "plan")
    # Counted by hand: embedding and head 258*64 each, a layer 64*(64+32+32+64) + 3*64*128 weights and 2*64 norms.
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert plan["quantized_parameters"] == 2 * layer and plan["linears"] == 14
    assert plan["parameters"] == 2 * layer + 2 * 258 * 64 + 5 * 64
    assert plan["bytes_before"] == 2 * plan["parameters"]
    linears = [e for e in events if e["event"] == "linear"]
    assert [e["index"] for e in linears] == list(range(1, 15)) and {e["total"] for e in linears} == {14}
    assert all(0 <= e["error"] <= e["error_rtn"] * 1.001 for e in linears)
    done = events[-1]
    assert done["event"] == "done" and done["out"] == str(compiled.artifact)
    assert done["command"].startswith("gptq-compile run ")
    assert 0 < done["error"] < done["error_rtn"]
    stages = [e["name"] for e in events if e["event"] == "stage"]
    assert set(done["seconds"]) == set(stages)
    sizes = sum(p.stat().st_size for p in compiled.artifact.rglob("*") if p.is_file())
    assert done["size"] == sizes


def test_artifact_computes_what_the_dequantized_model_computes(compiled: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(0).integers(0, 256, 70)
    model = AutoModelForCausalLM.from_pretrained(compiled.dequantized, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].double().numpy()
    with gptq_compile.Engine.load(compiled.artifact) as engine:
        for step in (False, True):
            got = engine.logits(ids, step=step).astype("float64")
            assert ((got - wanted) ** 2).sum() / (wanted**2).sum() <= 1e-5


def test_run_streams_what_the_engine_generates(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(compiled.artifact), "hello", "--max-new-tokens", "12", "--ignore-eos"]
    assert main([*arguments, "--no-chat", "--tokens-per-second"]) == 0
    plain = capsys.readouterr()
    with gptq_compile.Engine.load(compiled.artifact) as engine:
        assert plain.out == engine.generate("hello", 12, eos_token_id=[]) + "\n"
        prompt = engine.chat_prompt([{"role": "user", "content": "hello"}])
        chat = engine.generate(prompt, 12, eos_token_id=[])
    assert "5 prompt tokens" in plain.err and "12 tokens at" in plain.err and "length" in plain.err
    assert main(arguments) == 0  # the chat template is the default
    assert capsys.readouterr().out == chat + "\n"
    assert main([*arguments, "--system", "be brief", "--json"]) == 0
    [answer] = lines(capsys.readouterr().out)
    assert len(answer["token_ids"]) == 12 and answer["finish_reason"] == "length"
    assert answer["prompt_tokens"] > len("hello") + len("be brief")


def test_run_samples_with_a_seed_and_stops(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*more: str) -> list[int]:
        arguments = ["run", str(compiled.artifact), "hello", "--max-new-tokens", "16", "--ignore-eos", "--json", *more]
        assert main(arguments) == 0
        [answer] = lines(capsys.readouterr().out)
        return answer["token_ids"]

    hot = ids("--temperature", "2", "--seed", "1")
    assert hot == ids("--temperature", "2", "--seed", "1")
    assert hot != ids("--temperature", "2", "--seed", "2")
    assert ids("--temperature", "0", "--seed", "3") == ids() == ids("--top-k", "1")


def test_run_reads_standard_input(
    compiled: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert main(["run", str(compiled.artifact), "-", "--no-chat", "--json", "--max-new-tokens", "2"]) == 0
    assert lines(capsys.readouterr().out)[0]["prompt_tokens"] == 5


def test_chat_keeps_the_conversation(
    compiled: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["hello", "again", "/reset", "hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    command = ["chat", str(compiled.artifact), "--max-new-tokens", "6", "--ignore-eos", "--tokens-per-second"]
    assert main(command) == 0
    printed = capsys.readouterr()
    prompts = [int(line.split()[0][1:]) for line in printed.err.splitlines() if "prompt tokens" in line]
    assert len(prompts) == 3 and prompts[0] == prompts[2] and prompts[1] > prompts[0]


def test_eval_is_the_perplexity_of_the_dequantized_model(
    compiled: Any, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    arguments = ["eval", str(compiled.artifact), "--text", str(file), "--window", "128", "--windows", "3"]
    assert main([*arguments, "--json"]) == 0
    events = lines(capsys.readouterr().out)
    assert [e["event"] for e in events] == ["window"] * 3 + ["done"]
    ids = torch.tensor(list(TEXT.encode()))  # the tokenizer's ids are those of ByteLevel's alphabet, not of the bytes
    with gptq_compile.Engine.load(compiled.artifact) as engine:
        assert engine.tokenizer is not None
        ids = torch.tensor(engine.tokenizer.encode(TEXT))
    model = AutoModelForCausalLM.from_pretrained(compiled.dequantized, dtype=torch.float32)
    total = 0.0
    for i in range(3):
        window = ids[128 * i : 128 * (i + 1)][None]
        with torch.no_grad():
            logits = model(window).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    assert events[-1]["tokens"] == 3 * 127
    assert events[-1]["perplexity"] == pytest.approx(math.exp(total / (3 * 127)), rel=1e-3)
    assert main(arguments) == 0
    assert f"perplexity {events[-1]['perplexity']:.3f}" in capsys.readouterr().out


def test_bench_tells_speed_and_first_token(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        str(compiled.artifact),
        "--batch",
        "2,1",
        "--context",
        "9999",
        "--steps",
        "4",
        "--prompt",
        "20",
    ]
    assert main([*arguments, "--json"]) == 0
    (result,) = lines(capsys.readouterr().out)
    assert [step["batch"] for step in result["steps"]] == [1, 2]
    for step in result["steps"]:
        assert step["context"] == 252  # of 256: what the steps leave
        assert step["tokens_per_second"] == pytest.approx(step["batch"] / step["seconds"]) and step["seconds"] > 0
    assert result["first_token"]["prompt"] == 20 and result["first_token"]["seconds"] > 0
    assert "kernels" not in result  # of a CPU
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "tokens/s" in said and "first token of a prompt of 20" in said


@pytest.mark.parametrize(("given", "sentence"), [(["--batch", "0"], "batch sizes"), (["--steps", "1"], "fewer than 2")])
def test_bench_refuses_what_cannot_be_timed(
    compiled: Any, capsys: pytest.CaptureFixture[str], given: list[str], sentence: str
) -> None:
    assert main(["bench", str(compiled.artifact), *given]) == 2
    assert sentence in capsys.readouterr().err


def test_inspect_tells_settings_layers_and_kernels(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(compiled.artifact), "--json", "--verify"]) == 0
    [found] = lines(capsys.readouterr().out)
    assert found["manifest"]["quantization"]["wbits"] == 4 and found["manifest"]["model"]["model_type"] == "llama"
    *linears, head = found["layers"]
    assert len(linears) == 14 and all(x["bits"] == 4 and x["group_size"] == 32 for x in linears)
    assert (head["name"], head["bits"], head["method"]) == ("lm_head.weight", 8, "rtn")
    about = ("manifest.json", "report.html")  # neither is among the listed files
    listed = sum(p.stat().st_size for p in compiled.artifact.rglob("*") if p.is_file() and p.name not in about)
    assert found["size"] == listed
    assert any(name.startswith("cpu.quant_linear") for name in found["kernels"])
    [prefill] = [c for c in found["choices"] if c["kernel"] == "cpu.quant_linear.panel"]
    assert prefill["calls"] == {"forward": 15} and len(prefill["cases"]) == 5  # linears, and their shapes
    reasons = {found["refused"][case]["cpu.quant_linear.int16"] for case in prefill["cases"]}
    assert ["cpu.quant_linear.int16", *reasons] in prefill["refused"]
    assert found["translated"]["aten.embedding.default"] == {"forward": 1, "decode_1": 1, "decode_2": 1}
    ran = compiled.events[-1]["passes"]
    assert [(p["name"], p["seconds"]) for p in found["passes"]] == [(p["name"], p["seconds"]) for p in ran]
    assert found["build"]["LegalizeOps"] > 0 < found["build"]["linking"]
    archs = [library["arch"] for library in found["manifest"]["libraries"]]
    assert archs == found["manifest"]["target"]["machine_code"] == ["x86-64-v3", "x86-64-v4+avx512vnni"]
    assert all((compiled.artifact / library["file"]).is_file() for library in found["manifest"]["libraries"])
    assert main(["inspect", str(compiled.artifact), "--layers", "3"]) == 0
    text = capsys.readouterr().out
    assert "15 in forward" in text and "pack_weights" in text and "generating code" in text
    assert "4 bits, groups of 32, asymmetric" in text and "3 worst of 15 linears" in text


def test_running_imports_neither_torch_nor_the_compiler(compiled: Any) -> None:
    code = textwrap.dedent(
        """
        import json, sys
        from gptq_compile.cli.main import main
        status = main(["run", sys.argv[1], "hi", "--max-new-tokens", "3"])
        print(json.dumps([status, sorted(sys.modules)]))
        """
    )
    command = [sys.executable, "-c", code, str(compiled.artifact)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    forbidden = {"torch", "transformers", "tvm", "safetensors", "datasets", "jinja2", "rich"}
    assert {m.split(".")[0] for m in modules} & forbidden == set()
    ours = {m.split(".")[1] for m in modules if m.startswith("gptq_compile.")}
    assert ours <= {"cli", "errors", "runtime"}


def test_dry_run_writes_nothing(compiled: Any, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    assert main([str(compiled.model), "--group-size", "32", "--dry-run", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Dry run: nothing was written." in printed and "14 linears" in printed and "4.75 bits" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_experts(save_model: Any, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    save_model(tmp_path / "model", "mixtral")
    arguments = ["--method", "rtn", "--group-size", "16", "--target", "cpu", "--dry-run", "--json"]
    assert main([str(tmp_path / "model"), *arguments, "-o", str(tmp_path / "out")]) == 0
    plan = next(e for e in lines(capsys.readouterr().out) if e["event"] == "plan")
    # Two layers: four linears of attention, and gate with up and down of the experts.
    assert plan["linears"] == 2 * 6


@pytest.mark.parametrize("how", ["interrupt", "terminate"])
def test_an_interrupted_compilation_leaves_nothing(
    how: str, compiled: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def stopped(module: Any, target: Any, out: pathlib.Path, **_: Any) -> None:
        out.write_bytes(b"half")
        if how == "terminate":
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt

    monkeypatch.setattr("gptq_compile.passes.build.build", stopped)
    out = tmp_path / "deep" / "out"
    arguments = [str(compiled.model), "--method", "rtn", "--group-size", "32", "--batch-buckets", "1"]
    assert main([*arguments, "-o", str(out)]) == (130 if how == "interrupt" else 143)
    assert "nothing half-written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
