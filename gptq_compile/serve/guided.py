# SPDX-License-Identifier: Apache-2.0
"""Output that follows a JSON schema: llguidance says which tokens may come next."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptq_compile.runtime.engine import Engine
from gptq_compile.serve.errors import bad_request

# Without this a model may go on writing blanks for ever.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonGuide:
    """Makes constraints for one model; the table of its tokens is built on first use."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._tokens: Any = None

    def constraint(self, schema: Mapping[str, Any]) -> JsonConstraint:
        """A constraint for one sequence.

        Raises:
            Refusal: if the schema is not one, or llguidance is not there.
        """
        try:
            import llguidance
        except ImportError:
            raise bad_request(
                "JSON output needs the package llguidance on the server: pip install 'gptq-compile[serve]'.",
                "response_format",
            ) from None
        manifest = self._engine.manifest
        with self._lock:
            if self._tokens is None:
                if self._engine.tokenizer is None or not manifest.eos_token_ids:
                    raise bad_request(
                        "This model has no tokenizer or no end token, so its output cannot be held to a schema.",
                        "response_format",
                    )
                text = self._engine.tokenizer.definition()
                self._tokens = llguidance.LLTokenizer(text, manifest.vocab_size, list(manifest.eos_token_ids))
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_COMPACT)
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            words = str(matcher.get_error()).strip().splitlines()[0].rstrip(".")
            raise bad_request(f"The JSON schema cannot be used: {words}.", "response_format")
        return JsonConstraint(matcher, manifest.vocab_size, manifest.eos_token_ids)


class JsonConstraint:
    """``runtime.hosted.Constraint`` over an llguidance matcher."""

    def __init__(self, matcher: Any, vocab: int, eos: tuple[int, ...]) -> None:
        self._matcher, self._vocab, self._eos = matcher, vocab, list(eos)

    def allowed(self) -> np.ndarray:
        """bool [vocab]."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), "uint8"), bitorder="little")
        mask = np.zeros(self._vocab, bool)
        count = min(len(bits), self._vocab)
        mask[:count] = bits[:count]
        if not mask.any():  # the matcher gave up: better an early end than a token that breaks the schema
            mask[self._eos] = True
        return mask

    def accept(self, token: int) -> None:
        """Moves the matcher on."""
        self._matcher.consume_token(token)
