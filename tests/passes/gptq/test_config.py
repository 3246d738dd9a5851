# SPDX-License-Identifier: Apache-2.0
"""Settings are refused in sentences before any work starts."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_compile.errors import ConfigError
from gptq_compile.passes.gptq.config import QuantizeConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"wbits": 5}, "wbits is 5"),
        ({"wbits": 4.0}, "wbits is 4.0"),
        ({"wbits": True}, "wbits is True"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": -2}, "group_size is -2"),
        ({"group_size": 1.5}, "group_size is 1.5"),
        ({"damp": 0}, "damp is 0"),
        ({"damp": -0.1}, "damp is -0.1"),
        ({"damp": float("nan")}, "damp is nan"),
        ({"damp": float("inf")}, "damp is inf"),
        ({"damp": "much"}, "damp is 'much'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"method": "awq"}, "method is 'awq'"),
        ({"sequential": "layer"}, "sequential is 'layer'"),
        ({"nsamples": 0}, "nsamples is 0"),
        ({"seqlen": -1}, "seqlen is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"sym": 1}, "sym is 1"),
        ({"act_order": None}, "act_order is None"),
        ({"token_weighting": ""}, "token_weighting is ''"),
        ({"token_weighting": "attention"}, "use one of gradient, none"),
        ({"token_strength": -1}, "token_strength is -1"),
        ({"avg_bits": 3.5, "max_size": 10}, "avg_bits and max_size were given"),
        ({"avg_bits": float("nan")}, "avg_bits is nan"),
        ({"max_size": 0}, "max_size is 0"),
        ({"max_ppl_increase": True}, "max_ppl_increase is True"),
        ({"avg_bits": 3.5, "method": "rtn"}, "the method must be gptq"),
        ({"bits": 4}, "Unknown quantization settings bits"),
    ],
)
def test_refusals(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantizeConfig.from_dict(values)
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")


def test_round_trip() -> None:
    config = QuantizeConfig(wbits=3, group_size=-1, sym=True, token_weighting="gradient")
    assert QuantizeConfig.from_dict(config.as_dict()) == config


def test_groups_of_a_layer() -> None:
    config = QuantizeConfig(group_size=128)
    config.validate_for_layer(128)
    assert [config.groups_in(k) for k in (128, 129, 576)] == [1, 2, 5]
    assert QuantizeConfig(group_size=-1).groups_in(576) == 1
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.q_proj has 96 input features but group_size is 128"):
        config.validate_for_layer(96, "model.layers.0.q_proj")
    with pytest.raises(ConfigError, match="nothing to quantize"):
        config.validate_for_layer(0)


def test_only_plain_act_order_permutes_groups() -> None:
    assert not QuantizeConfig().permutes
    assert QuantizeConfig(static_groups=False).permutes
    assert not QuantizeConfig(static_groups=False, group_size=-1).permutes
    assert not QuantizeConfig(static_groups=False, act_order=False).permutes
