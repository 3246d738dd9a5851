# SPDX-License-Identifier: Apache-2.0
"""Arguments that every command shares which loads an artifact and generates."""

from __future__ import annotations

import argparse
import gc
import os
from typing import Any

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import RequestError
from gptq_compile.runtime.sequence import GenerationResult

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sampling settings; what is not given stays None and comes from the model's generation config."""
    group = parser.add_argument_group(
        "generation",
        "Greedy, unless the model's authors recommend sampling (generation_config.json) or one of\n"
        "--temperature, --top-k, --top-p and --min-p asks for it. --temperature 0 is greedy.",
    )
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens (default: 256)")
    group.add_argument("--temperature", type=float, metavar="F", help="divides the logits; 0 is greedy")
    group.add_argument("--top-k", type=int, metavar="N", help="sample from the N most likely tokens; 0 is all")
    group.add_argument("--top-p", type=float, metavar="F", help="sample from the tokens that together reach this")
    group.add_argument("--min-p", type=float, metavar="F", help="drop tokens less likely than F times the most likely")
    group.add_argument("--repetition-penalty", type=float, metavar="F", help="1 is off")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text (default: 0)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be given several times")
    group.add_argument("--ignore-eos", action="store_true", help="do not end at the model's end token")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds where and how the artifact is loaded."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", metavar="D", help="cpu, cuda or cuda:1 (default: what it was compiled for)")
    group.add_argument("--cache-tokens", type=int, metavar="N", help="size of the KV cache (default: the context)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument(
        "--no-verify", dest="verify", action="store_false", help="check the sha256 of the libraries only"
    )


def load_engine(arguments: argparse.Namespace, max_batch: int = 1) -> Engine:
    """Loads the artifact.

    Raises:
        RuntimeFailure: if it is damaged or does not run here.
    """
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise RequestError(f"threads is {arguments.threads}; it must be 1 or more.")
        os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    engine = Engine.load(
        arguments.artifact, arguments.device, max_batch, cache_tokens=arguments.cache_tokens, verify=arguments.verify
    )
    gc.freeze()  # what is there now stays to the end, and need not be looked through
    gc.enable()
    return engine


def settings(engine: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    """``Engine.generate``'s settings: what was given, else the model's defaults, else its own."""
    defaults = engine.generation_defaults
    given = {k: getattr(arguments, k) for k in (*_SAMPLING, "repetition_penalty") if getattr(arguments, k) is not None}
    sampling = any(k in given for k in _SAMPLING) or bool(defaults.get("do_sample", False))
    chosen: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
    for name in (*_SAMPLING, "repetition_penalty"):
        value = given.get(name, defaults.get(name))
        if isinstance(value, int | float) and (sampling or name == "repetition_penalty"):
            chosen[name] = value
    if chosen.get("temperature") == 0:
        sampling = False
        for name in _SAMPLING:
            chosen.pop(name, None)
    chosen["do_sample"] = sampling
    if arguments.stop:
        chosen["stop"] = arguments.stop
    if arguments.ignore_eos:
        chosen["eos_token_id"] = []
    return chosen


def speed_line(result: GenerationResult, device: str) -> str:
    """One line on what was generated and how fast."""
    return (
        f"[{result.prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s, {len(result.token_ids)} tokens at "
        f"{result.tokens_per_second:.1f} tokens/s on {device}; ended by {result.finish_reason}]"
    )
