# SPDX-License-Identifier: Apache-2.0
"""The thread count is narrowed inside and restored outside, whatever happens."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.solver import solve
from gptq_compile.passes.gptq.threads import one_thread


def test_restored_after_use_and_after_errors() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        with one_thread(False):
            assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError), one_thread():
            raise RuntimeError
        solve(torch.eye(8), torch.eye(8), QuantizeConfig(group_size=4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
