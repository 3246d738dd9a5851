# SPDX-License-Identifier: Apache-2.0
"""A compiled model as a model of EleutherAI's lm-evaluation-harness; needs the extra ``eval``.

The harness has no plug-ins for models, so its command must be started through this module, which registers ours first:
``python -m gptq_compile.lm_eval run --model gptq-compile --model_args path=OUT --tasks ...``.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from gptq_compile.errors import ConfigError
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.manifest import read_manifest

NAME = "gptq-compile"


@register_model(NAME)
class CompiledLM(TemplateLM):
    """Scores and continues with an engine; requests are encoded as the harness's ``hf`` model does."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        cache_tokens: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Loads an artifact, or takes an engine that is loaded.

        Args:
            path: the artifact.
            device: as of ``Engine.load``; one of another kind than the artifact's is not used.
            batch_size: most sequences that generate together; by default as many as the artifact can.
            max_batch_size: not used; the harness gives it to every model.
            max_length: most tokens of context and continuation; by default the model's context.
            max_gen_toks: tokens to generate where a task does not say.
            cache_tokens: as of ``Engine.load``.
            engine: used instead of ``path``.

        Raises:
            ConfigError: if neither is given.
        """
        super().__init__()
        if engine is None:
            if path is None:
                raise ConfigError("The model needs the folder of a compiled model: --model_args path=OUT.")
            manifest = read_manifest(pathlib.Path(path) / "manifest.json")
            wanted = str(batch_size)
            rows = int(wanted) if wanted.isdigit() and int(wanted) > 0 else max(manifest.decode)  # else it is "auto"
            # The harness says cuda:0 where nobody chose, whatever the artifact was compiled for.
            device = device if str(device).partition(":")[0] == manifest.target_kind else None
            engine = Engine.load(path, device, rows, cache_tokens)
        if engine.tokenizer is None:
            raise ConfigError("This artifact has no tokenizer, so no task can be run on it.")
        self.engine, self._tokenizer = engine, engine.tokenizer
        self.max_length = min(max_length or engine.context_length, engine.context_length)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The model's first end token."""
        ends = self.engine.manifest.eos_token_ids
        if not ends:
            raise ConfigError("This model has no end token, which tasks without a context need.")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with."""
        first = self.engine.manifest.bos_token_id
        return first if first is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the artifact in the harness's cache."""
        return self.engine.manifest.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; the model's first token is put in front unless it may not be."""
        return self._tokenizer.encode(string, add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation."""
        return self.engine.chat_prompt(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Marks in the harness's cache that a template was used; what it is stands in the artifact."""
        return f"{self.tokenizer_name}'s own" if chat_template else None

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Equal contexts after each other, so that their pages are still there.
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        for i in tqdm(order, desc="Scoring", disable=disable_tqdm):
            _texts, context, continuation = requests[i]
            if not continuation:
                continue
            ids = (context + continuation)[-(self.max_length + 1) :]
            likelihood, best = self.engine.score(ids, max(1, len(ids) - len(continuation)))
            results[i] = (float(likelihood.sum()), bool(best.all()))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context that overlap by one token."""
        results = []
        for request in tqdm(requests, desc="Scoring", disable=disable_tqdm):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            pieces = [(("", ""), *utils.make_disjoint_window(window)) for window in windows]
            results.append(float(np.sum([s for s, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True)])))
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts; those with equal settings run together."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for members in groups.values():
                settings = self._generation(requests[members[0]].args[1])
                room = self.max_length - settings["max_new_tokens"]
                if room < 1:
                    new = settings["max_new_tokens"]
                    raise ConfigError(f"A task asks for {new} new tokens, and the context is {self.max_length}.")
                prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
                for i, text in zip(members, self.engine.generate(prompts, **settings), strict=True):
                    results[i] = text
                bar.update(len(members))
        return results

    def _generation(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``Engine.generate``'s settings from a task's ``generation_kwargs``."""
        until = given.get("until") or []
        temperature = float(given.get("temperature") or 0.0)
        sample = bool(given.get("do_sample", temperature > 0)) and temperature > 0
        settings: dict[str, Any] = {
            "max_new_tokens": int(given.get("max_gen_toks") or given.get("max_new_tokens") or self.max_gen_toks),
            "stop": [u for u in ([until] if isinstance(until, str) else until) if u],
            "do_sample": sample,
        }
        if sample:
            settings["temperature"] = temperature
            settings |= {k: given[k] for k in ("top_k", "top_p", "min_p", "repetition_penalty", "seed") if k in given}
        return settings


def evaluate(
    model: CompiledLM,
    tasks: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Runs tasks; returns the harness's results.

    Args:
        model: the model.
        tasks: names, or paths of YAML files.
        include_path: a folder with more tasks.
        num_fewshot: examples in the context; None for what each task says.
        limit: documents of each task, or a share of them below 1.
        chat: put contexts into the model's chat template.

    Raises:
        ConfigError: if a task does not exist.
    """
    # Reading the harness's own thousands of tasks takes seconds, and a folder of one's own often has all of them.
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and _unknown(manager, tasks):
        manager = TaskManager(include_path=include_path)
    missing = _unknown(manager, tasks)
    if missing:
        raise ConfigError(f"There is no task {', '.join(missing)}; `lm_eval ls tasks` lists them.")
    results = simple_evaluate(
        model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, apply_chat_template=chat, task_manager=manager,
        bootstrap_iters=1000, log_samples=False,
    )  # fmt: skip
    assert results is not None  # it is None only in processes other than the first
    return dict(results)


def _unknown(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    return [t for t in tasks if not manager.match_tasks([t]) and not os.path.isfile(t)]


def table(results: Mapping[str, Any]) -> str:
    """The harness's table of results."""
    return str(utils.make_table(results))


def main() -> None:
    """The harness's own command line, which knows our model now."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
