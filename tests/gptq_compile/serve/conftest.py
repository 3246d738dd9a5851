# SPDX-License-Identifier: Apache-2.0
"""A server on loopback over the toy model."""

from __future__ import annotations

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from gptq_compile.runtime.engine import Engine


@dataclass
class Running:
    """A server that listens. ``url`` has no slash at its end; ``engine`` is a second one, for comparison."""

    url: str
    engine: Engine
    app: Any


@pytest.fixture(scope="session")
def artifact(toy_artifact: pathlib.Path) -> pathlib.Path:
    """The toy artifact; do not change it."""
    return toy_artifact


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
