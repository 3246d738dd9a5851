# SPDX-License-Identifier: Apache-2.0
"""A process that generates has neither imported nor mapped torch, transformers or the TVM compiler."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[2]

RUN = textwrap.dedent(
    """
    import json, sys
    import gptq_compile
    with gptq_compile.Engine.load(sys.argv[1]) as engine:
        text = engine.generate(["hello", "two"], 20, eos_token_id=[])
        rows = engine.logits([1, 2, 3], step=True).shape
    libraries = sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line})
    print(json.dumps({"text": text, "rows": rows, "modules": sorted(sys.modules), "libraries": libraries}))
    """
)


def test_modules_and_libraries_of_a_runtime_process(artifact: pathlib.Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(artifact)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen["text"]) == 2 and seen["rows"] == [3, 258]
    forbidden = {"torch", "transformers", "tvm", "jinja2", "safetensors", "datasets", "rich"}
    assert {m.split(".")[0] for m in seen["modules"]} & forbidden == set()
    ours = [m for m in seen["modules"] if m.startswith("gptq_compile.")]
    assert ours and all(m == "gptq_compile.runtime" or m.startswith("gptq_compile.runtime.") for m in ours)
    names = [pathlib.PurePath(path).name for path in seen["libraries"]]
    for prefix in ("libtvm_compiler", "libtorch", "libc10", "libLLVM", "libcuda", "libtvm_runtime_extra"):
        assert not [n for n in names if n.startswith(prefix)]
    assert str(artifact / "lib" / "libtvm_runtime.so") in seen["libraries"]
    assert str(artifact / "model.so") in seen["libraries"]


START = textwrap.dedent(
    """
    import gc, os, sys
    from gptq_compile.cli.main import main
    early = []
    loading = lambda: "gptq_compile.cli.run" in sys.modules and not gc.get_freeze_count()
    gc.callbacks.append(lambda *_: early.append(1) if loading() else None)
    code = main(["run", sys.argv[1], "hello", "--no-chat", "--ignore-eos", "--max-new-tokens", "4"])
    threads = len(os.listdir("/proc/self/task"))
    assert gc.isenabled() and gc.get_freeze_count() > 1000 and not early
    print(code, threads, *sorted(sys.modules), file=sys.stderr)
    """
)


def test_what_the_command_takes_to_start(artifact: pathlib.Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", START, str(artifact)], capture_output=True, text=True, check=False,
        env={**environment, "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, threads, *modules = done.stderr.split()
    assert code == "0" and int(threads) == 1, "threads that only wait"
    slow = {"tvm_ffi", "ml_dtypes", "rich", "jinja2", "typer", "importlib.metadata", "tempfile", "unittest", "asyncio"}
    assert slow & set(modules) == set()


def test_torch_can_be_imported_after_the_runtime(artifact: pathlib.Path) -> None:
    code = RUN + textwrap.dedent(
        """
        import torch
        engine = gptq_compile.Engine.load(sys.argv[1])
        assert engine.generate("hello", 20, eos_token_id=[]) == text[0]
        assert torch.ones(3).sum().item() == 3
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_runtime_imports_only_what_it_may() -> None:
    allowed = {"numpy", "tvm_ffi", "tokenizers", "gptq_compile"} | set(sys.stdlib_module_names)
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                assert node.level == 0, f"{path.name} imports relatively"
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
                if name.startswith("gptq_compile"):
                    assert name.startswith("gptq_compile.runtime"), f"{path.name} imports {name}"
