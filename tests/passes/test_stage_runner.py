# SPDX-License-Identifier: Apache-2.0
"""Batches of sequences, half precision and several processes must not change what the walk computes."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from gptq_compile.errors import ConfigError
from gptq_compile.frontend.trace import trace
from gptq_compile.passes import memory_plan
from gptq_compile.passes.budget import BudgetedQuantize
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.program import Program
from gptq_compile.passes.stage_runner import compute_dtype, sequences_per_call
from tests.architectures import param_store, tiny_config, tiny_model, traced

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def calibration() -> torch.Tensor:
    return torch.randint(0, 250, (7, 40), generator=torch.Generator().manual_seed(5))


def quantize(program: Program, **settings) -> tuple[dict[str, torch.Tensor], GptqQuantize]:
    program = program.clone()
    step = GptqQuantize(QuantizeConfig(group_size=32, **settings), calibration())
    step.run(program)
    return {name: program.params.get(name) for name in program.params if name.endswith((".codes", ".scales"))}, step


@pytest.fixture(scope="module", params=["llama", "gemma2"])  # gemma2: windows and capped scores, sequence by sequence
def program(request: pytest.FixtureRequest) -> Program:
    return traced(request.param)


@pytest.mark.parametrize("sequential", ["true", "block"])
def test_batches_give_the_codes_of_single_sequences(
    program: Program, sequential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    single, _ = quantize(program, sequential=sequential)
    monkeypatch.setattr(memory_plan, "sequences_per_call", lambda *_: 3)
    batched, step = quantize(program, sequential=sequential)
    for name, tensor in single.items():
        assert float((batched[name] != tensor).float().mean()) < 0.005, name  # ties only
    assert step.seconds["forward"] > 0 and step.seconds["update"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_quantizes_as_well(program: Program, dtype: str) -> None:
    _, full = quantize(program)
    _, half = quantize(program, compute_dtype=dtype)
    for a, b in zip(full.reports, half.reports, strict=True):
        assert a.name == b.name and b.error == pytest.approx(a.error, rel=0.1)


def test_a_gpu_runs_in_the_type_that_the_config_names(program: Program) -> None:
    named = program.clone()
    named.info.config["dtype"] = "bfloat16"
    config = QuantizeConfig()
    assert compute_dtype(config, named, CUDA) == torch.bfloat16
    assert compute_dtype(config, named, CPU) == torch.float32
    named.info.config["dtype"] = "float32"
    assert compute_dtype(config, named, CUDA) == torch.float32
    assert compute_dtype(QuantizeConfig(compute_dtype="float16"), named, CPU) == torch.float16
    with pytest.raises(ConfigError, match="compute_dtype is 'int8'"):
        QuantizeConfig(compute_dtype="int8")


def test_tracing_leaves_the_type_that_the_config_names() -> None:
    config = tiny_config("llama")
    config.dtype = torch.bfloat16
    program = trace(config, param_store(tiny_model("llama")))
    assert program.info.config["dtype"] == "bfloat16" and config.dtype == torch.bfloat16


def test_only_gpus_run_several_sequences_in_a_call(program: Program) -> None:
    assert sequences_per_call(program, CPU, 2048) == 1
    assert sequences_per_call(program, CUDA, 2048) == 8
    assert sequences_per_call(program, CUDA, 100_000) == 1


def _process(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    codes, step = quantize(traced("llama"))
    assert step.world.rank == rank and step.world.size == 2
    program = traced("qwen3_moe")
    config = QuantizeConfig(group_size=32, avg_bits=4.0, token_weighting="none")
    calibration = torch.randint(0, 250, (12, 48), generator=torch.Generator().manual_seed(5))
    BudgetedQuantize(config, calibration).run(program)
    names = [name for name in program.param_nodes if name.endswith(".codes")]
    bits = {entry["name"]: (entry["bits"], entry["method"]) for entry in program.attrs["quantization"]}
    torch.save((codes, {name: program.params.get(name) for name in names}, bits), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """What each of two processes quantized: llama, then qwen3_moe with a budget."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_process, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_give_the_codes_of_one(of_two_processes: list[tuple]) -> None:
    alone, _ = quantize(traced("llama"))
    first, second = (codes for codes, _, _ in of_two_processes)
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        assert float((first[name] != tensor).float().mean()) < 0.005, name  # ties only


def test_two_processes_agree_on_bits_and_on_experts(of_two_processes: list[tuple]) -> None:
    (_, first, bits), (_, second, others) = of_two_processes
    assert bits == others and len({b for b, _ in bits.values()}) > 1
    assert any(method == "gptq" for name, (_, method) in bits.items() if "experts" in name)
    assert first.keys() == second.keys()
    assert all(torch.equal(codes, second[name]) for name, codes in first.items())
