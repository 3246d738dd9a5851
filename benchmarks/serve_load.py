# SPDX-License-Identifier: Apache-2.0
"""A server under load, on loopback: throughput at 1, 8, ... requests at once, and a soak of thousands.

Throughput: as many requests at once as asked for, greedy, of one length, without end tokens; tokens a second of all of
them together from the first request to the last answer. Soak: mixed requests (streams, chats, several choices, clients
that leave, bad bodies); memory of the server is read after every hundred, and the metrics are compared with what the
clients saw. Needs the extras ``serve`` and ``test``.

    python benchmarks/serve_load.py OUT --at-once 1,8 --soak 2000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from typing import Any

import openai

LINE = re.compile(r"(http://127\.0\.0\.1:\d+)/")
AT_ONCE = 32


def main() -> None:
    """Runs both parts and prints one JSON object a line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("artifact")
    p.add_argument("--at-once", default="1,8", help="numbers of requests that run together")
    p.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    p.add_argument("--rounds", type=int, default=3, help="times each number is measured; the median counts")
    p.add_argument("--soak", type=int, default=0, metavar="N", help="mixed requests after that")
    p.add_argument("--soak-tokens", type=int, default=12, help="most tokens of an answer in the soak")
    p.add_argument("--cache-tokens", type=int, default=4096)
    p.add_argument("--threads", type=int)
    arguments = p.parse_args()
    command = [sys.executable, "-m", "gptq_compile.cli.main", "serve", arguments.artifact, "--port", "0",
               "--cache-tokens", str(arguments.cache_tokens)]  # fmt: skip
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        found = LINE.search(server.stderr.readline())
        assert found, "the server did not start"
        asyncio.run(_measure(found[1], server.pid, arguments))
    finally:
        server.terminate()
        server.wait(30)


async def _measure(url: str, pid: int, arguments: argparse.Namespace) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id
        await _together(client, model, 1, 8)  # warm
        for count in map(int, arguments.at_once.split(",")):
            runs = sorted([await _together(client, model, count, arguments.tokens) for _ in range(arguments.rounds)])
            print(json.dumps({"at_once": count, "tokens_per_second": runs[len(runs) // 2], "runs": runs}), flush=True)
        if arguments.soak:
            await _Soak(client, model, url, pid, arguments.soak_tokens).run(arguments.soak)


async def _together(client: Any, model: str, count: int, tokens: int) -> float:
    async def one(i: int) -> int:
        answer = await client.completions.create(
            model=model, prompt=f"Story number {random.random()} of {i}:", max_tokens=tokens, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return answer.usage.completion_tokens

    start = time.perf_counter()
    made = sum(await asyncio.gather(*(one(i) for i in range(count))))
    assert made == count * tokens
    return made / (time.perf_counter() - start)


class _Soak:
    """Mixed requests, some tens at a time."""

    def __init__(self, client: Any, model: str, url: str, pid: int, tokens: int) -> None:
        self._client, self._model, self._url, self._pid, self._tokens = client, model, url, pid, tokens
        self._seen: Counter[str] = Counter()
        self._crossed = 0

    async def run(self, count: int) -> None:
        before, memory = _metrics(self._url), []
        start = time.perf_counter()
        gate = asyncio.Semaphore(AT_ONCE)

        async def gated(i: int) -> None:
            async with gate:
                await self._one(i)

        for begin in range(0, count, 100):
            await asyncio.gather(*(gated(i) for i in range(begin, min(begin + 100, count))))
            memory.append(_memory(self._pid))
        while (after := _metrics(self._url))["sequences_unfinished"]:
            await asyncio.sleep(0.1)

        def grown(name: str) -> int:
            return round(sum(v - before.get(k, 0) for k, v in after.items() if k.split("{")[0] == name))

        half = memory[len(memory) // 2 :]
        print(
            json.dumps(
                {
                    "requests": count, "seconds": round(time.perf_counter() - start, 1), "answers": self._seen,
                    "crossed": self._crossed, "memory_mib": memory, "second_half_mib": max(half) - half[0],
                    "submitted": grown("sequences_submitted_total"), "finished": grown("sequences_finished_total"),
                    "generated": grown("generated_tokens_total"), "reused": grown("reused_prompt_tokens_total"),
                    "preempted": grown("preemptions_total"),
                    "pages_free": after["cache_pages_free"] == after["cache_pages"],
                }
            ),
            flush=True,
        )  # fmt: skip

    async def _one(self, i: int) -> None:
        kind = ("plain", "stream", "chat", "two", "left", "bad", "sampled", "plain")[i % 8]
        rng = random.Random(i)
        marker = f"<{i}>"
        body: dict[str, Any] = {
            "model": self._model, "prompt": "A story, as always. " * rng.randrange(4) + marker, "echo": True,
            "max_tokens": rng.randrange(1, self._tokens + 1), "temperature": 0,
        }  # fmt: skip
        create, text = self._client.completions.create, None
        try:
            if kind == "bad":
                await create(**{**body, "temperature": -1})
            elif kind == "chat":
                del body["prompt"], body["echo"]
                await self._client.chat.completions.create(messages=[{"role": "user", "content": marker}], **body)
            elif kind in ("stream", "left"):
                stream, text = await create(stream=True, **{**body, "max_tokens": self._tokens}), ""
                async for chunk in stream:
                    text += chunk.choices[0].text
                    if kind == "left" and len(text) > len(body["prompt"]):
                        await stream.close()
                        break
            else:
                more = {"two": {"n": 2, "temperature": 1}, "sampled": {"seed": i, "temperature": 1}}.get(kind, {})
                answer = await create(**{**body, **more})
                text = answer.choices[-1].text
        except openai.APIStatusError as error:
            self._seen[f"{kind} {error.status_code}"] += 1
            return
        self._seen[f"{kind} 200"] += 1
        self._crossed += text is not None and marker not in text


def _metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line[0] != "#")
    return {name.removeprefix("gptq_compile_"): float(value) for name, value in pairs}


def _memory(pid: int) -> int:
    """Resident memory of a process, MiB."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


if __name__ == "__main__":
    main()
