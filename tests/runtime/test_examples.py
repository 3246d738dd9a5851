# SPDX-License-Identifier: Apache-2.0
"""The Python example runs where only the runtime may be imported."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from gptq_compile.runtime.engine import Engine

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Runs a program with its arguments, and fails if anything of the compiler was imported.
WITHOUT_COMPILER = """
import runpy, sys
for name in ("torch", "transformers", "tvm", "safetensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ask(artifact: pathlib.Path, engine: Engine, tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.txt").write_text("A note.")
    questions = ["Who?", "When, and where?"]
    command = [sys.executable, "-c", WITHOUT_COMPILER, ROOT / "examples" / "python" / "ask.py", artifact]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "text.txt"), *questions],
        capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for question in questions:
        prompt = engine.chat_prompt([{"role": "user", "content": f"A note.\n\n{question}"}])
        answer = engine.generate(prompt, 200, repetition_penalty=1.1)
        assert f"\n{question}\n{answer}\n" in done.stdout
