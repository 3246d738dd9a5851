# SPDX-License-Identifier: Apache-2.0
"""Perplexity of quantized models, by the protocol of the GPTQ papers' tables on a text of your choice.

Evaluation: the first WINDOWS non-overlapping windows of 1,024 tokens, no BOS; each window scores its tokens 1..1023;
perplexity is exp(mean negative log-likelihood). Runs the traced program's reference ops (no TVM needed) on CPU or GPU::

    python benchmarks/quality.py MODEL --text wiki.test.txt --calibration ids.npy --device cuda \\
        --setting wbits=4 group_size=128 act_order=false token_weighting=none \\
        --setting wbits=4 group_size=128 tune_epochs=4 tune_nsamples=192

Besides the fields of QuantizeConfig a setting takes ``draw`` (another order of the calibration sequences), ``scales``
and ``rounded_rows`` (see ``as_reference``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from gptq_compile.frontend.source import load_source
from gptq_compile.frontend.trace import trace
from gptq_compile.passes.budget import BudgetedQuantize
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.solution import RowErrors
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.interpret import Interpreter
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pipeline import trace_passes
from gptq_compile.passes.program import Program
from gptq_compile.passes.tune_scales import TuneScales
from gptq_compile.self_text import text_to_tune_on


@torch.no_grad()
def perplexity(program: Program, windows: torch.Tensor, device: str) -> float:
    """exp(mean nll) of windows ``[count, length]``."""
    interpreter = Interpreter(program, device, torch.float32)
    loaded: dict[Any, Any] = {}
    for node in program.param_nodes.values():
        loaded[node] = interpreter.param(node)
    for node in list(program.graph.nodes):  # dequantize once, not once a window
        if node.target is torch.ops.gptq_compile.quant_linear.default:
            from gptq_compile.passes.dialect import dequantize

            x, codes, scales, zeros, g_idx, bias, bits, group = node.args
            get = lambda n: None if n is None else loaded[n]  # noqa: E731
            weight = dequantize(loaded[codes], loaded[scales], get(zeros), get(g_idx), bits, group)
            with program.graph.inserting_before(node):
                name = f"dequantized.{codes.meta['param']}"
                holder = program.add_param(name, weight.to("meta"))
                args = (x, holder) if bias is None else (x, holder, bias)
                new = program.call(torch.ops.aten.linear.default, args, like=node)
            loaded[holder] = weight
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)
    total, count = 0.0, 0
    inputs = {n.name: n for n in program.inputs}
    for ids in windows.to(device):
        n = ids.numel()
        span = torch.arange(n, device=device)
        env = {**loaded, inputs["input_ids"]: ids[None], inputs["position_ids"]: span[None], inputs["logit_rows"]: span}
        logits = interpreter.run(env, [program.output])[program.output][0].float()
        total += float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").double())
        count += n - 1
    return float(np.exp(total / count))


@contextlib.contextmanager
def as_reference(scales: str, rounded_rows: bool) -> Iterator[None]:
    """Undoes, for comparison with the paper's code, two things that it does not do.

    Args:
        scales: ``up`` (float16, rounded up: ours), ``nearest`` (float16) or ``exact`` (float32, as the reference).
        rounded_rows: keep round-to-nearest codes in rows where they are better (ours).
    """
    from gptq_compile.passes.gptq import grid, solver

    rounding = {"up": grid.to_fp16_up, "nearest": grid.to_fp16_nearest, "exact": lambda s: s.clamp(min=1e-12)}[scales]
    keep = solver._keep_better
    if not rounded_rows:

        def keep(solution: Any, error: Any, baseline: Any, error_rtn: Any, energy: Any) -> Any:
            none = torch.zeros_like(energy, dtype=torch.bool)
            return solution, RowErrors(error, error_rtn, energy, none)

    with mock.patch.object(grid, "to_fp16_up", rounding), mock.patch.object(solver, "_keep_better", keep):
        yield


def parse_setting(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` words as a dict; values are JSON, or strings."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            out[key] = json.loads(value)
        except json.JSONDecodeError:
            out[key] = value
    return out


def windows_of(text: Path, tokenizer: Any, count: int) -> torch.Tensor:
    """The first ``count`` windows of 1,024 tokens of a text, int64 ``[count, 1024]``."""
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[: count * 1024].reshape(count, 1024)


def sequence_order(draw: int, count: int) -> torch.Tensor:
    """The order of ``count`` calibration sequences in a draw; draw 0 leaves them as they are."""
    return torch.arange(count) if draw == 0 else torch.randperm(count, generator=torch.Generator().manual_seed(draw))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help=".npy of token ids [sequences, tokens]")
    parser.add_argument("--rows", type=int, default=None, help="use only the first ROWS calibration sequences")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--setting", nargs="*", action="append", default=[])
    parser.add_argument("--settings-file", type=Path, help="one setting a line")
    parser.add_argument("--out", type=Path, help="append one JSON line a setting")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    source = load_source(args.model)
    tokenizer = source.tokenizer
    windows = windows_of(args.text, tokenizer, args.windows)
    calibration = torch.from_numpy(np.load(args.calibration).astype(np.int64))[: args.rows]
    start = time.perf_counter()
    for name in list(source.params):  # every setting reads every weight, so hold them where they are used
        source.params.set(name, source.params.get(name).to(args.device))
    print(f"read in {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    base = trace(source.config, source.params, name=source.name)
    PassManager(trace_passes(), validate=False).run(base)
    print(f"traced in {time.perf_counter() - start:.1f} s", flush=True)
    settings = [parse_setting(s) for s in args.setting]
    if args.settings_file:
        settings += [
            parse_setting(line.split()) for line in args.settings_file.read_text().splitlines() if line.strip()
        ]
    print(f"FP {perplexity(base.clone(), windows, args.device):.3f}", flush=True)
    texts: dict[tuple[int, int], torch.Tensor] = {}
    for setting in settings:
        program = base.clone()
        start = time.perf_counter()
        options = {k: v for k, v in setting.items() if k not in ("scales", "rounded_rows", "draw")}
        ids = calibration[sequence_order(setting.get("draw", 0), len(calibration))]
        config = QuantizeConfig(**options)
        # Sizes in bytes depend on a target; an average of bits does not.
        make = BudgetedQuantize if config.avg_bits is not None else GptqQuantize
        step = make(config, ids, args.device)
        with as_reference(setting.get("scales", "up"), setting.get("rounded_rows", True)):
            step.run(program)
        seconds = time.perf_counter() - start
        solve = sum(r.seconds for r in step.reports)
        note = partial(print, flush=True)
        tokens = calibration
        if config.tune_nsamples:
            key = (config.tune_nsamples, config.seed + config.nsamples)
            if key not in texts:
                texts[key] = torch.from_numpy(text_to_tune_on(source, config, calibration.shape[1], args.device, note))
            tokens = torch.cat([calibration, texts[key]])
        tune = TuneScales(step.config, base, tokens, args.device, note)
        tune.run(program)
        tuning = round(time.perf_counter() - start - seconds, 1)
        ppl = perplexity(program, windows, args.device)
        line = {
            **setting,
            "ppl": round(ppl, 3),
            "seconds": round(seconds, 1),
            "solve": round(solve, 1),
            **({"tuning": tuning} if step.config.tune_epochs else {}),
        }
        print(json.dumps(line), flush=True)
        if args.out:
            with args.out.open("a") as f:
                f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
