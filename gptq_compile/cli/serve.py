# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile serve``: OpenAI's routes and a chat page over a compiled model."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pathlib
import socket
from collections.abc import Sequence

from gptq_compile.cli.generation import add_engine_arguments, load_engine
from gptq_compile.cli.output import note_line
from gptq_compile.cli.parser import Parser
from gptq_compile.errors import ConfigError

KEY_VARIABLE = "GPTQ_COMPILE_API_KEY"


def main(argv: Sequence[str]) -> int:
    """Runs the command until Ctrl-C or SIGTERM; returns the exit code."""
    p = Parser(
        prog="gptq-compile serve",
        description="Serves a compiled model: OpenAI's /v1/models, /v1/completions and /v1/chat/completions, a chat\n"
        "page at /, /health, and Prometheus' /metrics. Needs pip install 'gptq-compile[serve]'.",
    )
    p.add_argument("artifact", metavar="OUT", help="the folder that gptq-compile wrote")
    p.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default: 8000)")
    p.add_argument("--model-name", metavar="NAME", help="name that requests give (default: the model's)")
    p.add_argument("--api-key", metavar="KEY", help=f"ask for this key; better given in the variable {KEY_VARIABLE}")
    p.add_argument(
        "--allow-host", action="append", metavar="NAME",
        help="answer to this name in the Host header too; may be given several times, * is any",
    )  # fmt: skip
    p.add_argument(
        "--trace", metavar="FILE",
        help="write what becomes of every request and what the model does when, for Perfetto or chrome://tracing; it "
        "grows by 100 to 250 bytes a token",
    )  # fmt: skip
    limits = p.add_argument_group("limits")
    limits.add_argument("--max-batch", type=int, metavar="N", help="sequences that run at once (default: all it can)")
    limits.add_argument("--max-queue", type=int, default=256, metavar="N", help="that run or wait (default: 256)")
    limits.add_argument("--max-choices", type=int, default=16, metavar="N", help="of one request (default: 16)")
    limits.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longest prompt (default: the context)")
    limits.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the context)")
    limits.add_argument("--max-body", type=int, default=1024, metavar="KIB", help="largest body (default: 1024 KiB)")
    limits.add_argument("--timeout", type=float, default=600, metavar="S", help="of a request (default: 600 s)")
    add_engine_arguments(p)
    arguments = p.parse_args(argv)
    for name in ("max_batch", "max_queue", "max_choices", "max_prompt_tokens", "max_new_tokens", "max_body", "timeout"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be greater than 0.")
    # Before the model is loaded: what is missing or taken shows at once.
    import uvicorn

    from gptq_compile.runtime.manifest import read_manifest
    from gptq_compile.runtime.trace import Trace
    from gptq_compile.serve.app import create_app
    from gptq_compile.serve.settings import ServeSettings

    largest = max(read_manifest(pathlib.Path(arguments.artifact) / "manifest.json").decode)
    listener = _listen(arguments.host, arguments.port)
    with listener, Trace(arguments.trace) as trace, load_engine(arguments, arguments.max_batch or largest) as engine:
        engine.scheduler.trace = trace
        key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
        settings = ServeSettings(
            model=arguments.model_name or engine.manifest.name,
            api_key=key,
            hosts=_hosts(arguments.host, arguments.allow_host or []),
            max_body_bytes=arguments.max_body << 10,
            max_prompt_tokens=arguments.max_prompt_tokens,
            max_new_tokens=arguments.max_new_tokens,
            max_queue=arguments.max_queue,
            max_choices=arguments.max_choices,
            timeout_seconds=arguments.timeout,
        )
        if key is None and not _is_loopback(arguments.host):
            note_line("Anybody who can reach this address can use the model; --api-key asks for a key.")
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        note_line(f"{settings.model} on {engine.device}: http://{shown}:{port}/ (Ctrl-C ends it)")
        config = uvicorn.Config(
            create_app(engine, settings), log_level="warning", lifespan="on", timeout_graceful_shutdown=5,
            timeout_keep_alive=75,  # longer than clients keep a connection, or a request may meet a closing one
            limit_concurrency=4 * settings.max_queue + 64, server_header=False,
        )  # fmt: skip
        server = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    return 0 if server.started else 2


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: if the address does not exist here or is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"Cannot listen on {host}:{port}: {words}. Choose another --host or --port.") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hosts(host: str, allowed: Sequence[str]) -> tuple[str, ...] | None:
    """Host names that are answered: on a loopback address only its own, elsewhere any, unless some are given."""
    from gptq_compile.serve.settings import LOOPBACK

    if "*" in allowed or (not allowed and not _is_loopback(host)):
        return None
    return (*LOOPBACK, host, *allowed)
