# SPDX-License-Identifier: Apache-2.0
"""The plan's peak against the memory that a walk really takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.host_memory import HostPeak
from gptq_compile.frontend.trace import trace
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.memory_plan import plan_memory
from gptq_compile.passes.pipeline import trace_passes
from gptq_compile.passes.program import Program
from tests.architectures import CONFIGS, param_store, tiny_config, tiny_model, traced

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def llama(**sizes: int) -> Program:
    config = tiny_config("llama")
    config.update(sizes)
    program = trace(config, param_store(type(tiny_model("llama"))(config)))
    PassManager(trace_passes(), validate=False).run(program)
    return program


def config(**settings) -> QuantizeConfig:
    return QuantizeConfig(**{"group_size": 32, "mse": False, **settings})


def measure(sequences: int, weighting: str) -> None:
    """Prints the measured and the planned peak of a walk, in bytes."""
    program = llama(hidden_size=512, intermediate_size=3072, num_hidden_layers=1, max_position_embeddings=1024)
    settings = config(token_weighting=weighting)
    ids = torch.randint(0, 250, (sequences, 512), generator=torch.Generator().manual_seed(0))
    GptqQuantize(settings, ids[:1]).run(program.clone())  # libraries take what they keep
    step = GptqQuantize(settings, ids)
    with HostPeak() as peak:
        step.run(program)
    assert step.plan is not None
    print(peak.bytes, step.plan.peak)


@pytest.mark.slow
@pytest.mark.parametrize(("sequences", "weighting"), [(36, "none"), (36, "gradient")])
def test_the_planned_peak_is_the_measured_one(sequences: int, weighting: str) -> None:
    """In a process of its own: a heap that a thousand tests have used takes more than what is asked of it."""
    code = f"from tests.passes.test_memory_plan import measure; measure({sequences}, {weighting!r})"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured, planned = map(int, done.stdout.split())
    assert measured == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2", "mixtral", "gpt2"])
def test_a_plan_is_made_for_every_kind_of_model(architecture: str) -> None:
    assert architecture in CONFIGS
    program = traced(architecture)
    for sequential in ("true", "block"):
        plan = plan_memory(program, config(sequential=sequential), 8, 64, CPU)
        assert plan.peak >= plan.activations > 0 and plan.peak >= plan.hessian > 0
        assert plan.peak == max(plan.phases.values()) and plan.host == plan.peak and not plan.offload
        assert "peak" in dict(plan.lines())
    longer = plan_memory(program, config(), 16, 64, CPU)
    assert longer.activations == 2 * plan_memory(program, config(), 8, 64, CPU).activations


def test_activations_leave_a_gpu_that_is_too_small() -> None:
    program = llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, max_position_embeddings=1024)
    roomy = plan_memory(program, config(token_weighting="none"), 64, 512, CUDA, limit=10**12)
    assert not roomy.offload and roomy.host == roomy.solutions
    tight = plan_memory(program, config(token_weighting="none"), 64, 512, CUDA, limit=roomy.peak - 1)
    assert tight.offload and tight.peak < roomy.peak
    assert tight.host == tight.solutions + tight.activations
    assert "pinned" in dict(tight.lines())["activations"]


def test_one_tape_takes_the_whole_model_where_it_fits() -> None:
    program = llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, max_position_embeddings=2048)
    program.info.config["dtype"] = "bfloat16"
    roomy = plan_memory(program, config(), 32, 2048, CUDA, limit=10**12)
    assert roomy.tape == roomy.sequences == 8 and "original forward" not in roomy.phases
    fewer = plan_memory(program, config(), 32, 2048, CUDA, limit=roomy.phases["gradients"] - 1)
    assert 0 < fewer.tape < 8 and not fewer.offload
    assert fewer.phases["gradients"] < roomy.phases["gradients"] and fewer.phases["solve"] == roomy.phases["solve"]
    none = plan_memory(program, config(token_weighting="none"), 32, 2048, CUDA, limit=10**12)
    assert none.tape == 0 and "gradients" not in none.phases
    # On a CPU, where it costs no memory.
    there = plan_memory(program, config(), 32, 128, CPU)
    assert there.tape == 1 and there.peak < plan_memory(program, config(), 64, 128, CPU).peak
