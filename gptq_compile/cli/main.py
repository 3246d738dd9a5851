# SPDX-License-Identifier: Apache-2.0
"""The entry point: picks the command and turns every failure into a sentence and an exit code.

Exit codes: 0 done; 1 a check found something (``doctor``); 2 bad input or a machine that cannot do it; 130 Ctrl-C;
143 terminated.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import gptq_compile
from gptq_compile.cli.logs import set_up_logging
from gptq_compile.errors import GptqCompileError

# Command -> (module with main(argv) -> int, what it does). Whatever is not one of these is a model to compile.
COMMANDS = {
    "compile": ("gptq_compile.cli.compile", "compile a model (the default: `gptq-compile MODEL ...` does the same)"),
    "export-onnx": ("gptq_compile.cli.export_onnx", "quantize a model and write it for ONNX Runtime"),
    "run": ("gptq_compile.cli.run", "generate text with a compiled model"),
    "chat": ("gptq_compile.cli.chat", "talk to a compiled model"),
    "serve": ("gptq_compile.cli.serve", "OpenAI's routes and a chat page over a compiled model"),
    "eval": (
        "gptq_compile.cli.evaluate",
        "perplexity of a compiled model on a text, or tasks of lm-evaluation-harness",
    ),
    "bench": ("gptq_compile.cli.bench", "tokens a second, time to the first token and kernel times on this machine"),
    "inspect": ("gptq_compile.cli.inspect", "what is in a compiled model, and how well each layer was quantized"),
    "embed": ("gptq_compile.cli.embed", "write the C++ sources that run a compiled model without Python"),
    "doctor": ("gptq_compile.cli.doctor", "what this machine can do, and how to mend what it cannot"),
}
DEFAULT = "compile"
# Commands that are to answer soon. They multiply nothing with numpy, whose threads would only wait, busily, for the
# first 50 ms; and until the model is loaded (`cli/generation.py`) nothing that they make is garbage.
_SOON = ("run", "chat", "serve", "bench")
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 143


class _Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that half-written folders are removed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code; see the module.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbosity = _take_verbosity(arguments)
    set_up_logging(verbosity)
    if "--version" in arguments[:1]:
        print(f"gptq-compile {gptq_compile.__version__}")
        return 0
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else DEFAULT
    if not arguments and name == DEFAULT:
        arguments = ["--help"]
    if name in _SOON:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        gc.disable()
    try:
        with _sigterm_unwinds():
            return int(importlib.import_module(COMMANDS[name][0]).main(arguments))
    except SystemExit as e:  # argparse after --help
        return e.code if isinstance(e.code, int) else EXIT_ERROR
    except KeyboardInterrupt:
        return _fail("Interrupted; nothing half-written was left behind.", EXIT_INTERRUPTED)
    except _Terminated:
        return _fail("Terminated; nothing half-written was left behind.", EXIT_TERMINATED)
    except BrokenPipeError:
        # The reader of our output left (`gptq-compile inspect OUT | head`): keep the interpreter from complaining too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        sentence = explain(e)
        if sentence is None or verbosity:
            import traceback

            traceback.print_exc()
        return _fail(sentence or f"Internal error ({type(e).__name__}: {e}). Please report it.", EXIT_ERROR)
    finally:
        gc.enable()


def explain(error: Exception) -> str | None:
    """The sentence for an error a user can act on; None for a bug."""
    if isinstance(error, GptqCompileError):
        return str(error)
    runtime = sys.modules.get("gptq_compile.runtime.errors")  # not imported: then it raised nothing
    if runtime is not None and isinstance(error, runtime.RuntimeFailure):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _EXTRAS:
        return (
            f"The package {error.name} is not installed, and compiling needs it: pip install 'gptq-compile[compile]'. "
            "Running a compiled model does not."
        )
    if isinstance(error, ModuleNotFoundError) and error.name == "onnx":
        return "The package onnx is not installed, and exporting to ONNX needs it: pip install 'gptq-compile[onnx]'."
    if isinstance(error, ModuleNotFoundError) and error.name in ("fastapi", "starlette", "pydantic", "uvicorn"):
        return f"The package {error.name} is not installed, and serving needs it: pip install 'gptq-compile[serve]'."
    if isinstance(error, ModuleNotFoundError) and error.name == "lm_eval":
        return "The package lm_eval is not installed, and tasks need it: pip install 'gptq-compile[eval]'."
    if isinstance(error, MemoryError):
        return "There is not enough memory. Use a smaller model, fewer --nsamples or a shorter --seqlen."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}."
    return None


_EXTRAS = {"torch", "transformers", "tvm", "safetensors", "datasets", "gguf", "sentencepiece", "huggingface_hub"}


def _fail(sentence: str, code: int) -> int:
    from gptq_compile.cli.output import error_line

    error_line(sentence)
    return code


def _take_verbosity(arguments: list[str]) -> int:
    """Removes -v, -vv and --verbose wherever they stand before a ``--`` and returns how often they were given."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    count, kept = 0, []
    for i, argument in enumerate(arguments):
        if i < end and argument in ("-v", "--verbose", "-vv"):
            count += 2 if argument == "-vv" else 1
        else:
            kept.append(argument)
    arguments[:] = kept
    return count


class _sigterm_unwinds:
    """Makes SIGTERM unwind the stack for the time of a command (main thread only)."""

    def __enter__(self) -> None:
        self._previous = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._raise)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    @staticmethod
    def _raise(signum: int, frame: FrameType | None) -> None:
        # Another one would interrupt the unwinding, and leave behind what is being removed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
