# SPDX-License-Identifier: Apache-2.0
"""``tune_scales``: scales and norm weights are tuned end to end, so that the model predicts what it did before.

GPTQ makes each linear's output right, one after another; nothing makes the errors that are left cancel. Once all codes
are fixed, what can change without costing bits is tuned: the scale of every group of every quantized linear (those of
experts too) and the weights of the norms. Adam minimizes the divergence of the next-token distributions,
KL(original || quantized), on the calibration tokens: knowledge distillation (arXiv 1503.02531) through the parameters
that the end-to-end phase of EfficientQAT trains (E2E-QP, arXiv 2407.11062). A scale becomes ``scale * (1 + t)``, a norm
weight ``w + rms(w) * t`` (the rms of what multiplies: of ``1 + w`` in Gemma), and all ``t`` have one rate.

benchmarks/RESULTS.md has what it gains. What was tried on SmolLM2-135M and lost: updating codes through the rounding
(straight-through: 2.8 % of the codes flip, perplexity 32.0 instead of 27.2 at 4 bits); twice the rate; more than 6
epochs, which are no better than 4 to 6. Random crops of the sequences made no difference.

The original model is read once: what it computes up to its last stretch is kept for every sequence. The quantized one
runs stretch by stretch (`cuts_between_layers`) under checkpoints that dequantize inside, so that memory holds one
stretch's tape and weights and the values between stretches.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptq_compile.errors import CalibrationError
from gptq_compile.passes.common import Node, with_defaults
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.grid import dequantize, to_fp16_nearest
from gptq_compile.passes.gptq.world import World, current, join
from gptq_compile.passes.gptq_quantize import NO_DERIVATIVE
from gptq_compile.passes.gradients import cuts_between_layers
from gptq_compile.passes.interpret import Interpreter
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program
from gptq_compile.passes.stage_runner import Env, Runner, compute_dtype, params_of, sequences_per_call
from gptq_compile.passes.stages import live_values

log = logging.getLogger(__name__)

ops = torch.ops.gptq_compile
aten = torch.ops.aten

_RATE = 5e-3
_BETAS = (0.9, 0.95)
_EPSILON = 1e-8  # against a gradient of the mean over tokens
_WARM_UP = 0.05  # of all steps
_SEQUENCES = 4  # of a step
_LEAST = 0.1  # of its start: a scale never gets smaller
_LOGITS = 1 << 28  # most elements of one call's logits, unless one sequence has more
_RESIDENT = 0.5  # of a GPU's free memory that the quantized model may take to stay there between calls


class TuneScales(Pass):
    """Tunes a quantized program; see the module's text. It keeps what it was given where tuning does not help.

    Args:
        config: settings; ``tune_epochs`` of 0 makes the pass do nothing.
        original: the program as it was before ``gptq_quantize``.
        calibration: int64 ``[sequences, tokens]`` ids.
        device: where to compute.
        note: told the divergence after every epoch.
    """

    name = "tune_scales"
    preserves = False

    def __init__(
        self,
        config: QuantizeConfig,
        original: Program,
        calibration: Tensor | None,
        device: str | torch.device = "cpu",
        note: Callable[[str], None] = log.info,
    ) -> None:
        self.config, self.original, self.calibration = config, original, calibration
        self.device, self.note = torch.device(device), note

    def requires(self, program: Program) -> None:
        if self.config.tune_epochs and (self.calibration is None or self.calibration.numel() == 0):
            raise CalibrationError("Scales are tuned on calibration tokens, but there are none.")

    @torch.no_grad()
    def run(self, program: Program) -> bool:
        if not self.config.tune_epochs or not any(_is_quantized(n) for n in program.graph.nodes):
            return False
        assert self.calibration is not None
        self.device = join(self.device)
        world = current()
        dtype = compute_dtype(self.config, program, self.device)
        found = _Outcome(math.nan, math.nan, {})
        try:
            with _tf32(self.device), Runner(self.original, self.device, dtype, offload=True) as runner:
                tuning = _Tuning(self.config, _Original(runner, self.calibration), _Student(program, runner), runner)
                # Every process tunes on all sequences; what rank 0 found decides.
                found = world.agree(tuning.run(partial(self._tell, world)))
            why = found.why_not()
        except torch.OutOfMemoryError:
            if world.size > 1:  # the others would wait, or go on with other scales
                raise
            why = "tuning needs more memory than the GPU has."
        except RuntimeError as error:
            if not NO_DERIVATIVE.search(str(error)):
                raise
            why = f"the model has no gradient: {error}"
        program.attrs["tuning"] = {
            "epochs": self.config.tune_epochs,
            "divergence_before": _known(found.before),
            "divergence_after": _known(found.after),
            "kept_untuned": why,
        }
        if why is not None:
            log.warning("Scales stay as GPTQ left them, because %s", why)
            return False
        for name, value in found.tuned.items():
            program.params.set(name, value)
        program.attrs["tuned_norms"] = [n.meta["param"] for n in _norm_weights(program)]
        return True

    def _tell(self, world: World, text: str) -> None:
        if world.rank == 0:
            self.note(text)


@dataclass(frozen=True)
class _Outcome:
    """What tuning found.

    Attributes:
        before, after: mean KL(original || quantized) over the calibration tokens, nats a token.
        tuned: parameter -> its new value, on the CPU, in the type that is stored.
    """

    before: float
    after: float
    tuned: dict[str, Tensor]

    def why_not(self) -> str | None:
        """Why the tuned values are not to be used, as the end of a sentence."""
        if not math.isfinite(self.before):
            return "the predictions on the calibration tokens are not finite."
        if not math.isfinite(self.after) or not all(bool(v.isfinite().all()) for v in self.tuned.values()):
            return "tuning led to values that are not finite."
        if self.after >= self.before:
            return f"tuning did not help: divergence {self.after:.4g} after {self.before:.4g} nats a calibration token."
        return None


class _Original:
    """What the original model predicts; everything before its last stretch has run when this is made."""

    def __init__(self, runner: Runner, calibration: Tensor) -> None:
        self.runner, self.output = runner, runner.program.output
        self.calibration = calibration
        self.batches = runner.batches(calibration, 1)
        stretches = stretches_with_live(runner.program)
        self.last = stretches[-1][0]
        for (nodes, live), (after, _) in itertools.pairwise(stretches):
            loaded = runner.load(nodes, {})
            runner.prefetch(params_of(after))
            for batch in self.batches:
                runner.keep(batch, runner.run(batch.values, nodes, live, loaded))
        self.loaded = runner.load(self.last, {})

    def predictions(self, index: int) -> Tensor:
        """Logarithms of the next token's probabilities for one sequence, float32 ``[tokens, vocabulary]``."""
        values = self.runner.run(self.batches[index].values, self.last, [self.output], self.loaded)
        return F.log_softmax(values[self.output][0].float(), -1)


class _Tuning:
    def __init__(self, config: QuantizeConfig, original: _Original, student: _Student, runner: Runner) -> None:
        self.config, self.original, self.student, self.runner = config, original, student, runner
        self.calibration = original.calibration
        tokens = self.calibration.shape[1]
        fits = max(1, _LOGITS // (tokens * student.program.info.vocab_size))
        together = sequences_per_call(student.program, runner.device, tokens)
        self.per_call = max(1, min(_SEQUENCES, fits, together))

    def run(self, note: Callable[[str], None]) -> _Outcome:
        student, epochs = self.student, self.config.tune_epochs
        before = self.divergence()
        if not math.isfinite(before):
            return _Outcome(before, math.nan, {})
        note(f"tuning: divergence {before:.4g} nats a token before")
        count, tokens = self.calibration.shape
        # Gradients of sums, which half precision holds, so that epsilon is a sum as well.
        epsilon = _EPSILON * _SEQUENCES * tokens
        adam = torch.optim.Adam(list(student.theta.values()), lr=_RATE, betas=_BETAS, eps=epsilon)
        steps, step = epochs * math.ceil(count / _SEQUENCES), 0
        order = torch.Generator().manual_seed(self.config.seed)
        for epoch in range(1, epochs + 1):
            total = torch.zeros((), dtype=torch.float64, device=self.runner.device)
            for chosen in torch.randperm(count, generator=order).split(_SEQUENCES):
                for part in chosen.split(self.per_call):
                    with torch.enable_grad():
                        loss = self.loss(part.tolist(), tape=True)
                        loss.backward()
                    total += loss.detach()
                warm = min(1.0, (step + 1) / max(1.0, steps * _WARM_UP))
                for group in adam.param_groups:
                    group["lr"] = _RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
                adam.step()
                adam.zero_grad()
                step += 1
            note(f"tuning: epoch {epoch} of {epochs}, divergence {float(total) / (count * tokens):.4g} nats a token")
        tuned = student.finish()
        after = self.divergence()
        note(f"tuning: divergence {after:.4g} nats a token after")
        return _Outcome(before, after, tuned)

    def divergence(self) -> float:
        """The mean over all calibration tokens."""
        parts = torch.arange(len(self.calibration)).split(self.per_call)
        return float(sum(self.loss(p.tolist(), tape=False).double() for p in parts)) / self.calibration.numel()

    def loss(self, sequences: list[int], tape: bool) -> Tensor:
        """KL(original || quantized) summed over the tokens of some sequences."""
        (batch,) = self.runner.batches(self.calibration[sequences], len(sequences))
        # The two graphs have inputs of their own.
        inputs = {self.student.program.input(node.name): value for node, value in batch.values.items()}
        logits = self.student.logits(inputs, len(sequences), tape)
        total = logits.new_zeros(())
        for index, rows in zip(sequences, logits.chunk(len(sequences)), strict=True):
            with torch.no_grad():
                wanted = self.original.predictions(index)
            total = total + F.kl_div(F.log_softmax(rows, -1), wanted, reduction="sum", log_target=True)
        return total


@dataclass(frozen=True)
class _Weight:
    """Where a quantized weight is: parameters of the program, bits, group size, and the shape of the codes."""

    codes: Node
    scales: Node
    zeros: Node | None
    g_idx: Node | None
    bits: int
    group: int


class _Student:
    """The quantized program with plain linears on weights that are functions of what is tuned.

    Attributes:
        theta: parameter -> its relative change: scales like the scales, norm weights like the weights.
    """

    def __init__(self, program: Program, runner: Runner) -> None:
        self.program, self.device = program.clone(), runner.device
        self.interpreter = Interpreter(self.program, self.device, runner.interpreter.dtype)
        self.weights = _with_plain_linears(self.program)
        self.stretches = stretches_with_live(self.program)
        self.norms = _norm_weights(self.program)
        self._held: Env = {}
        self._resident = self._fits()
        scales = dict.fromkeys(w.scales for w in self.weights.values())
        self.start = {node: self.interpreter.stored(node).float() for node in (*scales, *self.norms)}
        self.unit = {n: (self.start[n] + offset).square().mean().sqrt() for n, offset in self.norms.items()}
        self.theta = {node: torch.zeros_like(v).requires_grad_() for node, v in self.start.items()}
        self._final: dict[Node, Tensor] | None = None

    def logits(self, values: Env, sequences: int, tape: bool) -> Tensor:
        """Float32 ``[sequences * tokens, vocabulary]`` for the program's inputs."""
        for nodes, live in self.stretches:
            if tape:
                values = checkpoint(  # type: ignore[assignment]
                    self._run, nodes, live, values, sequences, use_reentrant=False, preserve_rng_state=False
                )
            else:
                values = self._run(nodes, live, values, sequences)
        return values[self.program.output][0].float()

    def finish(self) -> dict[str, Tensor]:
        """Fixes what is tuned at the values that are stored, and returns them by name."""
        values = {n: self._tuned(n) for n in self.theta}
        self._final = {n: v if n in self.norms else to_fp16_nearest(v) for n, v in values.items()}
        return {n.meta["param"]: v.cpu() for n, v in self._final.items()}

    def _run(self, nodes: list[Node], live: set[Node], values: Env, sequences: int) -> Env:
        made = set(nodes)
        want = [n for n in live if n in made or n in values]
        env = {**values, **{p: self._param(p) for p in params_of(nodes)}}
        return self.interpreter.run(env, want, nodes, sequences, references=True)

    def _tuned(self, node: Node) -> Tensor:
        if self._final is not None:
            return self._final[node]
        if node in self.norms:
            return self.start[node] + self.unit[node] * self.theta[node]
        return self.start[node] * (1 + self.theta[node]).clamp(min=_LEAST)

    def _param(self, node: Node) -> Tensor:
        if node in self.theta:
            return self._tuned(node)
        if node not in self.weights:
            return self._hold(node, self.interpreter.param)
        w = self.weights[node]
        stored = [None if n is None else self._hold(n, self.interpreter.stored) for n in (w.codes, w.zeros, w.g_idx)]
        codes, zeros, g_idx = stored
        assert codes is not None
        made = differentiable_weight(self._tuned(w.scales), codes, zeros, g_idx, w.group, w.bits)
        return made.to(self.interpreter.param_dtype(node))

    def _hold(self, node: Node, read: Callable[[Node], Tensor]) -> Tensor:
        if node in self._held:
            return self._held[node]
        value = read(node)
        if self._resident:
            self._held[node] = value
        return value

    def _fits(self) -> bool:
        """Whether what is read stays on the device. On a CPU the codes are in memory already."""
        if self.device.type != "cuda":
            return True
        parts = {n for w in self.weights.values() for n in (w.codes, w.zeros, w.g_idx) if n is not None}
        read = parts | {p for p in self.program.param_nodes.values() if p.users}
        read -= set(self.weights)
        size = sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in read)
        return size <= _RESIDENT * torch.cuda.mem_get_info(self.device)[0]


class _Dequantize(torch.autograd.Function):
    """`grid.dequantize`, differentiable in the scales: the gradient of one is the sum over its group of
    ``gradient * (code - zero)``."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, codes: Tensor, zeros: Tensor | None, g_idx: Tensor | None, group: int,
                bits: int) -> Tensor:  # fmt: skip
        ctx.save_for_backward(scales, codes, zeros, g_idx)
        ctx.group, ctx.bits = group, bits
        return dequantize(codes, scales, zeros, g_idx, group, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scales, codes, zeros, g_idx = ctx.saved_tensors
        steps = dequantize(codes, torch.ones_like(scales), zeros, g_idx, ctx.group, ctx.bits)  # code - zero
        product = steps.mul_(grads[0])
        if g_idx is not None:
            return torch.zeros_like(scales).index_add_(1, g_idx.long(), product), None, None, None, None, None
        rows, groups = scales.shape
        short = groups * ctx.group - product.shape[1]
        if short:
            product = F.pad(product, (0, short))
        return product.reshape(rows, groups, ctx.group).sum(2), None, None, None, None, None


def differentiable_weight(
    scales: Tensor, codes: Tensor, zeros: Tensor | None, g_idx: Tensor | None, group: int, bits: int
) -> Tensor:
    """The weight of codes as a differentiable function of the scales.

    Args:
        scales: ``[..., N, groups]``, floating. ``codes``: u8 ``[..., N, K]``. ``zeros``: u8 like the scales, or None.
        g_idx: i32 ``[K]`` group of each column, or None for ``k // group``.
        group: columns of a full group. ``bits``: of a code.

    Returns:
        ``[..., N, K]`` in the scales' type.
    """
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (scales, codes, zeros)]
    return _Dequantize.apply(flat[0], flat[1], flat[2], g_idx, group, bits).reshape(codes.shape)  # type: ignore[no-any-return, no-untyped-call]


def stretches_with_live(program: Program) -> list[tuple[list[Node], set[Node]]]:
    """The program cut between its layers: the nodes of each stretch and the values that are live after it."""
    order = [n for n in program.graph.nodes if n.op == "call_function"]
    edges = [0, *cuts_between_layers(order), len(order)]
    parts = [(order[a:b], live_values(order[b:])) for a, b in itertools.pairwise(edges)]
    parts[-1] = (parts[-1][0], {program.output})
    return parts


def _is_quantized(node: Node) -> bool:
    return node.target in (ops.quant_linear.default, ops.quant_expert_linear.default)


def _with_plain_linears(program: Program) -> dict[Node, _Weight]:
    """Puts plain linears on parameters that have no value in the place of quantized ones; says what those stand for."""
    weights: dict[Node, _Weight] = {}
    for node in [n for n in program.graph.nodes if _is_quantized(n)]:
        experts = node.target is ops.quant_expert_linear.default
        x, codes, scales, zeros, fifth, bias, bits, group = node.args
        with program.graph.inserting_before(node):
            shape = [int(d) for d in codes.meta["val"].shape]
            weight = program.add_param(f"{codes.meta['param']}.weight", torch.empty(shape, device="meta"))
            target = ops.expert_linear.default if experts else aten.linear.default
            new = program.call(target, (x, weight, fifth, bias) if experts else (x, weight, bias), like=node)
        weights[weight] = _Weight(codes, scales, zeros, None if experts else fifth, bits, group)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    return weights


def _norm_weights(program: Program) -> dict[Node, float]:
    """Weights that only norms read and that a checkpoint can store -> what the norms add to them."""
    found: dict[Node, float] = {}
    for node in program.graph.nodes:
        if node.target not in (ops.rms_norm.default, ops.layer_norm.default):
            continue
        weight = node.args[1]
        name = None if weight is None else weight.meta.get("param")
        if name is None or program.params.canonical(name) != name:
            continue
        if name.startswith("folded.") and name not in program.attrs.get("shifted", {}):
            continue
        if any(user.target is not node.target or user.args[1] is not weight for user in weight.users):
            continue
        offset = 0.0
        if node.target is ops.rms_norm.default:
            offset = with_defaults(node.args[3:], [0.0])[0]
        found[weight] = float(node.kwargs.get("weight_offset", offset))
    return found


@contextlib.contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """Lets products of float32 matrices on a GPU use TF32: gradients are noisier than that."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
