# SPDX-License-Identifier: Apache-2.0
"""The toy artifact, built once per test session, and engines on it."""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from gptq_compile.runtime.engine import Engine


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module ``toy_model``, which lies beside this file and in no package."""
    name = "gptq_compile_toy_model"
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name("toy_model.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def artifact(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The toy artifact; do not change it."""
    return toy.write_artifact(tmp_path_factory.mktemp("toy") / "artifact")


@pytest.fixture
def copy(artifact: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the artifact to damage."""
    return pathlib.Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def engine(artifact: pathlib.Path) -> Iterator[Engine]:
    """An engine with room for four full contexts; no page may be left taken."""
    with Engine.load(artifact, cache_tokens=400) as loaded:
        yield loaded
        assert loaded.cache.free_pages == 400 // 16
