# SPDX-License-Identifier: Apache-2.0
"""Models that spell their attention out are raised to one op a layer, and everything else is token-parallel."""

from __future__ import annotations

import functools

import pytest
import torch

from gptq_compile.errors import GptqCompileError, PassError
from gptq_compile.frontend import trace as frontend
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.insert_kv_cache import InsertKvCache
from gptq_compile.passes.program import ModelInfo, ParamStore, Program
from gptq_compile.passes.raise_attention import RaiseAttention
from gptq_compile.passes.raise_positions import RaisePositions
from gptq_compile.passes.token_parallel import check_token_parallel
from gptq_compile.passes.verify import verify
from tests.architectures import param_store, tiny_config, tiny_model, traced

ops = torch.ops.gptq_compile
aten = torch.ops.aten

# model type -> (kv heads, windows, softcap, has ALiBi) of its two layers
RAISED = {
    "bloom": (4, [0, 0], 0.0, True),
    "mpt": (4, [0, 0], 0.0, True),
    "gptj": (4, [0, 0], 0.0, False),
    "falcon": (1, [0, 0], 0.0, False),
    "gpt_neo": (4, [0, 8], 0.0, False),
    "xglm": (4, [0, 0], 0.0, False),
}
HOOKED = {"opt": (4, [0, 0], 0.0, False), "biogpt": (4, [0, 0], 0.0, False)}


def _nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).double().square().sum() / want.double().square().sum())


@functools.cache
def _raised(name: str) -> tuple[torch.nn.Module, Program]:
    return tiny_model(name), _raise(traced(name, raised=False))


def _traced_anew(name: str, **changes: object) -> Program:
    return frontend.trace(tiny_config(name, **changes), param_store(tiny_model(name, **changes)))


def _raise(program: Program) -> Program:
    RaiseAttention().run(program)
    RaisePositions().run(program)
    verify(program)
    return program


def _attention(program: Program) -> list[torch.fx.Node]:
    return program.graph.find_nodes(op="call_function", target=ops.attention.default)


def _tokens(n: int) -> torch.Tensor:
    return torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("name", [*RAISED, *HOOKED])
def test_raised_program_equals_the_model(name: str) -> None:
    model, program = _raised(name)
    program = program.clone()
    kv_heads, windows, softcap, alibi = (RAISED | HOOKED)[name]
    found = _attention(program)
    assert len(found) == 2
    assert not [n for n in program.graph.nodes if n.target in (aten.softmax.int, aten._softmax.default)]
    assert [n.args[1].meta["val"].shape[2] for n in found] == [kv_heads] * 2
    if name in RAISED:
        assert [n.args[4] for n in found] == windows
        assert [n.args[5] for n in found] == [softcap] * 2
        assert [n.args[7] is not None for n in found] == [alibi] * 2
    check_token_parallel(program)
    ids = _tokens(21)
    want = model(input_ids=ids[None], use_cache=False).logits[0]
    assert _nmse(evaluate(program, ids), want) < 1e-10

    # Positions reach the model by position_ids alone: fed one token at a time through the cache, nothing changes.
    InsertKvCache().run(program)
    assert _nmse(evaluate(program, ids, step=True), want) < 1e-10


def test_raising_again_changes_nothing() -> None:
    _, program = _raised("bloom")
    assert not RaiseAttention().run(program)
    assert not RaisePositions().run(program)


def test_alibi_slopes_are_those_of_the_paper() -> None:
    _, program = _raised("bloom")
    slopes = program.params.get(_attention(program)[0].args[7].meta["param"])
    torch.testing.assert_close(slopes, torch.tensor([2.0 ** (-2 * i) for i in range(1, 5)]), rtol=1e-5, atol=0)


def test_grouped_heads_and_softcap_of_an_eager_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2's own eager attention: expanded key heads, tanh soft cap, a window on every other layer."""
    build = frontend.build_model
    monkeypatch.setattr(frontend, "build_model", lambda config, attention: build(config, "eager"))
    model, program = tiny_model("gemma2"), _raise(_traced_anew("gemma2"))
    found = _attention(program)
    assert [n.args[4] for n in found] == [8, 0]
    assert [n.args[5] for n in found] == pytest.approx([50.0, 50.0])
    assert [n.args[3] for n in found] == pytest.approx([256**-0.5] * 2, rel=1e-5)
    assert [n.args[1].meta["val"].shape[2] for n in found] == [2, 2]
    ids = _tokens(21)
    assert _nmse(evaluate(program, ids), model(input_ids=ids[None], use_cache=False).logits[0]) < 1e-10


class _Toy(torch.nn.Module):
    """One attention layer whose scores are changed by ``bias(scores, n)``."""

    def __init__(self, bias) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 16)
        self.bias = bias

    def forward(self, input_ids, position_ids, logit_rows):
        x = self.embed(input_ids)
        scores = self.bias(x @ x.transpose(-1, -2), x.shape[1])
        return (torch.softmax(scores, -1) @ x).index_select(1, logit_rows)


def _toy(bias) -> Program:
    return _export(_Toy(bias))


def _export(model: torch.nn.Module) -> Program:
    n, m = torch.export.Dim("n", min=4, max=4096), torch.export.Dim("m", min=2, max=4096)
    ids = torch.zeros((1, 7), dtype=torch.long)
    exported = torch.export.export(
        model, (ids, ids.clone(), torch.zeros(5, dtype=torch.long)), dynamic_shapes=({1: n}, {1: n}, {0: m})
    ).run_decompositions({})
    params = ParamStore()
    params.set("embed.weight", model.embed.weight)
    program = Program(exported.graph_module, params, ModelInfo("toy", "", "toy", 16, 4096))
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and node.name.startswith("p_"):
            node.meta["param"] = "embed.weight"
    return program


def _causal(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def test_a_window_far_beyond_the_probes_is_found() -> None:
    def bias(scores, n):
        distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        return scores.masked_fill((distance < 0) | (distance >= 300), float("-inf"))

    program = _toy(bias)
    RaiseAttention().run(program)
    (node,) = _attention(program)
    assert node.args[3:6] == (1.0, 300, 0.0)


@pytest.mark.parametrize(
    ("bias", "sentence"),
    [
        (lambda s, n: s, "later tokens"),
        (
            lambda s, n: s.masked_fill(
                ~(_causal(n) & (torch.arange(n)[:, None] // 8 == torch.arange(n)[None, :] // 8)), float("-inf")
            ),
            "neither causal nor a causal sliding window",
        ),
        (
            lambda s, n: (s + (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs().sqrt()).masked_fill(
                ~_causal(n), float("-inf")
            ),
            "not proportional to the distance",
        ),
        (lambda s, n: (s * s).masked_fill(~_causal(n), float("-inf")), "neither a scale nor a tanh soft cap"),
        (
            lambda s, n: (s * torch.arange(1, n + 1)[:, None]).masked_fill(~_causal(n), float("-inf")),
            "scaled differently",
        ),
    ],
)
def test_what_the_op_cannot_say_is_refused(bias, sentence: str) -> None:
    with pytest.raises(PassError, match=sentence):
        RaiseAttention().run(_toy(bias))


def test_a_bidirectional_model_is_refused() -> None:
    with pytest.raises(GptqCompileError, match=r"both directions|later tokens"):
        _raise(_traced_anew("bert", is_decoder=False))


def test_a_recurrent_model_is_refused() -> None:
    with pytest.raises(GptqCompileError, match=r"mixes tokens|cannot be traced"):
        program = _raise(_traced_anew("mamba"))
        check_token_parallel(program)


class _Mixer(torch.nn.Module):
    def __init__(self, mix) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 16)
        self.mix = mix

    def forward(self, input_ids, position_ids, logit_rows):
        return self.mix(self.embed(input_ids)).index_select(1, logit_rows)


def _mixer(mix) -> Program:
    return _export(_Mixer(mix))


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        (lambda x: x + x.mean(dim=1, keepdim=True), "a reduction over the sequence"),
        (lambda x: x.cumsum(1), "a running sum over the sequence"),
        (lambda x: torch.nn.functional.pad(x, (0, 0, 1, -1)), "pads or shifts the sequence"),
        (lambda x: torch.cat([x[:, :1] * 0, x[:, :-1]], 1), "by their place in the batch"),
        (
            lambda x: torch.nn.functional.conv1d(x.mT, torch.ones(16, 1, 3), padding=1, groups=16).mT,
            "convolution over the sequence",
        ),
        (lambda x: (x @ x.mT)[..., :1] * x, "all tokens with all tokens"),
        (lambda x: torch.softmax(x, 1), "a softmax over the sequence"),
        (lambda x: x * x.shape[1], "computes with the number of tokens"),
        (lambda x: x.flip(1), "a reversal over the sequence"),
    ],
)
def test_token_mixing_is_found(mix, sentence: str) -> None:
    with pytest.raises(PassError, match=sentence):
        check_token_parallel(_mixer(mix))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x.reshape(-1, 4).softmax(-1).reshape(x.shape),
        lambda x: x.view(1, -1, 2, 8).transpose(1, 2).sigmoid().transpose(1, 2).flatten(2),
        lambda x: x[0].repeat_interleave(3, 0).sigmoid().view(-1, 3, 16).sum(1)[None],
        lambda x: torch.stack(x.topk(2, -1)[0].unbind(-1), -1).expand(1, -1, 2) @ torch.ones(2, 16),
        lambda x: torch.zeros(1, x.shape[1], 16).scatter(2, x.argmax(-1, keepdim=True), 1.0) + x.mean(-1, keepdim=True),
    ],
)  # fmt: skip
def test_token_parallel_programs_pass(mix) -> None:
    check_token_parallel(_mixer(mix))
