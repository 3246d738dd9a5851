# SPDX-License-Identifier: Apache-2.0
"""A server on loopback over the toy model of the runtime's tests, with a longer context."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from gptq_compile.runtime.engine import Engine

CONTEXT = 512


@dataclass
class Running:
    """A server that listens. ``url`` has no slash at its end; ``engine`` is a second one, for comparison."""

    url: str
    engine: Engine
    app: Any


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module ``toy_model`` of the runtime's tests."""
    name = "gptq_compile_toy_model"
    path = pathlib.Path(__file__).parents[2] / "runtime" / "toy_model.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def artifact(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The toy artifact with a context of 512; do not change it."""
    folder = toy.write_artifact(tmp_path_factory.mktemp("toy") / "artifact")
    manifest = toy.manifest()
    manifest["model"]["context_length"] = CONTEXT
    toy.write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="session")
def serve(artifact: pathlib.Path) -> Callable[..., Any]:
    """``with serve(cache_tokens=..., **settings) as running``: a server for the time of a block."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from gptq_compile.serve.app import create_app
    from gptq_compile.serve.settings import ServeSettings

    @contextlib.contextmanager
    def start(cache_tokens: int = 2048, **settings: Any) -> Iterator[Running]:
        with Engine.load(artifact, cache_tokens=cache_tokens) as engine, Engine.load(artifact) as other:
            app = create_app(engine, ServeSettings(model="toy", **settings))
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=3))
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            try:
                yield Running(f"http://127.0.0.1:{port}", other, app)
            finally:
                server.should_exit = True
                thread.join(20)
            assert not thread.is_alive()
            assert engine.cache.free_pages == engine.cache.pages and engine.scheduler.running == 0

    return start


@pytest.fixture(scope="module")
def running(serve: Callable[..., Any]) -> Iterator[Running]:
    """One server for the tests of a file."""
    with serve() as started:
        yield started
