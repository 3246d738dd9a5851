# SPDX-License-Identifier: Apache-2.0
"""Refusals, as OpenAI's API words them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from gptq_compile.errors import GptqCompileError


class Refusal(GptqCompileError):
    """A request that is not answered; the message is a sentence.

    Attributes:
        status: of HTTP. ``code``: a word for programs. ``param``: the field that is wrong.
        headers: to send along.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A field that is wrong."""
    return Refusal(400, message, code, param)
