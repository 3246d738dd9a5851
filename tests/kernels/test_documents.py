# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/adding-a-kernel.md."""

from __future__ import annotations

import pathlib

import pytest

from tests.documents import run_examples


def test_the_kernel_that_is_added(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = run_examples("adding-a-kernel.md", tmp_path, monkeypatch)
    assert called == 3 * ["test_it_is_taken_for_one_row_and_right"] + 3 * ["test_it_says_why_it_is_not_taken"]
