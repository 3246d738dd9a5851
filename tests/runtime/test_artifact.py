# SPDX-License-Identifier: Apache-2.0
"""A damaged artifact is refused by name, and nothing of it is executed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from gptq_compile.runtime.artifact import Artifact
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import ArtifactError
from gptq_compile.runtime.manifest import CacheLayer, read_manifest


def test_reads_a_good_manifest(artifact: pathlib.Path, toy: ModuleType) -> None:
    manifest = Artifact(artifact).manifest
    assert manifest.decode == {b: f"decode_{b}" for b in toy.BUCKETS}
    assert manifest.context_length == toy.CONTEXT and manifest.eos_token_ids == (toy.EOS,)
    assert manifest.cache_bytes_per_token == toy.LAYERS * 2 * toy.HIDDEN * 4
    assert [w.name for w in manifest.weights] == list(toy.toy_weights())


def test_rows_of_8_bits_have_a_scale(artifact: pathlib.Path) -> None:
    manifest = Artifact(artifact).manifest
    layer = CacheLayer(3, 64, 48)
    sizes = {}
    for dtype in ("float32", "float16", "int8"):
        narrow = dataclasses.replace(manifest, cache_dtype=dtype, cache_layers=(layer, layer))
        sizes[dtype] = narrow.cache_widths(layer), narrow.cache_bytes_per_token
    assert sizes["float32"] == ((64, 48), 2 * 3 * 112 * 4) and sizes["float16"] == ((64, 48), 2 * 3 * 112 * 2)
    assert sizes["int8"] == ((68, 52), 2 * 3 * 120)


Change = Callable[[dict[str, Any]], object]


def put(path: str, value: Any) -> Change:
    """A change that sets a field such as ``model.vocab_size``."""

    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            data = data[int(key)] if isinstance(data, list) else data[key]
        data[last] = value

    return change


def drop(path: str) -> Change:
    """A change that removes a field."""

    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            data = data[key]
        del data[last]

    return change


BAD_MANIFESTS: dict[str, tuple[Change, str]] = {
    "other format": (put("format", "mlc"), "format is 'mlc'"),
    "no format": (drop("format"), "format is missing"),
    "newer schema": (put("schema_version", 2), "schema version 2"),
    "schema a text": (put("schema_version", "1"), "schema_version is text"),
    "schema true": (put("schema_version", True), "schema_version is true/false"),
    "no model": (drop("model"), "model is missing"),
    "model a list": (put("model", []), "model is a list"),
    "vocabulary of 0": (put("model/vocab_size", 0), "model.vocab_size is 0"),
    "vocabulary a float": (put("model/vocab_size", 258.0), "model.vocab_size is a number, not int"),
    "context negative": (put("model/context_length", -5), "model.context_length is -5"),
    "eos outside": (put("model/eos_token_ids", [256, 258]), "model.eos_token_ids has 258"),
    "eos a number": (put("model/eos_token_ids", 256), "model.eos_token_ids is a number"),
    "bos outside": (put("model/bos_token_id", -1), "model.bos_token_id is -1"),
    "bos wanted but null": (put("model/bos_token_id", None), "model.add_bos is true"),
    "unknown target": (put("target/kind", "rocm"), "target.kind is 'rocm'"),
    "archs a text": (put("target/archs", "sm_90"), "target.archs is text"),
    "archs of numbers": (put("target/archs", [90]), "target.archs is not a list of strings"),
    "unknown dtype": (put("dtype", "float8"), "dtype is 'float8'"),
    "page size 0": (put("kv_cache/page_size", 0), "kv_cache.page_size is 0"),
    "layer without heads": (put("kv_cache/layers", [{"head_dim": 8}]), "kv_cache.layers[0].kv_heads is missing"),
    "layer null": (put("kv_cache/layers", [None]), "kv_cache.layers[0] is null"),
    "no forward": (drop("entries/forward"), "entries.forward is missing"),
    "forward empty": (put("entries/forward", ""), "entries.forward is empty"),
    "no buckets": (put("entries/decode", {}), "entries.decode is empty"),
    "bucket 0": (put("entries/decode", {"0": "decode_0"}), "entries.decode.0 is not a batch size"),
    "bucket a word": (put("entries/decode", {"one": "decode_1"}), "entries.decode.one is not a batch size"),
    "library not listed": (put("library", "other.so"), "library is 'other.so'"),
    "library outside": (put("library", "../evil.so"), "library is '../evil.so'"),
    "weights an object": (put("weights", {}), "weights is an object"),
    "weight twice": (lambda d: d["weights"].append(d["weights"][0]), "lists a name twice"),
    "weight of unknown dtype": (put("weights/0/dtype", "int4"), "weights[0].dtype is 'int4'"),
    "weight of negative size": (put("weights/0/shape", [-1, 8]), "weights[0].shape"),
    "weight in unlisted file": (put("weights/0/file", "more.safetensors"), "weights[0].file"),
    "path escapes": (put("files/..~1x", {"sha256": "0" * 64, "size": 1}), "not a plain path"),
    "absolute path": (lambda d: d["files"].update({"/etc/passwd": d["files"]["model.so"]}), "not a plain path"),
    "path with dots": (lambda d: d["files"].update({"a/../b": d["files"]["model.so"]}), "not a plain path"),
    "hash too short": (put("files/model.so/sha256", "abc"), "files.model.so.sha256"),
    "size negative": (put("files/model.so/size", -1), "files.model.so.size is -1"),
    "chat without prompt": (drop("chat/generation_prompt"), "chat.generation_prompt is missing"),
    "chat role a text": (put("chat/roles/user", "[user]"), "chat.roles.user is text"),
    "no files": (drop("files"), "files is missing"),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_refuses_bad_manifests_by_field(artifact: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    change, message = BAD_MANIFESTS[name]
    data = json.loads((artifact / "manifest.json").read_text())
    change(data)
    text = json.dumps(data).replace("..~1x", "../x")
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json") as error:
        read_manifest(tmp_path / "manifest.json")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": NaN', "[" * 200_000, "\x00"])
def test_refuses_what_is_not_an_object(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(tmp_path / "manifest.json")


def test_refuses_bytes_that_are_not_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_manifest(tmp_path / "manifest.json")


def test_a_folder_that_is_no_artifact(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ArtifactError, match="is not a compiled model"):
        Engine.load(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        Engine.load(tmp_path / "nothing")


def test_a_missing_file_is_named(copy: pathlib.Path) -> None:
    (copy / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is missing"):
        Engine.load(copy)


def test_a_truncated_file_is_named(copy: pathlib.Path) -> None:
    os.truncate(copy / "weights.safetensors", 1000)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors has 1000 bytes"):
        Engine.load(copy, verify=False)


def flip(path: pathlib.Path) -> None:
    """Flips one bit in the middle of a file; a new file, as this process may have the old one mapped."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["model.so", "weights.safetensors", "tokenizer.json", "lib/libtvm_runtime.so"])
def test_a_flipped_bit_is_found(copy: pathlib.Path, name: str) -> None:
    flip(copy / name)
    with pytest.raises(ArtifactError, match="is not the file that was compiled") as error:
        Engine.load(copy)
    assert name in str(error.value)


def test_libraries_are_hashed_even_without_verify(copy: pathlib.Path) -> None:
    flip(copy / "weights.safetensors")
    Engine.load(copy, verify=False).close()
    flip(copy / "model.so")
    with pytest.raises(ArtifactError, match=r"model\.so is not the file"):
        Engine.load(copy, verify=False)


def test_a_link_out_of_the_folder_is_refused(copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (copy / "model.so").rename(tmp_path / "elsewhere.so")
    (copy / "model.so").symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(ArtifactError, match="leads out of the artifact folder"):
        Engine.load(copy)


def test_an_unlisted_library_is_not_loaded(copy: pathlib.Path) -> None:
    (copy / "lib" / "libcudart.so.13").write_text("evil")
    with pytest.raises(ArtifactError, match=r"libcudart\.so\.13 is not in the manifest's list"):
        Engine.load(copy)


def test_the_runtime_library_must_be_listed(copy: pathlib.Path, toy: ModuleType) -> None:
    (copy / "lib" / "libtvm_runtime.so").unlink()
    toy.write_manifest(copy, toy.manifest())
    with pytest.raises(ArtifactError, match=r"lib/libtvm_runtime\.so is not in the list of files"):
        Engine.load(copy)


def test_versioned_libraries_are_hashed_even_without_verify(copy: pathlib.Path, toy: ModuleType) -> None:
    (copy / "lib" / "libcudart.so.13").write_bytes(b"some library")
    toy.write_manifest(copy, toy.manifest())
    flip(copy / "lib" / "libcudart.so.13")
    with pytest.raises(ArtifactError, match=r"libcudart\.so\.13 is not the file"):
        Engine.load(copy, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["weights"][0].update(shape=[8, 258]), r"tensor 'embed': it is float32 \[258, 8\]"),
        (lambda d: d["weights"][1].update(dtype="int32"), r"tensor 'mix.0': it is float32"),
        (lambda d: d["weights"].append({"name": "ghost", "shape": [], "dtype": "bool"}), "tensor 'ghost'"),
    ],
)
def test_weights_that_are_not_as_listed_are_named(copy: pathlib.Path, change: Change, message: str) -> None:
    data = json.loads((copy / "manifest.json").read_text())
    change(data)
    (copy / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        Engine.load(copy)


def test_an_entry_that_the_library_lacks_is_named(copy: pathlib.Path, toy: ModuleType) -> None:
    data = toy.manifest()
    data["entries"]["decode"]["8"] = "decode_8"
    toy.write_manifest(copy, data)
    with pytest.raises(ArtifactError, match="no entry 'decode_8'"):
        Engine.load(copy)


@pytest.mark.parametrize("name", ["model.so", "tokenizer.json"])
def test_a_file_of_the_wrong_kind_is_named(copy: pathlib.Path, toy: ModuleType, name: str) -> None:
    (copy / name).write_text("hello")
    toy.write_manifest(copy, toy.manifest())
    with pytest.raises(ArtifactError, match=f"{name} does not load"):
        Engine.load(copy)
