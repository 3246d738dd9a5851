# SPDX-License-Identifier: Apache-2.0
"""The paper's method without our trace and passes, to measure our plain settings by: a loop over transformers modules.

Decoder layers one after the other, in each the linears in the order in which data meets them (true-sequential), every
solve by the column loop of ``solver_speed.py``: float32 Hessians that are running means over sequences, natural column
order, damp 0.01, min-max grids whose scales stay float32. Perplexity as in ``quality.py``. For models with the module
names of Llama. Each draw enters the calibration sequences in another order, which is all that differs::

    python -m benchmarks.paper_method MODEL.gguf --text wiki.test.txt --calibration ids.npy --device cuda \\
        --wbits 3 --draws 8
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.quality import sequence_order, windows_of
from benchmarks.solver_speed import plain_loop
from gptq_compile.frontend.source import load_source

STEPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class _Stop(Exception):
    pass


def layer_inputs(model: nn.Module, sequences: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """What the first decoder layer is called with: hidden states of each sequence, and the arguments all share."""
    hidden: list[Tensor] = []
    shared: dict[str, Any] = {}

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        shared.update(kwargs)
        raise _Stop

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in sequences:
        try:
            model(ids[None], use_cache=False)
        except _Stop:
            continue
    hook.remove()
    return hidden, shared


def forward(layer: nn.Module, hidden: Tensor, shared: dict[str, Any]) -> Tensor:
    out = layer(hidden, **shared)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def quantize(model: nn.Module, sequences: Tensor, wbits: int, group_size: int) -> None:
    """Replaces the weights of every linear of the decoder layers by dequantized ones."""
    hidden, shared = layer_inputs(model, sequences)
    for layer in model.model.layers:
        named = {name.rsplit(".", 1)[-1]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        for step in STEPS:
            linears = [named[name] for name in step]
            hessian = torch.zeros(linears[0].in_features, linears[0].in_features, device=hidden[0].device)
            seen = 0

            def observe(_: nn.Module, args: tuple[Tensor, ...], hessian: Tensor = hessian) -> None:
                nonlocal seen
                hessian.mul_(seen / (seen + 1))
                seen += 1
                x = args[0].reshape(-1, args[0].shape[-1]).float() * (2 / seen) ** 0.5
                hessian.addmm_(x.t(), x)

            hook = linears[0].register_forward_pre_hook(observe)
            for one in hidden:
                forward(layer, one, shared)
            hook.remove()
            dead = hessian.diagonal() == 0
            hessian.diagonal()[dead] = 1
            weight = torch.cat([m.weight for m in linears])
            weight[:, dead] = 0
            solved = plain_loop(weight, hessian, wbits, group_size)
            for m, part in zip(linears, solved.split([m.out_features for m in linears]), strict=True):
                m.weight.copy_(part)
        hidden = [forward(layer, one, shared) for one in hidden]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp(mean nll) of windows ``[count, length]``."""
    total = 0.0
    for ids in windows:
        logits = model(ids[None], use_cache=False).logits[0].float()
        total += float(nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").double())
    return float(np.exp(total / (windows.shape[0] * (windows.shape[1] - 1))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help=".npy of token ids [sequences, tokens]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wbits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--first-draw", type=int, default=0, help="draw 0 takes the sequences in their own order")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--out", type=Path, help="append one JSON line a draw")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    source = load_source(str(args.model))
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    model.load_state_dict({name: source.params.get(name).float() for name in source.params}, strict=False)
    model.tie_weights()
    model = model.eval().to(args.device)
    original = {k: v.clone() for k, v in model.state_dict().items()}
    windows = windows_of(args.text, source.tokenizer, args.windows).to(args.device)
    calibration = torch.from_numpy(np.load(args.calibration).astype(np.int64)).to(args.device)
    print(f"FP {perplexity(model, windows):.3f}", flush=True)
    for draw in range(args.first_draw, args.first_draw + args.draws):
        model.load_state_dict(original)
        start = time.perf_counter()
        quantize(model, calibration[sequence_order(draw, len(calibration))], args.wbits, args.group_size)
        seconds = time.perf_counter() - start
        line = {"method": "loop over modules", "wbits": args.wbits, "group_size": args.group_size, "draw": draw,
                "ppl": round(perplexity(model, windows), 3), "seconds": round(seconds, 1)}  # fmt: skip
        print(json.dumps(line), flush=True)
        if args.out:
            with args.out.open("a") as f:
                f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
