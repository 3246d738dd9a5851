# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness, offline: our artifact against transformers with the same dequantized weights."""

from __future__ import annotations

import json
import math
import os
import pathlib
import random
import subprocess
import sys
from typing import Any

import pytest

# The harness and the data sets it loads must not ask the network.
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval")

from lm_eval.api.model import TemplateLM

from gptq_compile import lm_eval as ours
from gptq_compile.cli.main import main
from gptq_compile.errors import ConfigError
from gptq_compile.runtime.engine import Engine

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("local_choice", "local_rolling", "local_generate")
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "wizards", "brew", "tea")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with three tasks: multiple choice with examples, texts, and generation until a stop string."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    rows = [
        {"text": words(6), "choices": [words(n) for n in (1, 2, 3)], "label": rng.randrange(3), "long": words(90)}
        for _ in range(12)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / "cache"}}}
test_split: test
"""
    (folder / "choice.yaml").write_text(f"""
task: local_choice
output_type: multiple_choice
num_fewshot: 1
fewshot_split: test
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{text}}}} so"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
{common}""")
    (folder / "rolling.yaml").write_text(f"""
task: local_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
{common}""")
    (folder / "generate.yaml").write_text(f"""
task: local_generate
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12}}
metric_list: [{{metric: bleu}}]
{common}""")
    return folder


class Reference(TemplateLM):
    """The harness's interface over transformers in float64, one request after the other."""

    def __init__(self, folder: pathlib.Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self._length = self._model.config.max_position_embeddings
        self.generated: list[str] = []

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        import torch

        results = []
        for _texts, context, continuation in requests:
            ids = (context + continuation)[-(self._length + 1) :]
            with torch.inference_mode():
                logits = self._model(torch.tensor([ids[:-1]])).logits[0, -len(continuation) :].log_softmax(-1)
            targets = torch.tensor(continuation)
            chosen = logits.gather(1, targets[:, None]).sum()
            results.append((float(chosen), bool((logits.argmax(-1) == targets).all())))
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        # By hand: disjoint windows of the context, each after the last token of the one before.
        totals = []
        for request in requests:
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0])]
            total = 0.0
            for begin in range(0, len(ids) - 1, self._length):
                piece = ids[begin : begin + self._length + 1]
                if begin and len(piece) <= self._length:  # the last window is filled up with what came before
                    piece = ids[-(self._length + 1) :]
                scored = min(self._length, len(ids) - 1 - begin)
                total += self._loglikelihood_tokens([(("", ""), piece[:-scored], piece[-scored:])])[0][0]
            totals.append(total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        import torch

        for request in requests:
            context, settings = request.args
            ids = torch.tensor([self.tok_encode(context)])
            made = self._model.generate(ids, max_new_tokens=settings["max_gen_toks"], do_sample=False)
            text = self._tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            self.generated.append(text.split("e")[0])
        return self.generated


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """Every score without its standard error, as task/metric."""
    return {
        f"{task}/{name}": value
        for task, scores in results["results"].items()
        for name, value in scores.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_scores_are_those_of_transformers(
    compiled: Any, tasks: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = Reference(compiled.dequantized)
    expected = metrics(ours.evaluate(reference, NAMES, include_path=str(tasks)))
    made: list[str] = []
    generate = ours.CompiledLM.generate_until

    def watched(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        made.extend(generate(self, requests, disable_tqdm))
        return made

    monkeypatch.setattr(ours.CompiledLM, "generate_until", watched)
    capsys.readouterr()
    assert (
        main(["eval", str(compiled.artifact), "--tasks", ",".join(NAMES), "--include-path", str(tasks), "--json"]) == 0
    )
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    got = metrics(done)
    assert len(got) >= 5 and got.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(got[name], value, rel_tol=1e-4), (name, got[name], value)
    assert len(made) == 12 and made == reference.generated and len(set(made)) > 3


def test_the_harnesss_command_knows_our_model(toy_artifact: pathlib.Path, tasks: pathlib.Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "gptq_compile.lm_eval", "run", "--model", ours.NAME, "--model_args",
            f"path={toy_artifact}", "--tasks", "local_choice", "--include_path", str(tasks), "--limit", "3",
        ],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": "1"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|local_choice|" in done.stdout and "acc_norm" in done.stdout


def test_continuations_that_do_not_fit(toy_artifact: pathlib.Path, tasks: pathlib.Path) -> None:
    with Engine.load(toy_artifact, cache_tokens=1024) as engine:
        model = ours.CompiledLM(engine=engine)
        context, continuation = [1, 2, 3] * 200, [4, 5]
        cut = (context + continuation)[-513:]
        [(score, _)] = model._loglikelihood_tokens([(("", ""), context, continuation)])
        assert score == float(engine.score(cut, 511)[0].sum())
        assert model._loglikelihood_tokens([(("", ""), [1], [])]) == [(0.0, True)]
        [request] = [type("Request", (), {"args": ("x" * 600, {"until": ["\n"], "max_gen_toks": 500})})]
        assert isinstance(model.generate_until([request])[0], str)
        [request] = [type("Request", (), {"args": ("x", {"max_gen_toks": 600})})]
        with pytest.raises(ConfigError, match="600 new tokens"):
            model.generate_until([request])
        with pytest.raises(ConfigError, match="no task nothing_like_it"):
            ours.evaluate(model, ["local_choice", "nothing_like_it"], include_path=str(tasks))
    with pytest.raises(ConfigError, match="path=OUT"):
        ours.CompiledLM()
