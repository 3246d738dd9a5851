# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and that importing does nothing heavy."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STDLIB = set(sys.stdlib_module_names)
# Layer -> prefixes of our own modules it may import.
LAYERS = {
    "kernels": ("gptq_compile.kernels", "gptq_compile.errors"),
    "passes": ("gptq_compile.passes", "gptq_compile.kernels", "gptq_compile.errors"),
    "runtime": ("gptq_compile.runtime",),
    "gptq_compile": ("gptq_compile",),
}


def imports(file: pathlib.Path) -> Iterator[tuple[str, bool]]:
    """Names of imported modules, and whether the import runs when the module is imported."""
    tree = ast.parse(file.read_text("utf-8"))
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or checking:
            lazy.update(child for child in ast.walk(node) if child is not node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            # `from gptq_compile import runtime` imports a module as much as `import gptq_compile.runtime` does.
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "gptq_compile" else [node.module]
            yield from ((name or "", node not in lazy) for name in names)


def files(layer: str) -> list[pathlib.Path]:
    return sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_what_is_below_them(layer: str) -> None:
    found = [(f, name) for f in files(layer) for name, _ in imports(f) if name.split(".")[0] == "gptq_compile"]
    assert layer == "runtime" or found, "the scan sees nothing"
    wrong = [
        f"{f.relative_to(ROOT)}: {name}"
        for f, name in found
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in LAYERS[layer])
    ]
    assert not wrong


def test_third_party_imports_of_the_runtime() -> None:
    allowed = {"numpy", "tvm_ffi", "tokenizers", "gptq_compile"} | STDLIB
    wrong = [
        f"{f.name}: {name}" for f in files("runtime") for name, _ in imports(f) if name.split(".")[0] not in allowed
    ]
    assert not wrong


def test_kernels_know_nothing_of_models() -> None:
    for file in files("kernels"):
        for name, _ in imports(file):
            assert name.split(".")[0] not in ("transformers", "safetensors", "datasets"), f"{file.name}: {name}"
            assert not name.startswith("torch.fx"), f"{file.name}: {name}"


def test_tvm_is_imported_through_one_module() -> None:
    # kernels/tvm_env.py makes libcuda.so.1 loadable before TVM is; after it, TVM's submodules may be imported.
    for layer in LAYERS:
        for file in files(layer):
            names = [name for name, _ in imports(file)]
            if file == ROOT / "kernels" / "tvm_env.py" or not any(n.split(".")[0] == "tvm" for n in names):
                continue
            assert "tvm" not in names, f"{file.name} imports tvm itself"
            assert "gptq_compile.kernels.tvm_env" in names, f"{file.name} imports from tvm without tvm_env"


def test_the_command_line_imports_the_compiler_only_when_it_compiles() -> None:
    light = {"numpy", "rich", "gptq_compile"} | STDLIB
    heavy = ("gptq_compile.api", "gptq_compile.frontend", "gptq_compile.artifact", "gptq_compile.kernels.tvm_env")
    for file in [*files("gptq_compile/cli"), *files("gptq_compile/eval"), ROOT / "gptq_compile" / "doctor.py"]:
        for name, at_once in imports(file):
            if at_once:
                assert name.split(".")[0] in light, f"{file.name}: {name}"
                assert not name.startswith(heavy), f"{file.name}: {name}"


def test_importing_the_package_loads_nothing() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import gptq_compile; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded & {"torch", "transformers", "tvm", "tvm_ffi", "numpy", "tokenizers", "rich"} == set()


def test_nothing_is_pickled_or_printed() -> None:
    for layer in LAYERS:
        for file in files(layer):
            names = {name.split(".")[0] for name, _ in imports(file)}
            assert names & {"pickle", "marshal", "shelve", "dill"} == set(), file
            if "cli" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
                assert not called, f"{file.relative_to(ROOT)} prints"
