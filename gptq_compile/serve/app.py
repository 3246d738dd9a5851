# SPDX-License-Identifier: Apache-2.0
"""The routes."""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import ContextError, RequestError
from gptq_compile.runtime.sequence import Sequence
from gptq_compile.serve.answers import Answer
from gptq_compile.serve.errors import Refusal, bad_request
from gptq_compile.serve.guided import JsonGuide
from gptq_compile.serve.metrics import CONTENT_TYPE
from gptq_compile.serve.page import page
from gptq_compile.serve.requests import ChatCompletion, Completion, Sampling, parse
from gptq_compile.serve.service import Service, Ticket
from gptq_compile.serve.settings import ServeSettings


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """The ASGI application; its worker runs from startup to shutdown."""
    service = Service(engine, settings)
    guide = JsonGuide(engine)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="gptq-compile", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(_Gate, service=service)  # type: ignore[arg-type]

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return Refusal(error.status_code, message, "not_found").response()

    @app.get("/")
    async def chat_page() -> Response:
        content, policy = page()
        return Response(content, media_type="text/html", headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> Response:
        if service.failure is not None:
            return JSONResponse({"status": "failing", "reason": service.failure}, 503)
        return JSONResponse({"status": "ok", "model": settings.model, "device": engine.device})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics(), media_type=CONTENT_TYPE)

    def card() -> dict[str, Any]:
        return {
            "id": settings.model, "object": "model", "created": created, "owned_by": "gptq-compile",
            "context_length": engine.context_length, "chat": engine.manifest.chat is not None,
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(name, settings)
        return JSONResponse(card())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(Completion, await read_json(request, settings))
        _check_model(asked.model, settings)
        prompts, each = asked.prompts, asked.n or 1
        _check_choices(len(prompts) * each, settings)
        sequences = await asyncio.to_thread(_sequences, asked, prompts, asked.max_tokens or 16, asked.logprobs)
        echo = []
        if asked.echo:
            if asked.logprobs is not None:
                raise bad_request("Log-probabilities of an echoed prompt are not supported.", "echo")
            echo = [_text(engine, prompt) for prompt in prompts for _ in range(each)]
        answer = Answer(False, settings.model, sequences, each, engine.tokenizer, echo)
        return await _respond(request, asked, sequences, answer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse(ChatCompletion, await read_json(request, settings))
        _check_model(asked.model, settings)
        each = asked.n or 1
        _check_choices(each, settings)
        messages = [
            {
                "role": "system" if m.role == "developer" else m.role,
                "content": m.content if m.content is not None else "",
            }
            for m in asked.messages
        ]
        wanted = asked.max_completion_tokens or asked.max_tokens or engine.context_length
        if asked.top_logprobs is not None and not asked.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        try:
            prompt = engine.chat_prompt(messages)
        except RequestError as error:
            raise bad_request(str(error), "messages") from None
        sequences = await asyncio.to_thread(_sequences, asked, [prompt], wanted, logprobs)
        answer = Answer(True, settings.model, sequences, each, engine.tokenizer)
        return await _respond(request, asked, sequences, answer)

    def _sequences(asked: Sampling, prompts: list[Any], max_new_tokens: int, logprobs: int | None) -> list[Sequence]:
        """One sequence for each choice, prompt by prompt."""
        field = "messages" if isinstance(asked, ChatCompletion) else "prompt"
        limit = settings.max_new_tokens
        if limit is not None:
            explicit = getattr(asked, "max_completion_tokens", None) or asked.max_tokens  # type: ignore[attr-defined]
            if explicit and explicit > limit:
                raise bad_request(f"This server generates at most {limit} tokens.", "max_tokens")
            max_new_tokens = min(max_new_tokens, limit)
        schema = asked.output_schema()
        each = asked.n or 1
        try:
            chosen = asked.settings(
                engine.generation_defaults, engine.manifest.eos_token_ids, max_new_tokens, logprobs, len(prompts) * each
            )
        except RequestError as error:
            raise bad_request(str(error)) from None
        sequences = []
        for i, one in enumerate(chosen):
            prompt = prompts[i // each]
            try:
                ids = engine.encode(prompt) if isinstance(prompt, str) else prompt
                if settings.max_prompt_tokens is not None and len(ids) > settings.max_prompt_tokens:
                    raise ContextError(
                        f"The prompt has {len(ids)} tokens, and this server takes {settings.max_prompt_tokens}."
                    )
                constraint = guide.constraint(schema) if schema is not None else None
                sequences.append(engine.request(ids, one, constraint))
            except ContextError as error:
                raise bad_request(str(error), field, "context_length_exceeded") from None
            except RequestError as error:
                raise bad_request(str(error), field) from None
        return sequences

    async def _respond(request: Request, asked: Sampling, sequences: list[Sequence], answer: Answer) -> Response:
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            # Opened here, so that a refusal still has a status of its own.
            ticket = service.open(sequences)
            return EventStream(_events(ticket, answer, usage), functools.partial(service.close, ticket))

        async def collect() -> Response:
            ticket = service.open(sequences)
            try:
                async for news in ticket.updates():
                    if news is not None:
                        answer.add(*news)
            finally:
                service.close(ticket)
            return JSONResponse(answer.whole())

        return await until_disconnect(request.receive, collect()) or Response(status_code=499)

    return app


async def _events(ticket: Ticket, answer: Answer, usage: bool) -> AsyncIterator[dict[str, Any] | None]:
    """The chunks of a stream; None where it only shows that it is alive."""
    try:
        for chunk in answer.opening():
            yield chunk
        async for news in ticket.updates():
            if news is None:
                yield None
                continue
            for chunk in answer.chunks(*news):
                yield chunk
        if usage:
            yield answer.usage_chunk()
    except Refusal as refusal:
        yield refusal.body


class EventStream(Response):
    """Server-sent events; ends its source when the client leaves, even while there is nothing to send."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any] | None], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything."""
        try:
            await until_disconnect(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        failed = False
        async for event in self._events:
            failed = failed or (event is not None and "error" in event)
            text = ": waiting\n\n" if event is None else f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        end = b"" if failed else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def until_disconnect(receive: Receive, work: Any) -> Any:
    """Awaits a coroutine, but cancels it when the client disconnects; the request's body has been read.

    Returns:
        Its result, or None after a disconnect.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def read_json(request: Request, settings: ServeSettings) -> Any:
    """The body as JSON.

    Raises:
        Refusal: if it is too large, too slow, or not JSON.
    """
    # A form of a page on another site can send text, but not this type.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "The body must be JSON, sent as application/json.", "unsupported_media_type")
    too_large = Refusal(413, f"The body has more than {settings.max_body_bytes} bytes.", "body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > settings.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > settings.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, "The body did not arrive in time.", "timeout") from None
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError):
        raise bad_request("The body is not valid JSON.", code="invalid_json") from None


def _check_model(name: str, settings: ServeSettings) -> None:
    if name != settings.model:
        raise Refusal(404, f"There is no model {name!r} here; there is {settings.model!r}.", "model_not_found", "model")


def _check_choices(count: int, settings: ServeSettings) -> None:
    if count > settings.max_choices:
        raise bad_request(f"The request asks for {count} choices, and this server makes {settings.max_choices}.", "n")


def _text(engine: Engine, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return engine.tokenizer.decode(prompt) if engine.tokenizer is not None else ""


class _Gate:
    """What is checked before any route: the host's name and the key; and what is counted after."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service, self._settings = app, service, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(Request(scope))
        try:
            await (refusal.response() if refusal else self._app)(scope, receive, counting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.http_requests.add(1, route, str(status))

    def _refusal(self, request: Request) -> Refusal | None:
        settings = self._settings
        if settings.hosts is not None and (request.url.hostname or "") not in settings.hosts:
            return Refusal(403, f"This server does not answer as {request.url.hostname!r}.", "unknown_host")
        guarded = request.url.path.startswith("/v1/") or request.url.path == "/metrics"
        if settings.api_key is not None and guarded:
            given = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {settings.api_key}".encode()):
                return Refusal(401, "The API key is missing or wrong.", "invalid_api_key")
        return None
