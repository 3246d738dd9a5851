# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile embed``: writes the C++ runtime and an example program, ready to build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gptq_compile
from gptq_compile.cli.parser import Parser

LIBRARY, EXAMPLE = "runtime/cpp", "examples/cpp"
_SUFFIXES = (".h", ".cpp", ".inc", ".txt")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    p = Parser(
        prog="gptq-compile embed",
        description="Writes the C++17 sources that run a compiled model without Python: a library and an example.",
    )
    p.add_argument("folder", metavar="DIR", help="where to write them")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that this command wrote")
    arguments = p.parse_args(argv)
    out = write_sources(arguments.folder, overwrite=arguments.overwrite)
    print(
        f"Wrote {out}. It needs CMake and a C++17 compiler, and nothing else:\n\n"
        f"  cmake -S {out} -B {out}/build && cmake --build {out}/build --parallel\n"
        f'  {out}/build/generate OUT "What is a compiler?"    # OUT: a model that gptq-compile compiled'
    )
    return 0


def write_sources(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the example at the top and the library in its subfolder ``gptq_compile``.

    Returns:
        The folder as it was given.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    from gptq_compile.artifact.files import StagedFolder

    with StagedFolder(folder, overwrite=_is_ours if overwrite else None) as staged:
        for source, prefix in ((EXAMPLE, ""), (LIBRARY, "gptq_compile/")):
            for path in sorted(_find(source).iterdir()):
                if path.suffix in _SUFFIXES:
                    staged.add(path, prefix + path.name)
        staged.commit()
    return Path(folder)


def _find(name: str) -> Path:
    # In an installation these folders are below the package; in a checkout they are beside it (gptq_compile.__path__).
    return next(Path(base) / name for base in gptq_compile.__path__ if (Path(base) / name).is_dir())


def _is_ours(folder: Path) -> bool:
    return (folder / "gptq_compile" / "gptq_compile.h").is_file()
