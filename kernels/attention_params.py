# SPDX-License-Identifier: Apache-2.0
"""The attributes of a paged_attention case, checked once for every target."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_compile.kernels.registry import Case, Refusal

DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class AttentionParams:
    """Attributes of paged attention.

    Attributes:
        heads: query heads H.
        kv_heads: key and value heads; H is a multiple. Query head h reads key head h // (H // kv_heads).
        head_dim: D of q and k.
        v_head_dim: Dv of v and of the output.
        page_size: cache positions per page.
        scale: factor on q.k.
        window: positions seen, the token's own included; 0 = all before it.
        softcap: c in c * tanh(score / c); 0 = off.
        has_sinks: an input sinks[H] holds one extra logit of the softmax denominator per head.
        has_alibi: an input alibi_slopes[H] adds slope * (j - position) to the scores.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    scale: float
    window: int
    softcap: float
    has_sinks: bool
    has_alibi: bool

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the optional inputs that this case does not have."""
        flags = (("sinks", self.has_sinks), ("alibi_slopes", self.has_alibi))
        return tuple(name for name, present in flags if not present)

    @staticmethod
    def of(case: Case) -> AttentionParams:
        """Reads the attributes of `case`; only heads, kv_heads and head_dim have no default."""
        head_dim = int(case["head_dim"])
        return AttentionParams(
            heads=int(case["heads"]),
            kv_heads=int(case["kv_heads"]),
            head_dim=head_dim,
            v_head_dim=int(case.get("v_head_dim", head_dim)),
            page_size=int(case.get("page_size", 16)),
            scale=float(case.get("scale", head_dim**-0.5)),
            window=int(case.get("window", 0)),
            softcap=float(case.get("softcap", 0.0)),
            has_sinks=bool(case.get("has_sinks", False)),
            has_alibi=bool(case.get("has_alibi", False)),
        )


def refuse_dtype(case: Case) -> Refusal | None:
    """Refuses types of activations and results other than float32 and float16."""
    for what, dtype in (("activations", case.dtype), ("results", case.get("out_dtype", case.dtype))):
        if dtype not in DTYPES:
            return Refusal(f"{what} are {dtype}; this kernel is written for {' and '.join(DTYPES)}")
    return None


def refuse_heads(case: Case) -> Refusal | None:
    """Refuses query heads that cannot be dealt out to the key heads."""
    p = AttentionParams.of(case)
    if p.heads % p.kv_heads:
        return Refusal(f"{p.heads} query heads are not a multiple of {p.kv_heads} key heads")
    return None


def refuse_attention(case: Case) -> Refusal | None:
    """Refuses what no attention kernel whose cache has the activations' type can do."""
    return refuse_heads(case) or refuse_dtype(case) or refuse_other_cache(case)


def refuse_other_cache(case: Case) -> Refusal | None:
    """Refuses a cache of another type than the activations."""
    cache = case.get("cache_dtype", case.dtype)
    if cache != case.dtype:
        return Refusal(f"the cache is {cache} and activations are {case.dtype}; this kernel is for one type")
    return None


def refuse_rotary(case: Case) -> Refusal | None:
    """Refuses rotary dimensions that are odd or larger than the head."""
    rotary_dim, head_dim = int(case.get("rotary_dim", case["head_dim"])), int(case["head_dim"])
    if rotary_dim % 2 or rotary_dim > head_dim:
        return Refusal(f"rotary_dim {rotary_dim} is not an even number up to head_dim {head_dim}")
    return refuse_dtype(case)
