# SPDX-License-Identifier: Apache-2.0
"""gptq-compile: compile a Hugging Face model to GPTQ-quantized machine code that runs without Python or torch.

Importing this package is cheap: neither torch nor TVM is loaded until something needs it, so that
``gptq_compile.Engine`` runs where only numpy, apache-tvm-ffi and tokenizers are installed.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# `passes`, `kernels` and `runtime` are top-level folders of the repository that an installation maps into this
# package. In an uninstalled checkout they lie beside it, so the package's search path is widened there.
_ROOT = pathlib.Path(__file__).resolve().parent.parent
if not (pathlib.Path(__file__).resolve().parent / "passes").is_dir() and (_ROOT / "passes").is_dir():
    __path__.append(str(_ROOT))

if TYPE_CHECKING:
    from gptq_compile.api import compile_model
    from gptq_compile.runtime.engine import Engine

__all__ = ["Engine", "__version__", "compile_model"]


def __getattr__(name: str) -> Any:
    """Loads the two public entry points on first use (PEP 562)."""
    if name == "Engine":
        from gptq_compile.runtime.engine import Engine

        return Engine
    if name == "compile_model":
        from gptq_compile.api import compile_model

        return compile_model
    raise AttributeError(f"module 'gptq_compile' has no attribute {name!r}")
