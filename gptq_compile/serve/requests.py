# SPDX-License-Identifier: Apache-2.0
"""What clients may send: the fields of OpenAI's completions and chat completions that mean something here.

Fields that would change the output and are not supported are refused by name; other unknown fields are ignored, because
clients send many that only concern OpenAI's own service.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_compile.runtime.sampling import SamplingSettings, stop_strings
from gptq_compile.serve.errors import bad_request

_UNSUPPORTED = {
    "tools", "tool_choice", "functions", "function_call", "logit_bias", "presence_penalty", "frequency_penalty",
    "suffix", "best_of", "audio", "prediction",
}  # fmt: skip
_NEUTRAL: tuple[Any, ...] = (None, 0, 1, "", [], {}, "none", "auto")  # values that ask for nothing

Kind = TypeVar("Kind", bound="Sampling")
Text = Annotated[str, Field(max_length=1 << 20)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Sampling(BaseModel):
    """Fields that both routes have. What is None is taken from the model's generation config, else as OpenAI does."""

    model_config = ConfigDict(strict=True)
    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    ignore_eos: bool = False
    response_format: dict[str, Any] | None = None

    def settings(
        self,
        defaults: Mapping[str, Any],
        eos: tuple[int, ...],
        max_new_tokens: int,
        logprobs: int | None,
        count: int,
    ) -> list[SamplingSettings]:
        """Settings of ``count`` sequences, which differ in their seed.

        Raises:
            RequestError: if a value is out of its range.
        """

        def value(name: str, otherwise: float) -> float:
            given = getattr(self, name)
            return given if given is not None else defaults.get(name, otherwise)

        temperature = value("temperature", 1.0)
        seed = self.seed if self.seed is not None else secrets.randbelow(1 << 31)
        return [
            SamplingSettings(
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature,
                top_k=int(value("top_k", 0)),
                top_p=value("top_p", 1.0),
                min_p=value("min_p", 0.0),
                repetition_penalty=value("repetition_penalty", 1.0),
                seed=seed + i,
                stop=stop_strings(self.stop),
                eos_token_ids=() if self.ignore_eos else eos,
                logprobs=logprobs,
            )
            for i in range(count)
        ]

    def output_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the output must follow; None if it need not."""
        form = self.response_format or {"type": "text"}
        if form.get("type") == "text":
            return None
        if form.get("type") == "json_object":
            return {"type": "object"}
        inner = form.get("json_schema")
        if form.get("type") == "json_schema" and isinstance(inner, dict) and isinstance(inner.get("schema"), dict):
            return dict(inner["schema"])
        raise bad_request(
            'response_format must be {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", '
            '"json_schema": {"schema": {...}}}.',
            "response_format",
        )


class Completion(Sampling):
    """POST /v1/completions."""

    prompt: Text | list[int] | list[Text] | list[list[int]]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(p, int) for p in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Message(BaseModel):
    """One message of a chat; ``content`` is text or a list of text parts."""

    model_config = ConfigDict(strict=True)
    role: str
    content: Text | list[dict[str, Any]] | None = None


class ChatCompletion(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def parse(kind: type[Kind], body: Any) -> Kind:
    """Checks a body.

    Raises:
        Refusal: naming the field that is wrong.
    """
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    for name in sorted(_UNSUPPORTED & body.keys()):
        if body[name] not in _NEUTRAL:
            raise bad_request(f"{name} is not supported by this server.", name, "unsupported_parameter")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        # Of the alternatives of a field, the one whose type was right says more.
        told = next((e for e in errors if not e["type"].endswith("_type")), errors[0])
        name = str(told["loc"][0])
        where = ".".join([name, *(str(part) for part in told["loc"][1:] if isinstance(part, int))])
        raise bad_request(f"{where}: {told['msg'].rstrip('.')}.", name) from None
