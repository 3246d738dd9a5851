# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a linear's squared output error with respect to one weight row: H = 2/n sum_t d_t x_t x_t^T.

On a GPU, 16-bit activations are multiplied by tensor cores: their products are exact in float32, where they are summed.
Token weights enter as z_t = sqrt(d_t) x_t rounded back to 16 bits (relative 2^-9 for bfloat16, 2^-12 for float16, no
more than the activations themselves were rounded by), so that H stays symmetric and positive semidefinite. Tokens are
gathered into long products, and only blocks on and above the diagonal are computed.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from gptq_compile.errors import CalibrationError

log = logging.getLogger(__name__)

_HALVES = (torch.float16, torch.bfloat16)

_SAFE = 1e37  # of float32's 3.4e38; sums that may exceed it are kept in float64

_CONSTANT = 1e-5  # columns that vary less, relative to their size, count as constant

_HALF_PEAK = 60000.0  # largest weighted activation that float16 still holds

GATHER = 16384  # tokens of one product on a GPU: fewer would spend the time on reading and writing the sums

_BLOCK = 1792  # smallest width of a block of columns that keeps a GPU busy


def column_blocks(features: int, block: int = _BLOCK) -> list[tuple[int, int]]:
    """Ranges of columns of about equal width, at least ``block`` wide each (one range where there is no room)."""
    count = max(1, min(8, features // block))
    width = -(-features // count // 64) * 64 if count > 1 else features
    return [(a, min(a + width, features)) for a in range(0, features, width)]


@functools.cache
def _fused() -> Callable[..., Any] | None:
    """What precedes a product in one pass over tokens, or None without Triton (optional in torch's CUDA wheels)."""
    try:
        from gptq_compile.passes.gptq.weigh_triton import weigh
    except ImportError as error:
        log.warning("Triton cannot be imported (%s); Hessians read activations several times.", error)
        return None
    return weigh


class Hessian:
    """Accumulates H over calibration tokens (paper section 3.1, equation 2, as a mean over tokens).

    The plain sum and the token count are kept and divided at the end, so the result does not depend on how the
    calibration set is cut into calls, up to rounding of the sums.

    Args:
        features: Input features K of the linear.
        dtype: Type of the sums, float32 or float64.
        device: Where the sums live; inputs are expected there.
        name: What is observed (module path or value name), for messages.
        drop_bad: Leave out tokens whose activations or weights are not finite, and count them in `dropped`, instead
            of refusing them.
        gather: Tokens of one product of 16-bit activations on a GPU.
    """

    def __init__(
        self,
        features: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "activation",
        drop_bad: bool = False,
        gather: int = GATHER,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise CalibrationError(f"The Hessian of {name} was asked to sum in {dtype}; use float32 or float64.")
        self.name = name
        self.tokens = 0
        self.dropped = 0
        self._drop_bad = drop_bad
        self._bound = 0.0  # no entry of the sum exceeds it
        self._low = torch.full((features,), float("inf"), device=device)
        self._high = torch.full((features,), float("-inf"), device=device)
        self._widened = False
        self._sum = torch.zeros(features, features, dtype=dtype, device=device)
        self._gather = gather
        self._waiting: Tensor | None = (
            None  # 16-bit tokens [gather, features], of which `_count` wait for their product
        )
        self._count = 0
        self._blocks = column_blocks(features)
        self._mirrored = True  # whether the sums hold their blocks below the diagonal too

    @property
    def features(self) -> int:
        """Input features K."""
        return self._sum.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the sums live."""
        return self._sum.device

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: [..., K] activations, float32, float16, bfloat16 or float64; leading dimensions are tokens.
            weights: [...] token weights d_t >= 0 with x's leading shape (or flat), or None for 1.

        Raises:
            CalibrationError: NaN or infinite activations, bad weights, or shapes that do not fit.
        """
        if x.shape[-1] != self.features:
            raise CalibrationError(f"{self.name} has {x.shape[-1]} features where its Hessian expects {self.features}.")
        x = x.reshape(-1, self.features)
        if x.is_cuda and x.dtype in _HALVES and self._sum.dtype == torch.float32 and (fused := _fused()) is not None:
            done = self._add_at_once(x, weights, fused)
            x, weights = x[done:], None if weights is None else weights.reshape(-1)[done:]
        if x.shape[0] == 0:
            return
        low, high = torch.aminmax(x, dim=0)  # NaN where a column holds one
        good = None if weights is None else torch.isfinite(weights.reshape(-1))
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()) or (
            self._drop_bad and good is not None and not bool(good.all())
        ):
            if not self._drop_bad:
                self._refuse(x)
            rows = torch.isfinite(x).all(1)
            rows = rows if good is None else rows & good.to(rows.device)
            self.dropped += int((~rows).sum())
            x = x[rows]
            weights = None if weights is None else weights.reshape(-1)[rows.to(weights.device)]
            if x.shape[0] == 0:
                return
            low, high = torch.aminmax(x, dim=0)
        roots = None if weights is None else self._roots(weights, x.shape[0])
        peak = float(torch.maximum(high.abs(), low.abs()).max()) * (1.0 if roots is None else float(roots.max()))
        self._bound += x.shape[0] * peak * peak
        if self._bound > _SAFE and self._sum.dtype == torch.float32:
            self._finish()
            self._sum, self._widened = self._sum.double(), True
        self._low = torch.minimum(self._low, low.to(self._low))
        self._high = torch.maximum(self._high, high.to(self._high))
        self.tokens += x.shape[0]
        dtype = self._sum.dtype
        halves = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and peak < _HALF_PEAK)
        if halves and x.is_cuda and dtype == torch.float32:
            self._add_halves(x, roots)
            return
        x = x.to(dtype)
        if roots is not None:
            # Weights enter as sqrt(d) on both sides, which keeps the product symmetric.
            x = x * roots.to(dtype).unsqueeze(1)
        self._finish()
        self._sum.addmm_(x.t(), x)

    def _add_at_once(self, x: Tensor, weights: Tensor | None, weigh: Callable[..., Any]) -> int:
        """Adds 16-bit tokens in one pass over them and one wait, up to where something is unusual.

        Returns:
            How many tokens were added; `add` looks at the others more closely.
        """
        if weights is not None:
            weights = weights.reshape(-1).to(x.device, torch.float32)
            if weights.numel() != x.shape[0]:
                return 0
        done = 0
        while done < x.shape[0]:
            room = self._room(x)
            count = min(x.shape[0] - done, self._gather - self._count)
            part = slice(done, done + count)
            d = None if weights is None else weights[part]
            low, high = weigh(x[part], d, room[self._count : self._count + count])
            numbers = [low.amin().neg(), high.amax()] + ([] if d is None else [d.amin(), d.amax()])
            negative, positive, lightest, heaviest = [*torch.stack(numbers).tolist(), 1.0, 1.0][:4]
            peak = max(abs(negative), abs(positive)) * max(heaviest, 0.0) ** 0.5
            bound = self._bound + count * peak * peak
            usual = lightest >= 0 and math.isfinite(negative) and math.isfinite(positive) and bound <= _SAFE
            if not usual or (x.dtype == torch.float16 and peak >= _HALF_PEAK):
                break
            self._bound = bound
            self._low = torch.minimum(self._low, low)
            self._high = torch.maximum(self._high, high)
            self.tokens += count
            self._took(count)
            done += count
        return done

    def _room(self, x: Tensor) -> Tensor:
        """Where tokens of x's type wait."""
        if self._waiting is not None and self._waiting.dtype != x.dtype:
            self._finish()
        if self._waiting is None:
            self._waiting = torch.empty(self._gather, self.features, dtype=x.dtype, device=x.device)
        return self._waiting

    def _took(self, count: int) -> None:
        """Multiplies when the room is full."""
        self._count += count
        if self._count == self._gather:
            assert self._waiting is not None
            self._multiply(self._waiting)
            self._count = 0

    def _add_halves(self, x: Tensor, roots: Tensor | None) -> None:
        waiting = self._room(x)
        done = 0
        while done < x.shape[0]:
            count = min(x.shape[0] - done, self._gather - self._count)
            part, room = x[done : done + count], waiting[self._count : self._count + count]
            if roots is None:
                room.copy_(part)
            else:
                torch.mul(part, roots[done : done + count].unsqueeze(1), out=room)
            self._took(count)
            done += count

    def _multiply(self, z: Tensor) -> None:
        """Adds z^T z: for each block of columns, its product with all columns from its first on."""
        for a, b in self._blocks:
            into = self._sum[a:b, a:]
            if z.is_cuda:
                torch.ops.aten.addmm.dtype_out(into, z[:, a:b].t(), z[:, a:], torch.float32, out=into)
            else:
                into.addmm_(z[:, a:b].t().float(), z[:, a:].float())
        self._mirrored = len(self._blocks) == 1

    def _finish(self) -> None:
        """Multiplies the tokens that wait, frees their room and mirrors the blocks above the diagonal."""
        if self._waiting is not None and self._count:
            self._multiply(self._waiting[: self._count])
        self._waiting, self._count = None, 0
        if not self._mirrored:
            for a, b in self._blocks:
                self._sum[b:, a:b] = self._sum[a:b, b:].t()
            self._mirrored = True

    def _refuse(self, x: Tensor) -> None:
        bad = ~torch.isfinite(x)
        token, feature = (int(i) for i in bad.nonzero()[0])
        raise CalibrationError(
            f"{self.name} holds {int(bad.sum())} NaN or infinite activations in calibration tokens "
            f"{self.tokens} to {self.tokens + x.shape[0] - 1}, first at token {self.tokens + token}, "
            f"feature {feature}; check the model's weights, or calibrate in float32."
        )

    def _roots(self, weights: Tensor, count: int) -> Tensor:
        if weights.numel() != count:
            raise CalibrationError(f"{self.name} has {count} tokens but {weights.numel()} token weights.")
        d = weights.reshape(-1).to(self._sum)
        if not bool((torch.isfinite(d) & (d >= 0)).all()):
            raise CalibrationError(f"Token weights of {self.name} must be finite and not negative.")
        return d.sqrt()

    def merge(self, other: Hessian) -> None:
        """Add the tokens another accumulator of the same features has seen (another device, another shard)."""
        if other.features != self.features:
            raise CalibrationError(
                f"{self.name} and {other.name} differ in features: {self.features}, {other.features}."
            )
        self._finish()
        other._finish()
        if other._widened and self._sum.dtype == torch.float32:
            self._sum, self._widened = self._sum.double(), True
        self._sum += other._sum.to(self._sum)
        self._bound += other._bound
        self._low = torch.minimum(self._low, other._low.to(self._low))
        self._high = torch.maximum(self._high, other._high.to(self._high))
        self.tokens += other.tokens
        self.dropped += other.dropped

    def all_reduce(self) -> None:
        """Add the tokens that the other processes of torch.distributed's default group have seen."""
        self._finish()
        counts = torch.tensor([self.tokens, self.dropped, self._bound], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(counts)
        self.tokens, self.dropped, self._bound = int(counts[0]), int(counts[1]), float(counts[2])
        wide = torch.tensor(float(self._bound > _SAFE or self._widened), device=self.device)
        torch.distributed.all_reduce(wide, torch.distributed.ReduceOp.MAX)
        if float(wide) and self._sum.dtype == torch.float32:
            self._sum, self._widened = self._sum.double(), True
        torch.distributed.all_reduce(self._sum)
        torch.distributed.all_reduce(self._low, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(self._high, torch.distributed.ReduceOp.MAX)

    def notes(self) -> list[str]:
        """What is unusual about the tokens, in words for the report; empty for a healthy calibration."""
        said = []
        if self.dropped:
            said.append(
                f"{self.dropped} of {self.dropped + self.tokens} calibration tokens were not finite and left out"
            )
        if self._widened:
            said.append("activations too large for float32 sums: summed in float64")
        if 0 < self.tokens < self.features:
            said.append(f"only {self.tokens} calibration tokens for {self.features} features")
        span = torch.maximum(self._low.abs(), self._high.abs())
        constant = int(((self._high - self._low <= _CONSTANT * span) & (span > 0)).sum())
        if self.tokens > 1 and constant:
            said.append(f"{constant} columns are constant over the calibration")
        return said

    def matrix(self) -> Tensor:
        """H [K, K] in the accumulator's type.

        Raises:
            CalibrationError: No token was added, or the sums overflowed.
        """
        self._require_tokens()
        self._finish()
        return self._checked(self._sum * (2.0 / self.tokens))

    def take(self) -> Tensor:
        """`matrix` in the accumulator's own memory, which is of no use after that."""
        self._require_tokens()
        self._finish()
        h, scale = self._sum, 2.0 / self.tokens
        self._sum = torch.zeros((0, 0), dtype=h.dtype, device=h.device)
        return self._checked(h.mul_(scale))

    def _require_tokens(self) -> None:
        if self.tokens == 0:
            raise CalibrationError(f"{self.name} was never run on calibration tokens; its Hessian is undefined.")

    def _checked(self, h: Tensor) -> Tensor:
        if not bool(torch.isfinite(h.diagonal()).all()):
            raise CalibrationError(
                f"The Hessian of {self.name} overflowed {h.dtype}: its activations are too large; sum in float64."
            )
        return h
