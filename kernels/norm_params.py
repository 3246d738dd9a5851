# SPDX-License-Identifier: Apache-2.0
"""The attributes of rms_norm and layer_norm cases, checked once for every target."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_compile.kernels.registry import Case, Refusal

DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class NormParams:
    """Attributes of a norm over rows of x[m, C]; statistics are float32 whatever the types.

    The three types are independent: a norm that reads a float32 residual stream and feeds products in half precision
    rounds once, when it stores its result.

    Attributes:
        channels: C.
        eps: added to the second moment.
        weight_offset: added to the weight (Gemma: 1); rms_norm only.
        has_weight: an input weight[C] scales the result.
        has_bias: an input bias[C] is added; layer_norm only.
        dtype: type of x.
        weight_dtype: type of weight and bias; by default that of x.
        out_dtype: type of the result; by default that of x.
    """

    channels: int
    eps: float
    weight_offset: float
    has_weight: bool
    has_bias: bool
    dtype: str
    weight_dtype: str
    out_dtype: str

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the optional inputs that this case does not have."""
        flags = (("weight", self.has_weight), ("bias", self.has_bias))
        return tuple(name for name, present in flags if not present)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types of everything the kernel loads or stores."""
        return self.dtype, self.weight_dtype, self.out_dtype

    @staticmethod
    def of(case: Case) -> NormParams:
        """Reads the attributes of `case`; only channels and eps have no default."""
        return NormParams(
            channels=int(case["channels"]),
            eps=float(case["eps"]),
            weight_offset=float(case.get("weight_offset", 0.0)),
            has_weight=bool(case.get("has_weight", True)),
            has_bias=case.op == "layer_norm" and bool(case.get("has_bias", True)),
            dtype=case.dtype,
            weight_dtype=str(case.get("weight_dtype", case.dtype)),
            out_dtype=str(case.get("out_dtype", case.dtype)),
        )


def refuse_norm(case: Case) -> Refusal | None:
    """Refuses other types than float32 and float16; any mixture of the two is fine."""
    for what, dtype in zip(("activations", "weights", "outputs"), NormParams.of(case).dtypes, strict=True):
        if dtype not in DTYPES:
            return Refusal(f"{what} are {dtype}; this kernel is written for {' and '.join(DTYPES)}")
    return None
