# SPDX-License-Identifier: Apache-2.0
"""Checks any artifact on the machine it is for, and times it; for GPUs, where the test suite does not run.

    python tests/runtime/check_artifact.py OUT [--device cuda] [--tokens 64] [--prompt TEXT]

Holds: prefill and token-by-token logits agree, a batch of n gives n singles, the same seed gives the same tokens, steps
in flight and CUDA graphs give the tokens of direct calls, every page comes back. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
import time
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from gptq_compile.runtime.engine import Engine

log = logging.getLogger("check_artifact")


def near_greedy(engine: Engine, prompt: list[int], ours: list[int], theirs: list[int], gap: float) -> bool:
    """Whether two greedy continuations agree, or differ first where the two tokens' logits are closer than ``gap``."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if same is None:
        return len(ours) == len(theirs)
    row = engine.logits(prompt + ours[:same])[-1]
    return bool(abs(row[ours[same]] - row[theirs[same]]) < gap)


def check(engine: Engine, prompt: str, tokens: int, steps: int, gap: float) -> dict[str, Any]:
    """Runs every check; returns the figures."""
    rng = np.random.default_rng(0)
    vocab = engine.manifest.vocab_size
    ids = engine.tokenizer.encode(prompt) if engine.tokenizer else rng.integers(0, vocab, 20).tolist()
    found: dict[str, Any] = {"device": engine.device, "context": engine.context_length}
    pages = engine.cache.free_pages

    # Decoding kernels read pages that prefill wrote and the other way round.
    text = (ids * (1 + steps // len(ids)))[: min(steps, engine.context_length)]
    a, b = engine.logits(text), engine.logits(text, step=True)
    if not np.isfinite(a).all():
        raise AssertionError("logits are not finite")
    found["prefill_vs_step_nmse"] = float(((a - b) ** 2).mean() / (a**2).mean())
    found["nll_mean"] = float(engine.nll(text).mean())

    options: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": [], "return_dict_in_generate": True}
    lengths = [1, 15, 16, 17, len(ids), 33, 64, 100]
    prompts = [(ids * 100)[: min(n, engine.context_length // 2)] for n in lengths]
    batch = engine.generate(prompts, **options)
    singles = [engine.generate(p, **options) for p in prompts]
    found["batch_equals_singles"] = [x.token_ids == y.token_ids for x, y in zip(batch, singles, strict=True)]
    for p, x, y in zip(prompts, batch, singles, strict=True):
        if not near_greedy(engine, p, x.token_ids, y.token_ids, gap):
            raise AssertionError("a batch differs from singles by more than rounding")

    sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02}
    sampled |= {"repetition_penalty": 1.1, **options}
    runs = [engine.generate(ids, seed=s, **sampled).token_ids for s in (1, 1, 2)]
    if runs[0] != runs[1]:
        raise AssertionError("the same seed gave other tokens")
    found["seeds_differ"] = runs[0] != runs[2]

    capture = engine._device.capture
    graphs = [g for b in engine.scheduler._batches.values() for g in b._graphs.values()]
    found["graphs"] = [g.nodes for g in graphs if g is not None]
    if engine.manifest.target_kind == "cuda" and (not graphs or None in graphs):
        raise AssertionError("a decode step was not captured")
    with_graphs = engine.generate(prompts, **options)
    engine.close()
    engine._device.capture = lambda run: None  # type: ignore[method-assign]
    direct = engine.generate(prompts, **options)
    engine.close()
    engine._device.capture = capture  # type: ignore[method-assign]
    if [r.token_ids for r in with_graphs] != [r.token_ids for r in direct]:
        raise AssertionError("graphs give other tokens than direct calls")

    for size in (1, max(engine.manifest.decode)):
        engine.generate([ids] * size, **options)
        began = time.perf_counter()
        results = engine.generate([ids] * size, **options)
        found[f"batch_{size}"] = {
            "seconds": round(time.perf_counter() - began, 4),
            "decode_tokens_per_second": round(sum(r.tokens_per_second for r in results), 1),
            "first_token_seconds": round(max(r.prefill_seconds for r in results), 4),
        }
    if engine.tokenizer is not None:
        found["text"] = singles[4].text[:200]
        pieces = list(engine.generate(prompt, tokens, stream=True))
        if "".join(pieces) != engine.generate(prompt, tokens):
            raise AssertionError("streamed text differs")
    if engine.cache.free_pages != pages:
        raise AssertionError(f"{pages - engine.cache.free_pages} cache pages were lost")
    return found


def main() -> None:
    """Parses the command line, checks, and writes the figures to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=pathlib.Path)
    parser.add_argument("--device")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150, help="tokens whose logits are compared, prefill with steps")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--gap", type=float, default=1e-2, help="largest logit gap that counts as rounding")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    began = time.perf_counter()
    with Engine.load(arguments.artifact, arguments.device) as engine:
        loaded = time.perf_counter() - began
        found = check(engine, arguments.prompt, arguments.tokens, arguments.steps, arguments.gap)
    sys.stdout.write(json.dumps({"load_seconds": round(loaded, 2), **found}) + "\n")


if __name__ == "__main__":
    main()
