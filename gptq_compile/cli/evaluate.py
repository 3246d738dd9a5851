# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile eval``: perplexity of a compiled model."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from gptq_compile.cli.generation import add_engine_arguments, load_engine
from gptq_compile.cli.output import duration, json_line
from gptq_compile.cli.parser import Parser
from gptq_compile.eval.perplexity import Perplexity, perplexity
from gptq_compile.eval.text import dataset_text, read_text
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import RequestError
from gptq_compile.runtime.manifest import read_manifest

_PLAIN_SECONDS = 5.0


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    p = Parser(
        prog="gptq-compile eval",
        description="Perplexity of the compiled model: non-overlapping windows without a beginning-of-sequence token,\n"
        "exp of the mean negative log-likelihood of every token of a window but the first.\n"
        "Or, with --tasks, tasks of EleutherAI's lm-evaluation-harness: pip install 'gptq-compile[eval]'.",
    )
    p.add_argument("artifact", metavar="OUT", help="the folder that gptq-compile wrote")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help="a text file, or .jsonl with a text field")
    source.add_argument("--dataset", metavar="NAME", help="a datasets name as NAME[:CONFIG][:SPLIT] (split: test)")
    source.add_argument("--tasks", metavar="T,T,...", help="tasks of lm-evaluation-harness")
    tasks = p.add_argument_group("with --tasks")
    tasks.add_argument("--include-path", metavar="DIR", help="a folder with tasks of your own (YAML files)")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the context (default: the task's)")
    tasks.add_argument("--limit", type=float, metavar="N", help="the first N documents; below 1 a share of them")
    tasks.add_argument("--apply-chat-template", action="store_true", help="put every context into the chat template")
    p.add_argument("--window", type=int, default=1024, metavar="N", help="tokens of a window (default: 1024)")
    p.add_argument("--windows", type=int, metavar="N", help="score the first N windows only (default: all)")
    p.add_argument("--json", action="store_true", help="events as JSON lines on stdout")
    add_engine_arguments(p)
    arguments = p.parse_args(argv)
    if arguments.tasks is not None:
        return _tasks(arguments)
    text = read_text(arguments.text) if arguments.text is not None else dataset_text(arguments.dataset)
    with load_engine(arguments) as engine:
        ids = tokenize(engine, text)
        start = time.perf_counter()
        shown = _Shown(arguments.json)
        with shown:
            result = perplexity(engine, ids, window=arguments.window, windows=arguments.windows, on_window=shown.window)
        seconds = time.perf_counter() - start
        name = engine.manifest.name
    if arguments.json:
        origin = arguments.text if arguments.text is not None else arguments.dataset
        json_line({"event": "done", "model": name, "text": origin, "seconds": seconds, **dataclasses.asdict(result)})
    else:
        print(_sentence(name, result, seconds))
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    # Before the model is loaded: a missing package shows at once.
    from gptq_compile.lm_eval import CompiledLM, evaluate, table

    largest = max(read_manifest(pathlib.Path(arguments.artifact) / "manifest.json").decode)
    with load_engine(arguments, max_batch=largest) as engine:
        results = evaluate(
            CompiledLM(engine=engine), arguments.tasks.split(","), include_path=arguments.include_path,
            num_fewshot=arguments.num_fewshot, limit=arguments.limit, chat=arguments.apply_chat_template,
        )  # fmt: skip
        if arguments.json:
            json_line({"event": "done", "model": engine.manifest.name, "results": results["results"]})
        else:
            print(table(results))
    return 0


def tokenize(engine: Engine, text: str) -> np.ndarray:
    """Token ids of a text without a beginning-of-sequence token, int64 [n].

    Raises:
        RequestError: if the artifact has no tokenizer.
    """
    if engine.tokenizer is None:
        raise RequestError("This artifact has no tokenizer, so a text cannot be scored.")
    ids = engine.tokenizer.encode(text)
    manifest = engine.manifest
    if manifest.add_bos and ids[:1] == [manifest.bos_token_id]:
        ids = ids[1:]
    return np.asarray(ids, "int64")


def _sentence(name: str, result: Perplexity, seconds: float) -> str:
    error = result.perplexity * result.stderr
    spread = f" +- {error:.2f} (standard error over windows)" if result.windows > 1 else ""
    return (
        f"{name}: perplexity {result.perplexity:.3f}{spread}, {result.windows} windows of {result.window} tokens, "
        f"{result.tokens} scored in {duration(seconds)} ({result.tokens / seconds:.0f} tokens/s)"
    )


class _Shown:
    """Progress of an evaluation: a bar, lines, or JSON events."""

    def __init__(self, as_json: bool) -> None:
        self.window: Callable[[int, int, float], None] = self._json if as_json else self._line
        self._told = time.monotonic()
        self._bars = None
        if not as_json and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("scoring"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("perplexity {task.fields[so_far]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bars.add_task("", total=None, so_far="...")
            self.window = self._bar

    def __enter__(self) -> None:
        if self._bars is not None:
            self._bars.start()

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _json(self, done: int, total: int, so_far: float) -> None:
        json_line({"event": "window", "done": done, "total": total, "perplexity": so_far})

    def _line(self, done: int, total: int, so_far: float) -> None:
        now = time.monotonic()
        if now - self._told >= _PLAIN_SECONDS or done == total:
            self._told = now
            print(f"  {done}/{total} windows, perplexity so far {so_far:.3f}", file=sys.stderr, flush=True)

    def _bar(self, done: int, total: int, so_far: float) -> None:
        assert self._bars is not None
        self._bars.update(self._task, completed=done, total=total, so_far=f"{so_far:.3f}")
