# SPDX-License-Identifier: Apache-2.0
"""Calibration sequences: random windows of a text (GPTQ, arXiv 2210.17323, section 4), or text of the model's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptq_compile.errors import CalibrationError
from gptq_compile.frontend.wording import first_line

log = logging.getLogger(__name__)

SELF = "self"
# Generates text: (prompts int64 [b, p], tokens to add, seed) -> int64 [b, tokens to add], sampled at temperature 1 from
# the whole distribution and without stopping at the end-of-sequence token.
Generate = Callable[[NDArray[np.int64], int, int], NDArray[np.int64]]

# Documents of one file are joined with a blank line, as the GPTQ authors do with WikiText.
_SEPARATOR = "\n\n"
# Enough text for the windows asked for: tokens are rarely longer on average. The rest of a huge source is not read.
_CHARS_PER_TOKEN = 16
_MIN_CHARS = 8 << 20
_DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class CalibrationConfig:
    """How many sequences of how many tokens, and the seed that picks them.

    Attributes:
        nsamples: sequences.
        seqlen: tokens of one.
        seed: seeds the windows, the order of a data set, and generation.
        batch: sequences generated at a time for ``self``.
    """

    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("nsamples", "seqlen", "batch"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"{name} is {getattr(self, name)}; calibration needs at least 1.")
        if self.seed < 0:
            raise CalibrationError(f"seed is {self.seed}; use a whole number of at least 0.")


def load_calibration(
    spec: str | None,
    tokenizer: Any,
    config: CalibrationConfig,
    *,
    vocab_size: int,
    generate: Generate | None = None,
) -> NDArray[np.int64]:
    """Calibration sequences; the same spec, tokenizer and config give the same ids.

    Args:
        spec: a ``.txt`` file; a ``.jsonl`` file with a ``text`` field; a ``.npy`` file of token ids (1-D: windows are
            cut; 2-D: its first rows and columns are used as they are); a ``datasets`` name as
            ``name[:config][:split]``; or None or ``self`` for text that the model generates.
        tokenizer: a transformers tokenizer.
        config: sizes and seed.
        vocab_size: rows of the model's logits; no id may reach it.
        generate: samples from the model; needed for ``self``.

    Returns:
        int64 ``[nsamples, seqlen]`` (fewer rows or columns only where a 2-D ``.npy`` has fewer).

    Raises:
        CalibrationError: the source does not exist, cannot be read, is empty, or has fewer than ``seqlen`` tokens.
    """
    if spec is None or spec == SELF:
        if generate is None:
            raise CalibrationError("Calibration on the model's own text needs a way to generate it; give a text file.")
        ids = self_generated(tokenizer, config, vocab_size, generate)
        _check_ids(ids, vocab_size, "the generated text")
        return ids
    path = Path(spec).expanduser()
    if path.suffix == ".npy":
        stored = _read_ids(path)
        _check_ids(stored, vocab_size, str(path))
        if stored.ndim == 2:
            return _rows(stored, config, path)
        return windows(stored, config, str(path))
    if path.is_file():
        documents = _jsonl(path) if path.suffix in (".jsonl", ".json") else _text(path)
    elif path.suffix in (".txt", ".jsonl"):
        raise CalibrationError(f"The calibration file {path} does not exist.")
    else:
        documents = _dataset(spec, config.seed)
    text = _join(documents, config)
    if not text.strip():
        raise CalibrationError(
            f"The calibration text of {spec} is empty; give a text of more than {config.seqlen} tokens."
        )
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    _check_ids(ids, vocab_size, spec)
    return windows(ids, config, spec)


def windows(ids: NDArray[np.int64], config: CalibrationConfig, origin: str) -> NDArray[np.int64]:
    """Cuts random windows of ``seqlen`` tokens (they may overlap) from one long sequence.

    Args:
        ids: int64 ``[n]``.
        config: sizes and seed.
        origin: where the ids are from, for messages.

    Raises:
        CalibrationError: if there are fewer than ``seqlen`` ids.
    """
    spare = len(ids) - config.seqlen
    if spare < 0:
        raise CalibrationError(
            f"The calibration text of {origin} has {len(ids)} tokens, but one sequence takes {config.seqlen}; give a "
            "longer text or a smaller --seqlen."
        )
    if len(ids) < config.nsamples * config.seqlen:
        log.warning(
            "%s has %d tokens for %d sequences of %d, so they overlap.",
            origin,
            len(ids),
            config.nsamples,
            config.seqlen,
        )
    starts = np.random.default_rng(config.seed).integers(0, spare + 1, config.nsamples)
    return np.stack([ids[start : start + config.seqlen] for start in starts])


def self_generated(tokenizer: Any, config: CalibrationConfig, vocab_size: int, generate: Generate) -> NDArray[np.int64]:
    """Sequences the model samples from itself (data-free calibration as in LLM-QAT, arXiv 2305.17888, section 3.1).

    Every other sequence starts with the beginning-of-sequence token, as the model saw its texts start; the rest start
    with a random ordinary token, for variety. All that follows is sampled.

    Args:
        tokenizer: tells special tokens from ordinary ones.
        config: sizes and seed.
        vocab_size: rows of the logits.
        generate: see :data:`Generate`.

    Returns:
        int64 ``[nsamples, seqlen]``.
    """
    rng = np.random.default_rng(config.seed)
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([i for i in range(min(len(tokenizer), vocab_size)) if i not in special], dtype=np.int64)
    if not len(ordinary):
        raise CalibrationError("The tokenizer has only special tokens, so no text can be started.")
    prompts = rng.choice(ordinary, size=(config.nsamples, 1))
    if tokenizer.bos_token_id is not None:
        prompts[::2] = tokenizer.bos_token_id
    if config.seqlen == 1:
        return prompts
    done = []
    for i in range(0, config.nsamples, config.batch):
        start = prompts[i : i + config.batch]
        new = np.asarray(generate(start, config.seqlen - 1, config.seed + i), dtype=np.int64)
        if new.shape != (len(start), config.seqlen - 1):
            raise CalibrationError(
                f"The generator returned ids of shape {list(new.shape)} where {[len(start), config.seqlen - 1]} were "
                "asked for."
            )
        done.append(np.concatenate([start, new], axis=1))
    return np.concatenate(done)


def _check_ids(ids: NDArray[np.int64], vocab_size: int, origin: str) -> None:
    if ids.size == 0:
        raise CalibrationError(f"The calibration ids of {origin} are empty.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"The calibration ids of {origin} run from {low} to {high}, outside the model's vocabulary of "
            f"{vocab_size}: they are from another tokenizer."
        )


def _read_ids(path: Path) -> NDArray[np.int64]:
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CalibrationError(f"The calibration file {path} does not exist.") from None
    except (OSError, ValueError, EOFError) as e:
        raise CalibrationError(f"{path} is not a .npy file of token ids ({e}).") from e
    if not isinstance(ids, np.ndarray) or ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(
            f"{path} must hold whole numbers in one or two dimensions: token ids [n] or [rows, tokens]."
        )
    return ids.astype(np.int64)


def _rows(ids: NDArray[np.int64], config: CalibrationConfig, path: Path) -> NDArray[np.int64]:
    if ids.shape[0] < config.nsamples or ids.shape[1] < config.seqlen:
        log.warning(
            "%s has %d rows of %d tokens; --nsamples %d and --seqlen %d are cut to that.",
            path, *ids.shape, config.nsamples, config.seqlen,
        )  # fmt: skip
    return ids[: config.nsamples, : config.seqlen].copy()


def _text(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="") as f:
            while chunk := f.read(1 << 20):
                yield chunk
    except UnicodeDecodeError as e:
        raise CalibrationError(f"The calibration file {path} is not UTF-8 text ({e}).") from e
    except OSError as e:
        raise CalibrationError(f"The calibration file {path} cannot be read: {e.strerror}.") from e


def _jsonl(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as e:
                    raise CalibrationError(
                        f'Line {number} of {path} is not a JSON object with a "text" field ({e!r}).'
                    ) from e
                if not isinstance(text, str):
                    raise CalibrationError(f'The "text" field in line {number} of {path} is not a string.')
                yield text + _SEPARATOR
    except UnicodeDecodeError as e:
        raise CalibrationError(f"The calibration file {path} is not UTF-8 text ({e}).") from e
    except OSError as e:
        raise CalibrationError(f"The calibration file {path} cannot be read: {e.strerror}.") from e


def _dataset(spec: str, seed: int) -> Iterator[str]:
    """Texts of a ``datasets`` name, streamed in an order that the seed picks."""
    name, _, rest = spec.partition(":")
    subset, _, split = rest.rpartition(":") if ":" in rest else (rest, "", "")
    try:
        import datasets
    except ImportError as e:
        raise CalibrationError(
            f"{spec} is no file, and data sets need the datasets package: pip install datasets."
        ) from e
    try:
        stream = datasets.load_dataset(name, subset or None, split=split or _DEFAULT_SPLIT, streaming=True)
        column = _text_column(stream, spec)
        for row in stream.shuffle(seed=seed, buffer_size=10_000):
            if row[column]:
                yield row[column] + _SEPARATOR
    except CalibrationError:
        raise
    except Exception as e:  # the network, the hub, the name, the subset, the split, the format: each its own class
        raise CalibrationError(
            f"{spec} is neither a file here nor a data set that can be loaded ({first_line(e)}). Write it "
            "as name[:config][:split], or give a text file."
        ) from e


def _text_column(stream: Any, spec: str) -> str:
    row = next(iter(stream), None)
    if row is None:
        raise CalibrationError(f"The data set {spec} is empty.")
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if not columns:
        raise CalibrationError(f"The data set {spec} has no text column; it has {', '.join(row)}.")
    return "text" if "text" in columns else columns[0]


def _join(documents: Iterator[str], config: CalibrationConfig) -> str:
    """Concatenates documents up to what the windows can use."""
    limit = max(_MIN_CHARS, _CHARS_PER_TOKEN * config.nsamples * config.seqlen)
    parts, size = [], 0
    for document in documents:
        parts.append(document)
        size += len(document)
        if size >= limit:
            log.info("The calibration text is cut after %d characters.", size)
            break
    return "".join(parts)
