# SPDX-License-Identifier: Apache-2.0
"""The public face of the runtime: load a compiled model, generate, score."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as Ids
from typing import Any

import numpy as np

from gptq_compile.runtime import chat
from gptq_compile.runtime.artifact import Artifact
from gptq_compile.runtime.cache import PagedCache, default_tokens
from gptq_compile.runtime.decode import DecodeBatch
from gptq_compile.runtime.device import CpuDevice, open_device
from gptq_compile.runtime.errors import ArtifactError, ContextError, LogitsError, RequestError
from gptq_compile.runtime.ffi import load_runtime
from gptq_compile.runtime.hosted import Constraint
from gptq_compile.runtime.manifest import Manifest
from gptq_compile.runtime.sampling import SamplingSettings, stop_strings
from gptq_compile.runtime.scheduler import Scheduler
from gptq_compile.runtime.scoring import log_likelihood, predictions
from gptq_compile.runtime.sequence import GenerationResult, Sequence
from gptq_compile.runtime.stream import TextStream
from gptq_compile.runtime.tokenizer import Tokenizer
from gptq_compile.runtime.vm import Model

log = logging.getLogger(__name__)


class Engine:
    """A loaded artifact. Safe to use from several threads: their requests are batched together.

    Attributes:
        manifest: what the artifact is.
        tokenizer: None if the artifact has none; prompts are then lists of token ids.
        cache: the paged KV cache.
        scheduler: runs requests; ``generate`` and ``runtime.worker`` share it.
    """

    def __init__(self, artifact: Artifact, device: CpuDevice, max_batch: int, cache_tokens: int | None) -> None:
        """Use ``Engine.load``."""
        self.manifest: Manifest = artifact.manifest
        self._device = device
        device.limit_prefill(self.manifest.forward_tokens)
        with device.stream():
            self._model = Model(artifact, device)
            tokens = cache_tokens or default_tokens(self.manifest, device, max_batch)
            self.cache = PagedCache(self.manifest, device, tokens)
            device.synchronize()
        self.tokenizer: Tokenizer | None = None
        if "tokenizer.json" in self.manifest.files:
            path = artifact.path("tokenizer.json")
            self.tokenizer = Tokenizer(path, self.manifest.bos_token_id, self.manifest.add_bos)
        self.scheduler = Scheduler(device, self._model, self.cache, self.manifest.vocab_size, max_batch)
        log.info(
            "Loaded %s on %s; KV cache of %d tokens.", self.manifest.name, device.description(), self.cache.capacity
        )

    @staticmethod
    def load(
        folder: str | os.PathLike[str],
        device: str | None = None,
        max_batch: int = 8,
        cache_tokens: int | None = None,
        verify: bool = True,
    ) -> Engine:
        """Loads what ``gptq-compile`` wrote.

        Args:
            folder: the artifact.
            device: ``cpu``, ``cuda`` or ``cuda:1``; by default what the artifact was compiled for.
            max_batch: most sequences that run together.
            cache_tokens: capacity of the KV cache; by default ``max_batch`` full contexts, if they fit into 1 GiB of
                memory or 60 % of the GPU's free memory.
            verify: check the sha256 of every file, of large ones only if they were touched since they were last found
                right. The shared libraries are checked in any case.

        Raises:
            ArtifactError: if a file is missing, malformed or not the one that was written.
            DeviceError: if the artifact cannot run on this machine.
        """
        if not isinstance(max_batch, int) or max_batch < 1:
            raise RequestError(f"max_batch is {max_batch!r}; it must be 1 or more.")
        if cache_tokens is not None and (not isinstance(cache_tokens, int) or cache_tokens < 1):
            raise RequestError(f"cache_tokens is {cache_tokens!r}; it must be 1 or more.")
        artifact = Artifact(folder, verify)
        manifest = artifact.manifest
        kind, open_it = open_device(device, manifest.target_kind, manifest.archs)
        names = ["libtvm_runtime.so"] + (["libtvm_runtime_cuda.so"] if kind == "cuda" else [])
        for name in names:
            if f"lib/{name}" not in manifest.files:
                raise ArtifactError(
                    f"{artifact.path('manifest.json')}: lib/{name} is not in the list of files, so it cannot be "
                    "trusted. Compile the model again."
                )
        if kind == "cpu":
            artifact.map_ahead()
        load_runtime(artifact.path("lib"), kind == "cuda")
        return Engine(artifact, open_it(), max_batch, cache_tokens)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees graphs and pinned memory; memory of weights and cache goes with the last reference."""
        self.scheduler.close()

    @property
    def context_length(self) -> int:
        """Tokens that one sequence can hold: the model's context, or the KV cache if that is smaller."""
        return self.cache.max_sequence

    @property
    def device(self) -> str:
        """The device in words."""
        return self._device.description()

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Sampling settings that the model's authors recommend; ``generate`` uses what it is given."""
        return self.manifest.generation

    def chat_prompt(self, messages: Ids[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Renders chat messages as a prompt for ``generate``; see ``runtime.chat``."""
        return chat.chat_prompt(self.manifest.chat, messages, add_generation_prompt)

    def generate(
        self,
        prompt: str | Ids[Any],
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Ids[int] = 0,
        stop: str | Ids[str] | None = None,
        stream: bool = False,
        eos_token_id: int | Ids[int] | None = None,
        return_dict_in_generate: bool = False,
        logprobs: int | None = None,
    ) -> Any:
        """Continues prompts. Argument names are those of Hugging Face's GenerationMixin.

        Args:
            prompt: text, or a list of token ids (taken as they are), or a list of those. A list runs as one batch.
            max_new_tokens: most tokens to generate per prompt; the context may end it earlier.
            do_sample: sample instead of taking the most likely token.
            temperature: divides the logits.
            top_k: sample from the k most likely tokens; 0 is all.
            top_p: sample from the most likely tokens that together reach this probability.
            min_p: drop tokens less likely than this times the most likely one.
            repetition_penalty: makes tokens of the prompt and the output less likely; 1 is off.
            seed: same seed, same tokens; one number for all prompts or one for each.
            stop: strings that end the text; they are left out of it.
            stream: return an iterator of text as it is generated; for a list of prompts of (index, text). Its
                ``results`` hold the ``GenerationResult`` objects when it has ended.
            eos_token_id: end tokens instead of the model's; an empty list never ends early.
            return_dict_in_generate: return ``GenerationResult`` objects instead of text.
            logprobs: also report each token's log-probability and those of so many likeliest tokens.

        Returns:
            Text, or a list for a list of prompts; see ``stream`` and ``return_dict_in_generate``.

        Raises:
            ContextError: if a prompt does not fit into the context.
            RequestError: if a setting is out of its range.
            LogitsError: if the model computes NaN or infinite logits.
        """
        single, prompts = self._prompts(prompt)
        eos = self.manifest.eos_token_ids if eos_token_id is None else eos_token_id
        eos = (eos,) if isinstance(eos, int) else tuple(eos)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise RequestError(
                f"There are {len(prompts)} prompts and {len(seeds)} seeds; give one seed or one for each."
            )
        sequences = [
            self.request(
                ids,
                SamplingSettings(
                    max_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, each,
                    stop_strings(stop), eos, logprobs,
                ),
            )
            for ids, each in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
        pieces = self._pieces(sequences)
        if stream:
            return TextStream(pieces, sequences, single)
        for _ in pieces:
            pass
        results = [s.result() for s in sequences]
        outputs: list[Any] = results if return_dict_in_generate else [r.text for r in results]
        return outputs[0] if single else outputs

    def logits(self, ids: Ids[int] | np.ndarray, step: bool = False) -> np.ndarray:
        """Teacher-forced logits of every position.

        Args:
            ids: token ids [n], taken as they are.
            step: feed them one by one through the decode entry instead of in chunks through prefill.

        Returns:
            float32 [n, vocab]; row i is the prediction after ids[i].

        Raises:
            ContextError: if they do not fit into the context.
            RequestError: if a token is outside the vocabulary.
        """
        tokens = self._token_ids(ids)
        result = np.empty((len(tokens), self.manifest.vocab_size), "float32")
        for begin, block in self._teacher_forced(tokens, step):
            result[begin : begin + len(block)] = block
        return result

    def nll(self, ids: Ids[int] | np.ndarray) -> np.ndarray:
        """Negative log-likelihood, in nats, of every token after the first; logits are not kept.

        Returns:
            float64 [n - 1]; entry i is -log p(ids[i + 1] | ids[:i + 1]). Perplexity is exp(mean).
        """
        return -self.score(ids, 1)[0]

    def score(self, ids: Ids[int] | np.ndarray, begin: int) -> tuple[np.ndarray, np.ndarray]:
        """How likely the tokens from ``begin`` on are after those before them; what the cache knows is not computed.

        Args:
            ids: token ids [n], taken as they are.
            begin: the first token to score, 1 or more.

        Returns:
            Log-likelihoods in nats, float64 [n - begin], and whether each token was the most likely one, bool.

        Raises:
            ContextError: if they do not fit into the context.
            RequestError: if there is nothing to score, or a token is outside the vocabulary.
        """
        tokens = self._token_ids(ids, check_context=False)
        if len(tokens) < 2:
            raise RequestError("A text needs two tokens at least to have a likelihood.")
        if not 1 <= begin < len(tokens):
            raise RequestError(f"Token {begin} is not one of {len(tokens)} that have others before them.")
        known, wanted = self._token_ids(tokens[:-1]), tokens[begin:]
        likelihood, best = np.empty(len(wanted), "float64"), np.empty(len(wanted), bool)
        with self.scheduler.lock, self._device.stream():
            admitted = self.cache.admit(known[: begin - 1], len(known))
            row, done = admitted if admitted is not None else (self.cache.allocate(len(known)), 0)
            try:
                for at, rows in self._predictions(known, row, done, begin - 1):
                    targets = wanted[at : at + len(rows)]
                    best[at : at + len(rows)] = rows.argmax(axis=1) == targets
                    likelihood[at : at + len(rows)] = log_likelihood(rows, targets)
                self.cache.record(row, known)
            finally:
                self.cache.release(row)
        return likelihood, best

    def _predictions(
        self, ids: np.ndarray, row: np.ndarray, done: int = 0, first: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        vocab = self.manifest.vocab_size
        return predictions(self._device, self._model, self.cache, vocab, ids, row, done, first)

    def _teacher_forced(self, tokens: np.ndarray, step: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first position, logits float32 [rows, vocab]) in order."""
        with self.scheduler.lock, self._device.stream():
            row = self.cache.allocate(len(tokens))
            try:
                yield from (self._by_steps(tokens, row) if step else self._predictions(tokens, row))
            finally:
                self.cache.release(row)

    def _by_steps(self, tokens: np.ndarray, row: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        size = min(self._model.decode)
        batch = DecodeBatch(self._device, self._model, self.cache, size, self.manifest.vocab_size)
        try:
            for position, token in enumerate(tokens):
                yield position, self._device.download(batch.logits_of(int(token), position, row))[:1]
        finally:
            batch.close()

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt.

        Raises:
            RequestError: if the artifact has no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError("This artifact has no tokenizer. Give the prompt as a list of token ids.")
        return self.tokenizer.encode(text)

    def request(self, ids: Ids[int], settings: SamplingSettings, constraint: Constraint | None = None) -> Sequence:
        """A sequence for ``scheduler.submit``.

        Args:
            ids: the prompt's tokens, taken as they are.
            settings: how to continue it.
            constraint: decides which tokens may come next.

        Raises:
            ContextError: if the prompt does not fit into the context.
            RequestError: if it is empty or has a token outside the vocabulary.
        """
        if len(ids) == 0:
            raise RequestError("The prompt has no tokens. Give at least one.")
        context, capacity = self.manifest.context_length, self.cache.max_sequence
        ids = self._token_ids(ids, check_context=False).tolist()
        if len(ids) >= context:
            raise ContextError(
                f"The prompt has {len(ids)} tokens, and the model's context is {context}, new tokens included. "
                "Shorten the prompt."
            )
        if len(ids) >= capacity:
            raise ContextError(
                f"The prompt has {len(ids)} tokens, and the KV cache holds {capacity}, new tokens included. "
                "Load the engine with a larger cache_tokens."
            )
        limit = min(settings.max_new_tokens, capacity - len(ids))
        return Sequence(ids, settings, limit, self.tokenizer, constraint)

    def _pieces(self, sequences: list[Sequence]) -> Generator[tuple[int, str], None, None]:
        """Runs sequences to their end, yielding (index, text) as it comes; cancels them if the caller leaves."""
        # Submission happens on the first pull: an iterator nobody reads must not hold cache pages.
        try:
            for sequence in sequences:
                self.scheduler.submit(sequence)
            running = list(enumerate(sequences))
            while running:
                if any(s.finish_reason is None for _, s in running):
                    self.scheduler.step()
                for index, sequence in running:
                    while sequence.pieces:
                        yield index, sequence.pieces.popleft()
                    if sequence.finish_reason == "invalid":
                        raise LogitsError(
                            f"The model computed NaN or infinite logits after {sequence.length} tokens of prompt "
                            f"{index + 1}. The weights are damaged, or values overflow the activation dtype."
                        )
                running = [(i, s) for i, s in running if s.finish_reason is None or s.pieces]
        finally:
            for sequence in sequences:
                if sequence.finish_reason is None:
                    self.scheduler.cancel(sequence)

    def _prompts(self, prompt: str | Ids[Any]) -> tuple[bool, list[list[int]]]:
        if isinstance(prompt, str):
            return True, [self.encode(prompt)]
        if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
            prompt = prompt.tolist()
        items = list(prompt)
        if not items:
            raise RequestError("There is no prompt. Give text, a list of token ids, or a list of those.")
        if all(_is_int(i) for i in items):
            return True, [self._token_ids(items, check_context=False).tolist()]
        return False, [
            self.encode(i) if isinstance(i, str) else self._token_ids(i, check_context=False).tolist() for i in items
        ]

    def _token_ids(self, ids: Ids[int] | np.ndarray, check_context: bool = True) -> np.ndarray:
        vocab = self.manifest.vocab_size
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise RequestError("Token ids must be a non-empty list of whole numbers.")
        if array.min() < 0 or array.max() >= vocab:
            bad = array.min() if array.min() < 0 else array.max()
            raise RequestError(f"Token {bad} is outside the model's vocabulary of {vocab}.")
        if check_context and len(array) > self.context_length:
            what = "the model's context" if self.context_length == self.manifest.context_length else "the KV cache"
            raise ContextError(
                f"The text has {len(array)} tokens, and {what} holds {self.context_length}. Give shorter pieces."
            )
        return array.astype("int32")


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


__all__ = ["Engine", "GenerationResult"]
