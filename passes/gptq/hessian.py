# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a linear's squared output error with respect to one weight row: H = 2/n sum_t d_t x_t x_t^T."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_compile.errors import CalibrationError


class Hessian:
    """Accumulates H over calibration tokens (paper section 3.1, equation 2, as a mean over tokens).

    The plain sum and the token count are kept and divided at the end, so the result does not depend on how the
    calibration set is cut into calls, up to rounding of the sums.

    Args:
        features: Input features K of the linear.
        dtype: Type of the sums, float32 or float64.
        device: Where the sums live; inputs are expected there.
        name: What is observed (module path or value name), for messages.
    """

    def __init__(
        self,
        features: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "activation",
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise CalibrationError(f"The Hessian of {name} was asked to sum in {dtype}; use float32 or float64.")
        self.name = name
        self.tokens = 0
        self._sum = torch.zeros(features, features, dtype=dtype, device=device)

    @property
    def features(self) -> int:
        """Input features K."""
        return self._sum.shape[0]

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
        if x.shape[0] == 0:
            return
        bad = ~torch.isfinite(x)
        if bool(bad.any()):
            token, feature = (int(i) for i in bad.nonzero()[0])
            raise CalibrationError(
                f"{self.name} holds {int(bad.sum())} NaN or infinite activations in calibration tokens "
                f"{self.tokens} to {self.tokens + x.shape[0] - 1}, first at token {self.tokens + token}, "
                f"feature {feature}; check the model's weights, or calibrate in float32."
            )
        dtype = self._sum.dtype
        if weights is None and x.is_cuda and dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
            # Tensor cores multiply 16-bit inputs exactly and sum in float32.
            self._sum += torch.mm(x.t(), x, out_dtype=torch.float32)
        else:
            x = x.to(dtype)
            if weights is not None:
                # Weights enter as sqrt(d) on both sides, which keeps the product symmetric.
                x = x * self._roots(weights, x.shape[0]).unsqueeze(1)
            self._sum.addmm_(x.t(), x)
        self.tokens += x.shape[0]

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
        self._sum += other._sum.to(self._sum)
        self.tokens += other.tokens

    def matrix(self) -> Tensor:
        """H [K, K] in the accumulator's type.

        Raises:
            CalibrationError: No token was added, or the sums overflowed.
        """
        if self.tokens == 0:
            raise CalibrationError(f"{self.name} was never run on calibration tokens; its Hessian is undefined.")
        h = self._sum * (2.0 / self.tokens)
        if not bool(torch.isfinite(h.diagonal()).all()):
            raise CalibrationError(
                f"The Hessian of {self.name} overflowed {self._sum.dtype}: its activations are too large; "
                "sum in float64."
            )
        return h
