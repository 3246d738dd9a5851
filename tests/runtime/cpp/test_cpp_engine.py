# SPDX-License-Identifier: Apache-2.0
"""The C++ engine against the Python one on the toy model: the same tokens, text, limits and refusals."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gptq_compile.runtime import verified
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.sequence import GenerationResult

PROMPTS = ["a", "The quick brown fox", "x" * 40, "\u00e9t\u00e9", "0123456789abcde", "0123456789abcdef", "Z" * 17]


def said(result: GenerationResult) -> str:
    """A result as the driver writes it."""
    ids = ",".join(map(str, result.token_ids))
    return f"{ids} {result.finish_reason} {result.text.encode().hex() or '-'}"


def python(engine: Engine, prompt: Any, **settings: Any) -> str:
    result = engine.generate(prompt, **settings, return_dict_in_generate=True)
    assert isinstance(result, GenerationResult)
    return said(result)


def tokens(engine: Engine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode(text)


@pytest.fixture
def loaded(driver: Any, artifact: pathlib.Path) -> Any:
    """The driver with the toy artifact and room for four full contexts."""
    assert driver("load", artifact, 400, True) == "toy 258 96"
    return driver


def test_logits_are_the_references(loaded: Any, toy: ModuleType) -> None:
    for count in (1, 16, 17, 96):
        ids = np.random.default_rng(count).integers(0, 256, count).tolist()
        got = np.array(loaded("logits", ids).split(","), "float32").reshape(count, toy.VOCAB)
        np.testing.assert_allclose(got, toy.reference_logits(ids, toy.toy_weights()), atol=5e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 30},
        {"max_new_tokens": 200, "eos_token_id": []},
        {"max_new_tokens": 20, "repetition_penalty": 1.7},
        {"max_new_tokens": 20, "do_sample": True, "temperature": 0.8, "seed": 7},
        {"max_new_tokens": 20, "do_sample": True, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "seed": 2**32 - 5},
        {"max_new_tokens": 1},
    ],
)
def test_same_results_as_python(loaded: Any, engine: Engine, settings: dict[str, Any]) -> None:
    there = {"eos" if k == "eos_token_id" else k: v for k, v in settings.items()}
    for prompt in PROMPTS:
        expected = python(engine, prompt, **settings)
        assert loaded("prompt", prompt, **there) == expected
        assert loaded("generate", tokens(engine, prompt), **there) == expected


def test_end_tokens_and_stop_strings(loaded: Any, engine: Engine) -> None:
    stream = engine.generate(PROMPTS[1], 40, return_dict_in_generate=True)
    text, ids = stream.text, stream.token_ids
    assert python(engine, PROMPTS[1], max_new_tokens=40, eos_token_id=ids[7]).split()[1] == "eos"
    stops: list[list[str]] = [[text[5:8]], [text[9:11], text[3:5]], ["never", text[4]], [text[:1]], ["nowhere"]]
    for stop in stops:
        assert loaded("prompt", PROMPTS[1], max_new_tokens=40, stop=stop) == python(
            engine, PROMPTS[1], max_new_tokens=40, stop=stop
        )
    for ends in ([ids[7]], [ids[0]], [ids[3], ids[9]]):
        assert loaded("prompt", PROMPTS[1], max_new_tokens=40, eos=ends) == python(
            engine, PROMPTS[1], max_new_tokens=40, eos_token_id=ends
        )


def test_generations_in_turns_are_those_by_themselves(loaded: Any, engine: Engine) -> None:
    prompts = [tokens(engine, p) for p in (PROMPTS[1], PROMPTS[2])]
    for settings in ({"max_new_tokens": 20}, {"max_new_tokens": 20, "repetition_penalty": 1.5}):
        expected = " ".join(python(engine, p, **settings) for p in prompts)
        assert loaded("turns", *prompts, **settings) == expected


def test_cancelling_frees_the_pages(loaded: Any, engine: Engine) -> None:
    whole = engine.generate("hello", 60, eos_token_id=[], return_dict_in_generate=True)
    for _ in range(12):  # 25 pages, 6 of them taken each time
        ids, reason, text, calls = loaded("cancel", tokens(engine, "hello"), max_new_tokens=60, eos=[]).split()
        count = ids.count(",") + 1
        assert reason == "cancelled" and calls == "1" and ids == ",".join(map(str, whole.token_ids[:count]))
        assert count < 60 and whole.text.encode().hex().startswith(text)


def test_long_prompts_go_in_chunks(driver: Any, toy: ModuleType, copy: pathlib.Path) -> None:
    data = toy.manifest()
    data["model"]["context_length"] = 1300
    toy.write_manifest(copy, data)
    ids = np.random.default_rng(5).integers(0, 256, 1100).tolist()
    with Engine.load(copy, max_batch=1) as engine:
        driver("load", copy, 0, True)
        assert driver("generate", ids, max_new_tokens=8) == python(engine, ids, max_new_tokens=8)


def test_prompts_of_text_and_chat(loaded: Any, engine: Engine) -> None:
    assert engine.tokenizer is not None
    for text in ["", "hi", "<bos>hi", "a<eos>b", "\U0001f642"]:
        assert loaded("encode_prompt", text) == ",".join(map(str, engine.tokenizer.encode(text)))
    chat = [("user", "Hi"), ("assistant", "Yes?"), ("user", "\u00e9")]
    for messages in (chat, [("system", "s"), *chat]):
        arguments = [word for role, content in messages for word in (role.encode().decode(), content)]
        prompt = engine.chat_prompt([{"role": r, "content": c} for r, c in messages])
        words = " ".join(f"{r} {c.encode().hex()}" for r, c in zip(arguments[::2], arguments[1::2], strict=True))
        assert loaded(f"chat {words}") == prompt.encode().hex()
    assert "role 'tool'" in loaded("chat tool 6869")


def test_no_python_in_the_process(loaded: Any) -> None:
    names = loaded("libraries")
    assert "libtvm_runtime.so" in names and "libtvm_ffi.so" in names and "model.so" in names
    assert "python" not in names


@pytest.mark.parametrize(
    ("ids", "settings", "sentence"),
    [
        ([1] * 96, {}, "The prompt has 96 tokens, and the model's context is 96"),
        ([], {}, "The prompt has no tokens"),
        ([258], {}, "Token 258 is outside the model's vocabulary of 258."),
        ([-1], {}, "Token -1 is outside"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more."),
        ([1], {"do_sample": 1, "temperature": 0}, "temperature is 0; it must be greater than 0"),
        ([1], {"top_k": -1}, "top_k is -1; it must be 0 (off) or more."),
        ([1], {"top_p": 0}, "top_p is 0; it must be above 0"),
        ([1], {"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1."),
        ([1], {"repetition_penalty": "nan"}, "repetition_penalty is nan; it must be greater than 0."),
        ([1], {"stop": ""}, "A stop string is empty"),
    ],
)
def test_requests_are_refused(loaded: Any, ids: list[int], settings: dict[str, Any], sentence: str) -> None:
    words = [f"{k}={v or '-'}" if k == "stop" else f"{k}={v}" for k, v in settings.items()]
    answer = loaded(" ".join(["generate", ",".join(map(str, ids)) or "-", *words]))
    assert answer.startswith(f"error: {sentence}"), answer
    assert loaded("generate", [1], max_new_tokens=1).split()[1] == "length", "the engine goes on"


def test_a_full_cache_is_refused_and_recovers(driver: Any, artifact: pathlib.Path) -> None:
    assert driver("load", artifact, 48, True) == "toy 258 48"
    answer = driver("turns", [1] * 20, [2] * 20, max_new_tokens=8)
    assert answer.startswith("error: The KV cache has 16 free tokens of 48, and a sequence needs 28."), answer
    assert driver("generate", [1] * 40, max_new_tokens=100).split()[1] == "length"
    assert "the KV cache holds 48" in driver("generate", [1] * 48)


def test_invalid_logits_are_an_error(driver: Any, toy: ModuleType, copy: pathlib.Path) -> None:
    weights = toy.toy_weights()
    weights["embed"][7] = np.nan
    toy.write_safetensors(copy / "weights.safetensors", weights)
    toy.write_manifest(copy, toy.manifest())
    driver("load", copy, 96, True)
    good = driver("generate", [5, 6], max_new_tokens=60)
    for _ in range(3):
        answer = driver("generate", [5, 7], max_new_tokens=60)
        assert answer.startswith("error: The model computed NaN or infinite logits after 2 tokens."), answer
    assert driver("generate", [5, 6], max_new_tokens=60) == good


def test_damaged_artifacts_are_refused(start: Callable[[], Any], artifact: pathlib.Path, copy: pathlib.Path) -> None:
    driver = start()

    def refused(sentence: str, verify: bool = True) -> None:
        answer = driver("load", copy, 0, verify)
        assert answer.startswith("error: ") and sentence in answer, answer

    def restore(name: str) -> None:
        (copy / name).write_bytes((artifact / name).read_bytes())

    def damage(name: str) -> None:
        data = bytearray((artifact / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)

    damage("model.so")
    refused("model.so is not the file that was compiled", verify=False)
    restore("model.so")
    damage("weights.safetensors")
    refused("weights.safetensors is not the file that was compiled")
    assert driver("load", copy, 0, False).startswith("toy"), "weights are only hashed when asked for"
    (copy / "weights.safetensors").write_bytes((artifact / "weights.safetensors").read_bytes()[:-4])
    refused("it is truncated or was replaced", verify=False)
    (copy / "weights.safetensors").unlink()
    refused("weights.safetensors is missing")
    (copy / "weights.safetensors").symlink_to(artifact / "weights.safetensors")
    refused("leads out of the artifact folder")
    (copy / "weights.safetensors").unlink()
    restore("weights.safetensors")
    (copy / "lib" / "libextra.so").write_bytes(b"")
    refused("libextra.so is not in the manifest's list of files")
    (copy / "lib" / "libextra.so").unlink()
    assert "compiled for cpu and cannot run on cuda" in driver("load", copy, 0, False, "cuda")


def test_the_best_library_that_runs_here_is_taken(
    start: Callable[[], Any], copy: pathlib.Path, toy: ModuleType
) -> None:
    data = toy.manifest()
    data["target"]["archs"] = ["x86-64-v2", "x86-64-v3", "x86-64-v3+dotprod"]  # the last is an ARM feature
    names = ("model.so", "model.v3.so", "model.dotprod.so")
    data["libraries"] = [{"arch": a, "file": n} for a, n in zip(data["target"]["archs"], names, strict=True)]
    for name in names[1:]:
        (copy / name).write_text("no library")
    toy.write_manifest(copy, data)
    driver = start()
    assert "model.v3.so" in driver("load", copy, 96, True)
    assert "lacks asimddp. Use one of" in driver("load", copy, 96, True, "cpu:x86-64-v3+dotprod")
    assert "has no code for x86-64-v4" in driver("load", copy, 96, True, "cpu:x86-64-v4")
    assert driver("load", copy, 96, True, "cpu:x86-64-v2").startswith("toy")
    data["libraries"][1]["file"] = "model.v4.so"
    toy.write_manifest(copy, data)
    assert "not in the list of files" in driver("load", copy, 96, True)
    data["target"]["archs"], data["libraries"] = ["aarch64+dotprod"], []
    toy.write_manifest(copy, data)
    assert "compiled for aarch64, and this machine is x86_64" in driver("load", copy, 96, True)


def test_large_files_are_hashed_once(
    start: Callable[[], Any],
    copy: pathlib.Path,
    toy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (copy / "large.bin").write_bytes(bytes(verified.SMALLEST))
    toy.write_manifest(copy, toy.manifest())
    digest = json.loads((copy / "manifest.json").read_text())["files"]["large.bin"]["sha256"]
    time.sleep(2.1)  # younger files are not noted
    driver = start()
    assert not verified.is_known(copy / "large.bin", digest)
    assert driver("load", copy, 96, True).startswith("toy")
    assert verified.is_known(copy / "large.bin", digest), "Python does not understand the note that C++ wrote"
    with (copy / "large.bin").open("r+b") as f:
        f.write(b"x")
    assert "large.bin is not the file that was compiled" in driver("load", copy, 96, True)
    info = (copy / "large.bin").stat()
    note = next((tmp_path / "cache").rglob(f"{digest}-*"))
    note.write_text(f"{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}\n")
    assert driver("load", copy, 96, True).startswith("toy"), "the note was not looked at"


def test_malformed_manifests_are_refused(start: Callable[[], Any], copy: pathlib.Path) -> None:
    driver = start()
    good = json.loads((copy / "manifest.json").read_text())

    def change(path: list[str], value: Any) -> str:
        data = json.loads(json.dumps(good))
        target = data
        for key in path[:-1]:
            target = target[key]
        if value is ...:
            del target[path[-1]]
        else:
            target[path[-1]] = value
        (copy / "manifest.json").write_text(json.dumps(data))
        return driver("load", copy, 0, False)

    model_so = good["files"]["model.so"]
    for path, value in [
        (["format"], "other"), (["schema_version"], 2), (["model", "vocab_size"], 0), (["library"], "x.so"),
        (["model", "eos_token_ids"], [258]), (["model", "bos_token_id"], None), (["target", "kind"], "abacus"),
        (["kv_cache", "dtype"], "int3"), (["kv_cache", "page_size"], 1.5), (["entries", "decode"], {}),
        (["entries", "forward"], ""), (["entries", "decode"], {"0": "d"}), (["weights"], ...), (["model"], []),
        (["files", "../up"], model_so), (["files", "model.so", "sha256"], "00"),
        (["entries", "sample"], "no_such_entry"), (["weights"], [*good["weights"], good["weights"][0]]),
        (["weights", 0, "shape"], [1, 2]), (["weights", 0, "name"], "other"),
    ]:  # fmt: skip
        answer = change(path, value)  # type: ignore[arg-type]
        assert answer.startswith("error: ") and str(copy) in answer and answer.endswith("."), (path, answer)
    rng = random.Random(0)
    text = json.dumps(good)
    for _ in range(60):  # cut and twisted documents: a sentence each, and no sanitizer's report
        at = rng.randrange(len(text))
        (copy / "manifest.json").write_text(text[:at] + rng.choice(["", "]", '"', "9", text[at + 1 :]]))
        answer = driver("load", copy, 0, False)
        assert answer.endswith(".") or not answer.startswith("error: "), answer


def test_malformed_weights_are_refused(start: Callable[[], Any], toy: ModuleType, copy: pathlib.Path) -> None:
    driver = start()
    good = (copy / "weights.safetensors").read_bytes()
    rng = random.Random(0)
    length = int.from_bytes(good[:8], "little")
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 3)):
            data[rng.randrange(8 + length)] = rng.choice(b'0129{}[]",:x\xff\x00')
        (copy / "weights.safetensors").write_bytes(data)
        toy.write_manifest(copy, toy.manifest())
        answer = driver("load", copy, 0, False)
        assert answer.startswith(("error: ", "toy ")), answer
        refused += answer.startswith("error: ")
    assert refused > 30


def test_the_example(programs: Any, artifact: pathlib.Path, engine: Engine) -> None:
    def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[bytes]:
        command = [programs.generate, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, input=(stdin or "").encode(), check=False, timeout=60)

    result = engine.generate([1, 2, 3], 12, return_dict_in_generate=True)
    done = run(artifact, "--ids", "1,2,3", "--max-new-tokens", 12, "--stats")
    assert done.stdout.decode().split() == [str(i) for i in result.token_ids] and b"tokens/s" in done.stderr
    chat = engine.chat_prompt([{"role": "user", "content": "\u00e9 hi"}])
    for arguments, stdin, prompt in [
        (["\u00e9 hi", "--raw"], None, "\u00e9 hi"),
        (["--raw"], "\u00e9 hi", "\u00e9 hi"),
        (["\u00e9 hi"], None, chat),
    ]:
        expected = engine.generate(prompt, 24).encode() + b"\n"
        assert run(artifact, *arguments, "--max-new-tokens", 24, stdin=stdin).stdout == expected
    sampled = engine.generate("hi", 16, do_sample=True, temperature=1.5, top_k=5, seed=3, stop=["q"])
    options = ["--temperature", 1.5, "--top-k", 5, "--seed", 3, "--stop", "q", "--max-new-tokens", 16]
    assert run(artifact, "hi", "--raw", *options).stdout == sampled.encode() + b"\n"
    for arguments, sentence in [
        ([artifact.parent / "nowhere", "x"], "nowhere is not a folder"),
        ([artifact, "x", "--top-k", "many"], "--top-k takes a number, not 'many'."),
        ([artifact, "--ids", "1,a"], "--ids takes a number, not 'a'."),
        ([artifact, "x", "--wrong"], "Unknown option --wrong."),
        ([artifact, "--stop"], "--stop needs a value."),
        ([], "Give the artifact's folder"),
    ]:
        done = run(*arguments)  # type: ignore[misc]
        assert done.returncode == 2 and sentence in done.stderr.decode(), done.stderr
