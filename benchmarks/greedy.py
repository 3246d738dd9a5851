# SPDX-License-Identifier: Apache-2.0
"""Greedy generation of an artifact against Hugging Face with the same dequantized weights.

For each prompt both generate greedily. The two agree if the tokens are identical, or if at the first difference each
side's token is among the other's five best and the two logits are less than GAP apart in both models' eyes. What the
artifact saw are the log-probabilities of the same generation, whose differences are those of its logits::

    python benchmarks/greedy.py ARTIFACT DEQUANTIZED --prompts 32 --tokens 64 --batch 1 8
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptq_compile.runtime.engine import Engine

PROMPTS = (
    "The history of the Roman empire", "Once upon a time there was a", "In mathematics, a prime number is",
    "The best way to learn a language is", "Water boils at", "def fibonacci(n):", "The capital of Japan is",
    "Climate change affects", "A recipe for chocolate cake:", "The theory of relativity", "Dear Sir or Madam,",
    "The stock market crashed in", "To install the package, run", "Shakespeare wrote", "The human heart",
    "My favourite animal is the", "Photosynthesis is the process by which", "The first man on the moon",
    "SELECT name FROM users WHERE", "The river Nile flows", "Music is", "In 1492, Columbus", "The speed of light",
    "Democracy is a form of", "She opened the door and", "The largest planet in the solar system",
    "How to tie a tie: first,", "Electric cars are", "The Great Wall of China", "An atom consists of",
    "The internet was invented", "Good morning! Today we will",
)  # fmt: skip


def compare(model: Any, prompt: list[int], mine: list[int], seen: Any, device: str) -> dict[str, Any]:
    """Compares one generation with the reference's own greedy choice at every step; see the module.

    Up to the first difference the reference would have seen the same tokens, so one forward pass over the artifact's
    tokens gives what it would have generated.

    Args:
        model: the reference. ``device``: where it is.
        prompt: token ids. ``mine``: what the artifact generated from them.
        seen: of each token that it generated, its log-probabilities (`TokenLogprob`).
    """
    with torch.no_grad():
        logits = (
            model(torch.tensor([prompt + mine], device=device)).logits[0, len(prompt) - 1 : -1].float().cpu().numpy()
        )
    theirs = logits.argmax(-1)
    differ = np.flatnonzero(theirs != np.array(mine))
    if not len(differ):
        return {"equal": True}
    at = int(differ[0])
    a, b, own = mine[at], int(theirs[at]), dict(seen[at].top)
    top5 = b in own and a in np.argsort(logits[at])[-5:]
    gaps = [own[a] - own.get(b, -np.inf), float(logits[at, b] - logits[at, a])]
    return {"equal": False, "at": at, "gap": max(gaps), "gaps": gaps, "top5": bool(top5)}


def generate(engine: Engine, prompts: list[list[int]], batch: int, tokens: int, **options: Any) -> list[Any]:
    """The result for each prompt, ``batch`` of them at a time."""
    options |= {"max_new_tokens": tokens, "eos_token_id": [], "return_dict_in_generate": True}
    return [r for i in range(0, len(prompts), batch) for r in engine.generate(prompts[i : i + batch], **options)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("dequantized", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--gap", type=float, default=1e-2)
    parser.add_argument("--device", default="cpu", help="where the reference runs, in float32")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine.load(args.artifact, max_batch=max(args.batch))
    tokenizer = AutoTokenizer.from_pretrained(args.dequantized)
    model = AutoModelForCausalLM.from_pretrained(args.dequantized, dtype=torch.float32).to(args.device).eval()
    prompts = [tokenizer(p).input_ids for p in PROMPTS[: args.prompts]]
    failed = 0
    for batch in args.batch:
        start = time.perf_counter()
        mine = [r.token_ids for r in generate(engine, prompts, batch, args.tokens)]
        seconds = time.perf_counter() - start
        seen = generate(engine, prompts, batch, args.tokens, logprobs=5)
        if any(r.token_ids != m for r, m in zip(seen, mine, strict=True)):
            raise SystemExit(f"At batch {batch} the artifact generated other tokens the second time.")
        rows = [compare(model, p, m, s.logprobs, args.device) for p, m, s in zip(prompts, mine, seen, strict=True)]
        differ = [r for r in rows if not r["equal"]]
        bad = [r for r in differ if not (r["top5"] and r["gap"] < args.gap)]
        failed += len(bad)
        summary = {
            "artifact": args.artifact.name, "batch": batch, "prompts": len(prompts),
            "identical": len(rows) - len(differ),
            "within_rule": len(rows) - len(bad), "largest_gap": max((r["gap"] for r in differ), default=0.0),
            "bad": bad[:4], "tokens_per_second": round(len(prompts) * args.tokens / seconds, 1),
        }  # fmt: skip
        print(json.dumps(summary), flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
