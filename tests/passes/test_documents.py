# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/adding-a-pass.md."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace

import pytest

from tests.documents import run_examples


def test_the_pass_that_is_added(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, small: SimpleNamespace
) -> None:
    called = run_examples("adding-a-pass.md", tmp_path, monkeypatch, {"small": small})
    assert called == ["test_scales_in_a_row_become_one", "test_what_somebody_else_reads_stays"]
