# SPDX-License-Identifier: Apache-2.0
"""What is packaged is what is there, and a checkout works without being installed."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import gptq_compile
from gptq_compile import doctor

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAPPED = ("kernels", "passes", "runtime")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def folders_with_code() -> set[str]:
    """Import names of all folders with Python files, top-level ones mapped as an installation maps them."""
    names = set()
    for top in ("gptq_compile", *MAPPED):
        for file in (ROOT / top).rglob("*.py"):
            name = ".".join(file.parent.relative_to(ROOT).parts)
            names.add(name if top == "gptq_compile" else f"gptq_compile.{name}")
    return names


def test_package_list_equals_the_folder_tree() -> None:
    # The C++ example has no Python in it: `gptq-compile embed` copies it.
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders_with_code() | {"gptq_compile.examples.cpp"}
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    expected = {"gptq_compile": "gptq_compile", "gptq_compile.examples.cpp": "examples/cpp"}
    assert mapping == expected | {f"gptq_compile.{top}": top for top in MAPPED}


def test_files_that_are_not_python_are_packaged() -> None:
    folders = {
        package: ROOT
        / next(
            package.replace(name, place, 1).replace(".", "/")
            for name, place in sorted(PROJECT["tool"]["setuptools"]["package-dir"].items(), reverse=True)
            if package == name or package.startswith(f"{name}.")
        )
        for package in PROJECT["tool"]["setuptools"]["package-data"]
    }
    globs = [folders[p] / glob for p, all_ in PROJECT["tool"]["setuptools"]["package-data"].items() for glob in all_]
    packaged = {glob: set(glob.parent.glob(glob.name)) for glob in globs}
    assert all(packaged.values()), "a glob matches nothing"
    others = {
        file
        for top in ("gptq_compile", *MAPPED, "examples/cpp")
        for file in (ROOT / top).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc") and file.name != "py.typed"
    }
    assert others == set().union(*packaged.values()), "files that are not Python need an entry in package-data"


def test_top_level_folders_are_no_regular_packages() -> None:
    # A regular package called `kernels` at the root would shadow Hugging Face's and break `import transformers`.
    for top in MAPPED:
        assert not (ROOT / top / "__init__.py").exists()


def test_versions_and_requirements_are_said_once() -> None:
    assert PROJECT["project"]["version"] == gptq_compile.__version__

    def parsed(requirements: list[str]) -> dict[str, tuple[str, str | None]]:
        matches = [re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", r) for r in requirements]
        assert all(matches), requirements
        return {m[1]: (m[2], m[3]) for m in matches if m}

    assert parsed(PROJECT["project"]["dependencies"]) == doctor.RUNTIME_PACKAGES
    extra = parsed(PROJECT["project"]["optional-dependencies"]["compile"])
    assert extra == doctor.COMPILE_PACKAGES | doctor.OPTIONAL_PACKAGES


def test_pinned_versions_are_inside_the_ranges() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "requirements" / "constraints.txt").read_text(), re.M))
    for name, (low, high) in (doctor.RUNTIME_PACKAGES | doctor.COMPILE_PACKAGES | doctor.OPTIONAL_PACKAGES).items():
        if name == "torch":  # installed first, by the Makefile
            pins[name] = re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())[0]
        pinned = doctor.release(pins[name])
        assert doctor.release(low) <= pinned and (high is None or pinned < doctor.release(high)), name


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip


def test_an_uninstalled_checkout_imports_with_the_standard_library_alone() -> None:
    # -S: no site-packages, so an installed gptq_compile cannot stand in for the checkout.
    done = python(
        "import gptq_compile.kernels.target, gptq_compile.passes.gptq.config, gptq_compile.runtime.errors; "
        "print(gptq_compile.kernels.target.__file__)",
        "-S", "-E",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "target.py")


def test_help_needs_the_standard_library_alone() -> None:
    done = python("from gptq_compile.cli.main import main; sys.exit(main(['--help']))", "-S", "-E")
    assert done.returncode == 0, done.stderr
    assert "gptq-compile MODEL" in done.stdout and "doctor" in done.stdout


def test_compiling_without_the_extra_says_what_to_install(tmp_path: pathlib.Path) -> None:
    blocked = "sys.modules['torch'] = sys.modules['transformers'] = None; "
    code = f"from gptq_compile.cli.main import main; sys.exit(main(['model', '-o', {str(tmp_path / 'out')!r}]))"
    done = python(blocked + code)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "gptq-compile[compile]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_transformers_imports_with_the_root_on_the_path() -> None:
    done = python("import transformers; from transformers import AutoModelForCausalLM, integrations; print('fine')")
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr
