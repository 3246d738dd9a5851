# SPDX-License-Identifier: Apache-2.0
"""Reads and validates ``manifest.json`` (schema 1) into frozen dataclasses."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptq_compile.runtime.errors import ArtifactError

SCHEMA_VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
CACHE_DTYPES = (*DTYPES, "int8")
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint32", "int8", "uint8", "bool")


@dataclass(frozen=True)
class CacheLayer:
    """Geometry of one layer's KV cache."""

    kv_heads: int
    head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class Weight:
    """One element of the weights tuple."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hash of one file of the artifact."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What the artifact is; see the artifact chapter of the documentation for each field."""

    name: str
    vocab_size: int
    context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    target_kind: str
    archs: tuple[str, ...]
    dtype: str
    page_size: int
    cache_dtype: str
    cache_layers: tuple[CacheLayer, ...]
    forward: str
    forward_tokens: int | None  # of one call at most
    decode: Mapping[int, str]
    sample: str
    repetition_penalty: str
    mark_seen: str
    advance: str
    library: str
    libraries: Mapping[str, str]  # architecture -> file, where there are several; the first is `library`
    weights: tuple[Weight, ...]
    generation: Mapping[str, Any]
    chat: Mapping[str, Any] | None
    files: Mapping[str, FileEntry]
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes over all layers."""
        item = {"float32": 4, "int8": 1}.get(self.cache_dtype, 2)
        return item * sum(c.kv_heads * sum(self.cache_widths(c)) for c in self.cache_layers)

    def cache_widths(self, layer: CacheLayer) -> tuple[int, int]:
        """Elements of a token's key and of its value in the cache: an int8 row has its float32 scale with it."""
        extra = 4 if self.cache_dtype == "int8" else 0
        return layer.head_dim + extra, layer.v_head_dim + extra


class _Reader:
    """Typed access to a JSON object; every complaint names the file and the field."""

    def __init__(self, path: pathlib.Path, data: Any, where: str = "") -> None:
        self.path, self.where = path, where
        if not isinstance(data, dict):
            raise self.error("", f"is {_kind(data)}, not an object")
        self.data = data

    def error(self, key: str, what: str) -> ArtifactError:
        name = ".".join(part for part in (self.where, key) if part) or "the document"
        return ArtifactError(
            f"{self.path}: {name} {what}. Compile the model again or restore the file from its source."
        )

    def get(self, key: str, types: type | tuple[type, ...], optional: bool = False) -> Any:
        if key not in self.data or (optional and self.data[key] is None):
            if optional:
                return None
            raise self.error(key, "is missing")
        value = self.data[key]
        types = types if isinstance(types, tuple) else (types,)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.error(key, f"is {_kind(value)}, not {' or '.join(t.__name__ for t in types)}")
        return value

    def integer(self, key: str, low: int, high: int = 1 << 40) -> int:
        value = self.get(key, int)
        if not low <= value <= high:
            raise self.error(key, f"is {value}, outside {low} to {high}")
        return value

    def text(self, key: str) -> str:
        value = self.get(key, str)
        if not value:
            raise self.error(key, "is empty")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.get(key, str)
        if value not in choices:
            raise self.error(key, f"is {value!r}, not one of {', '.join(choices)}")
        return value

    def child(self, key: str) -> _Reader:
        return _Reader(self.path, self.get(key, dict), f"{self.where}.{key}".lstrip("."))

    def children(self, key: str) -> list[_Reader]:
        return [
            _Reader(self.path, v, f"{self.where}.{key}[{i}]".lstrip(".")) for i, v in enumerate(self.get(key, list))
        ]


def read_manifest(path: pathlib.Path) -> Manifest:
    """Reads ``manifest.json``.

    Raises:
        ArtifactError: naming the file and the field that is wrong.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist, so {path.parent} is not a compiled model. Give the folder that gptq-compile wrote."
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.") from error
    top = _Reader(path, raw)
    if top.get("format", str) != "gptq-compile":
        raise top.error("format", f"is {raw['format']!r}, not 'gptq-compile'")
    version = top.get("schema_version", int)
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version}, and this runtime reads version {SCHEMA_VERSION}. "
            f"{'Update gptq-compile' if version > SCHEMA_VERSION else 'Compile the model again'}."
        )
    model, target, cache = top.child("model"), top.child("target"), top.child("kv_cache")
    entries = top.child("entries")
    vocab = model.integer("vocab_size", 1, 1 << 31)
    files = _files(top)
    manifest = Manifest(
        name=model.get("name", str),
        vocab_size=vocab,
        context_length=model.integer("context_length", 1, 1 << 31),
        bos_token_id=_token(model, "bos_token_id", vocab),
        eos_token_ids=_token_list(model, "eos_token_ids", vocab),
        add_bos=model.get("add_bos", bool),
        target_kind=target.choice("kind", ("cpu", "cuda")),
        archs=tuple(_strings(target, "archs")),
        dtype=top.choice("dtype", DTYPES),
        page_size=cache.integer("page_size", 1, 1 << 16),
        cache_dtype=cache.choice("dtype", CACHE_DTYPES),
        cache_layers=tuple(
            CacheLayer(
                c.integer("kv_heads", 1, 1 << 16),
                c.integer("head_dim", 1, 1 << 16),
                c.integer("v_head_dim", 1, 1 << 16),
            )
            for c in cache.children("layers")
        ),
        forward=entries.text("forward"),
        forward_tokens=_optional_count(entries, "forward_tokens"),
        decode=_decode(entries),
        sample=entries.text("sample"),
        repetition_penalty=entries.text("repetition_penalty"),
        mark_seen=entries.text("mark_seen"),
        advance=entries.text("advance"),
        library=_listed(top, "library", top.text("library"), files),
        libraries=_libraries(top, files),
        weights=tuple(_weight(w, top, files) for w in top.children("weights")),
        generation=top.get("generation", dict, optional=True) or {},
        chat=_chat(top),
        files=files,
        raw=raw,
    )
    names = [w.name for w in manifest.weights]
    if len(set(names)) != len(names):
        raise top.error("weights", "lists a name twice")
    if manifest.add_bos and manifest.bos_token_id is None:
        raise model.error("add_bos", "is true, but bos_token_id is null")
    return manifest


def _files(top: _Reader) -> dict[str, FileEntry]:
    entries = top.child("files")
    result = {}
    for name in entries.data:
        parts = name.split("/")
        if not name or name.startswith("/") or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in parts):
            raise entries.error("", f"lists {name!r}, which is not a plain path inside the artifact folder")
        entry = entries.child(name)
        digest = entry.get("sha256", str)
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise entry.error("sha256", "is not 64 lower-case hexadecimal digits")
        result[name] = FileEntry(digest, entry.integer("size", 0, 1 << 50))
    return result


def _listed(reader: _Reader, key: str, name: str, files: Mapping[str, FileEntry]) -> str:
    if name not in files:
        raise reader.error(key, f"is {name!r}, which is not in the list of files")
    return name


def _libraries(top: _Reader, files: Mapping[str, FileEntry]) -> dict[str, str]:
    if top.get("libraries", list, optional=True) is None:
        return {}
    entries = top.children("libraries")
    return {entry.text("arch"): _listed(entry, "file", entry.text("file"), files) for entry in entries}


def _weight(reader: _Reader, top: _Reader, files: Mapping[str, FileEntry]) -> Weight:
    shape = reader.get("shape", list)
    if not all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in shape):
        raise reader.error("shape", f"is {shape!r}, not a list of non-negative integers")
    if math.prod(shape) > 1 << 50:
        raise reader.error("shape", f"is {shape!r}, too large to be a weight")
    file = reader.get("file", str, optional=True) or "weights.safetensors"
    return Weight(
        reader.text("name"), tuple(shape), reader.choice("dtype", WEIGHT_DTYPES), _listed(reader, "file", file, files)
    )


def _decode(entries: _Reader) -> dict[int, str]:
    decode = entries.child("decode")
    buckets = {}
    for key in decode.data:
        if not re.fullmatch(r"[1-9][0-9]{0,5}", key):
            raise decode.error(key, "is not a batch size")
        buckets[int(key)] = decode.text(key)
    if not buckets:
        raise entries.error("decode", "is empty, so the artifact cannot generate")
    return dict(sorted(buckets.items()))


def _token(reader: _Reader, key: str, vocab: int) -> int | None:
    value = reader.get(key, int, optional=True)
    if value is not None and not 0 <= value < vocab:
        raise reader.error(key, f"is {value}, outside the vocabulary of {vocab}")
    return value


def _token_list(reader: _Reader, key: str, vocab: int) -> tuple[int, ...]:
    values = reader.get(key, list)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab:
            raise reader.error(key, f"has {value!r}, which is not a token of the vocabulary of {vocab}")
    return tuple(values)


def _optional_count(reader: _Reader, key: str) -> int | None:
    return None if reader.get(key, int, optional=True) is None else reader.integer(key, 1)


def _strings(reader: _Reader, key: str) -> list[str]:
    values = reader.get(key, list)
    if not all(isinstance(v, str) for v in values):
        raise reader.error(key, "is not a list of strings")
    return values


def _chat(top: _Reader) -> dict[str, Any] | None:
    if top.get("chat", dict, optional=True) is None:
        return None
    chat = top.child("chat")
    chat.get("bos", str)
    chat.get("generation_prompt", str)
    chat.get("default_system", str, optional=True)
    roles = chat.child("roles")
    for role in roles.data:
        entry = roles.child(role)
        entry.get("prefix", str)
        entry.get("suffix", str)
    return chat.data


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
