# SPDX-License-Identifier: Apache-2.0
"""Settings of one quantization run, checked once, before any model is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from gptq_compile.errors import ConfigError

BITS = (2, 3, 4, 8)
METHODS = ("gptq", "rtn")
SEQUENTIAL = ("true", "block")
TOKEN_WEIGHTINGS = ("gradient", "none")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class QuantizeConfig:
    """How weights are rounded, and what the rounding is calibrated on.

    The defaults process columns by decreasing activation energy on grids fitted in the natural column order
    (`act_order` + `static_groups`): better than the natural order on LLaMA-style models, and free at run time.

    Attributes:
        wbits: Bits of one weight code: 2, 3, 4 or 8.
        group_size: Input features that share a scale; -1 is one group per output row.
        sym: Symmetric grid around the fixed zero point 2^(bits-1); otherwise a zero point per group.
        method: "gptq", or "rtn" (round to nearest, no calibration).
        act_order: Quantize columns in order of decreasing diag(H).
        static_groups: Fit all grids on the natural groups before the column loop, so that `act_order` needs no
            run-time permutation.
        damp: Added to the Hessian's diagonal, as a fraction of its mean. The paper's 0.01 (section 3.3) fits the
            calibration text more closely than other text bears: 0.1 is better on every kind of linear (RESULTS.md).
        block_size: Columns between two lazy updates of the remaining weights (paper section 3.3: 128).
        mse: Search clipped ranges for the smallest weighted squared error instead of taking min and max. By default
            GPTQ does and round to nearest, the plain baseline, does not.
        sequential: "true" re-runs the model after each solve point; "block" after each transformer block.
        nsamples: Calibration sequences.
        seqlen: Tokens of one calibration sequence.
        seed: Seed of the calibration sampling.
        quantize_lm_head: Quantize the output projection too.
        token_weighting: How calibration tokens are weighted in the Hessian: "gradient" (by the squared gradient of the
            model's loss, see `passes/gradients.py`) or "none" (equally, as the paper does).
        token_strength: Weight of the gradients against equal weights.
        avg_bits: Choose bits and group size of each linear so that quantized weights take this many bits on average,
            scales and zero points included; `wbits` is not read then, and `group_size` is the largest group.
        max_size: The same with the bytes of all weights of the artifact as the bound.
        max_ppl_increase: The same with the relative increase of perplexity (0.05 is 5 %) on held-out calibration
            sequences as the bound, measured before scales are tuned.
        compute_dtype: Type in which the calibration sequences run through the model. "auto" is float32 on a CPU, and on
            a GPU the type that the model's config names (float32 if it names none).
        tune_epochs: Passes over the calibration sequences in which scales and norm weights are tuned end to end after
            all codes are fixed, see `passes/tune_scales.py`; 0 leaves them as they were solved.
        tune_nsamples: Sequences that the original model writes itself, as long as those for calibration, to tune on
            besides them: no scale gets a gradient of its own from few tokens.
        min_zero: Smallest zero point of asymmetric grids: 0, or 1 for checkpoints that store zero points minus 1.
    """

    wbits: int = 4
    group_size: int = 128
    sym: bool = False
    method: str = "gptq"
    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.1
    block_size: int = 128
    mse: bool | None = None
    sequential: str = "true"
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0
    quantize_lm_head: bool = False
    token_weighting: str = "gradient"
    token_strength: float = 1.0
    avg_bits: float | None = None
    max_size: int | None = None
    max_ppl_increase: float | None = None
    compute_dtype: str = "auto"
    tune_epochs: int = 0
    tune_nsamples: int = 0
    min_zero: int = 0

    def __post_init__(self) -> None:
        if not _is_int(self.wbits) or self.wbits not in BITS:
            raise ConfigError(f"wbits is {self.wbits!r}; codes have 2, 3, 4 or 8 bits.")
        if not _is_int(self.group_size) or (self.group_size < 1 and self.group_size != -1):
            raise ConfigError(
                f"group_size is {self.group_size!r}; use a positive number of input features, "
                "or -1 for one group per row."
            )
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; use one of {', '.join(METHODS)}.")
        if self.sequential not in SEQUENTIAL:
            raise ConfigError(f"sequential is {self.sequential!r}; use one of {', '.join(SEQUENTIAL)}.")
        if self.mse is not None and not isinstance(self.mse, bool):
            raise ConfigError(f"mse is {self.mse!r}; it is a switch, true or false, or None for the method's default.")
        for name in ("sym", "act_order", "static_groups", "quantize_lm_head"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it is a switch, true or false.")
        if isinstance(self.damp, bool) or not isinstance(self.damp, int | float):
            raise ConfigError(f"damp is {self.damp!r}; use a number above 0, for example 0.01.")
        if not (math.isfinite(self.damp) and self.damp > 0):
            raise ConfigError(f"damp is {self.damp!r}; the fraction of mean(diag(H)) must be finite and above 0.")
        for name in ("block_size", "nsamples", "seqlen"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use a whole number of at least 1.")
        if not _is_int(self.seed) or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}; use a whole number of at least 0.")
        if self.token_weighting not in TOKEN_WEIGHTINGS:
            raise ConfigError(f"token_weighting is {self.token_weighting!r}; use one of {', '.join(TOKEN_WEIGHTINGS)}.")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ConfigError(f"compute_dtype is {self.compute_dtype!r}; use one of {', '.join(COMPUTE_DTYPES)}.")
        if isinstance(self.token_strength, bool) or not isinstance(self.token_strength, int | float):
            raise ConfigError(f"token_strength is {self.token_strength!r}; use a number of at least 0.")
        if not (math.isfinite(self.token_strength) and self.token_strength >= 0):
            raise ConfigError(f"token_strength is {self.token_strength!r}; it must be finite and at least 0.")
        if not _is_int(self.tune_epochs) or self.tune_epochs < 0:
            raise ConfigError(f"tune_epochs is {self.tune_epochs!r}; use a whole number of at least 0.")
        if self.tune_epochs and self.method != "gptq":
            raise ConfigError("tune_epochs tunes scales on calibration tokens, so the method must be gptq.")
        if not _is_int(self.tune_nsamples) or self.tune_nsamples < 0:
            raise ConfigError(f"tune_nsamples is {self.tune_nsamples!r}; use a whole number of at least 0.")
        if self.tune_nsamples and not self.tune_epochs:
            raise ConfigError(
                "tune_nsamples is text that scales are tuned on, but nothing is tuned; give tune_epochs as well, as 4."
            )

        if not _is_int(self.min_zero) or self.min_zero not in (0, 1):
            raise ConfigError(f"min_zero is {self.min_zero!r}; the smallest zero point is 0 or 1.")
        self._check_budget()

    def _check_budget(self) -> None:
        given = [n for n in ("avg_bits", "max_size", "max_ppl_increase") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} were given, but there can be one budget only.")
        if not given:
            return
        if self.method != "gptq":
            raise ConfigError(f"{given[0]} is kept by measuring on calibration tokens, so the method must be gptq.")
        value = getattr(self, given[0])
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{given[0]} is {value!r}; use a number above 0.")

    @property
    def budgeted(self) -> bool:
        """Whether bits and group size are chosen per linear."""
        return any(v is not None for v in (self.avg_bits, self.max_size, self.max_ppl_increase))

    @property
    def clips(self) -> bool:
        """Whether grids are searched (`mse` with the method's default filled in)."""
        return self.method == "gptq" if self.mse is None else self.mse

    @property
    def max_code(self) -> int:
        """Largest code, 2^bits - 1."""
        return (1 << self.wbits) - 1

    @property
    def permutes(self) -> bool:
        """Whether groups may follow a permuted column order, which a checkpoint stores as g_idx."""
        return self.method == "gptq" and self.act_order and not self.static_groups and self.group_size != -1

    def group_for(self, in_features: int) -> int:
        """Columns of a full group in a layer of `in_features` columns (-1 resolved)."""
        return in_features if self.group_size == -1 else self.group_size

    def groups_in(self, in_features: int) -> int:
        """Number of groups of a layer, counting a short last one."""
        return -(-in_features // self.group_for(in_features))

    def validate_for_layer(self, in_features: int, name: str = "linear") -> None:
        """Check the settings against one layer.

        Args:
            in_features: Columns of the layer's weight.
            name: Module path, for the message.

        Raises:
            ConfigError: The group is larger than the layer.
        """
        if in_features < 1:
            raise ConfigError(f"{name} has {in_features} input features; there is nothing to quantize.")
        if self.group_size > in_features:
            raise ConfigError(
                f"{name} has {in_features} input features but group_size is {self.group_size}; "
                f"use a group of at most {in_features}, or -1 for one group per row."
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a manifest; `QuantizeConfig.from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizeConfig:
        """Build from plain values.

        Raises:
            ConfigError: A name is unknown or a value is outside its range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"Unknown quantization settings {', '.join(unknown)}; known are {', '.join(sorted(known))}."
            )
        return cls(**values)
