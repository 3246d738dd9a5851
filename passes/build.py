# SPDX-License-Identifier: Apache-2.0
"""The last pass: a Relax module becomes one shared library, ``model.so``.

How a built library is loaded and called with nothing but ``tvm_ffi`` and the libraries of
:mod:`gptq_compile.kernels.runtime_libs`, as ``tests/passes/test_build.py`` does::

    import ctypes, tvm_ffi                      # brings its own libtvm_ffi.so; the copy in lib/ is for C++ programs
    ctypes.CDLL("lib/libtvm_runtime.so", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL("lib/libtvm_runtime_cuda.so")   # CUDA only; registers device_api.cuda; needs a driver of CUDA 13
    library = tvm_ffi.load_module("model.so")
    vm = library["vm_load_executable"]()        # keep library and vm alive as long as any result
    vm["vm_initialization"](1, 0, 2)            # CPU: DLPack device type, index, allocator (1 naive, 2 pooled)
    vm["vm_initialization"](2, 0, 2, 1, 0, 2)   # CUDA: the device first, the CPU last (shape arithmetic)
    logits = vm["forward"](tensor, tvm_ffi.convert((t0, t1)))

Arguments are ``tvm_ffi.Tensor`` and, for tuples, ``tvm_ffi.Array`` of them (convert long tuples once and keep the
Array); a result is a Tensor or an Array. Tensors come from
``tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")(tvm_ffi.Shape(shape), tvm_ffi.dtype("float16"),
tvm_ffi.device("cuda", 0), None)``, on the CPU also without a copy from ``tvm_ffi.from_dlpack(array)``.
``"runtime.TVMTensorCopyFromTo"(source, destination)`` copies between any two devices on the current stream.
CUDA kernels are launched on the stream that the *calling thread* set by ``tvm_ffi.use_raw_stream(device, handle)``
(``TVMFFIEnvSetStream``); the default is the legacy stream 0, which cannot be captured into a graph.

A whole call can be captured into a CUDA graph with the driver API: on a stream of ``cuStreamCreate`` set as above,
call the function *twice* and drop the results, then ``cuStreamBeginCapture_v2`` with mode 2 (relaxed), call it once
more and keep that result (its buffers are what replays write), ``cuStreamEndCapture``, ``cuGraphInstantiateWithFlags``.
Replays gave the right numbers on an H200 with driver 580 in modes 1 and 2. Mode 0 (global) failed there after a single
warm-up: the VM source keeps the last result until the next one, so the pool is one set of outputs short and calls
cudaMalloc during the capture; the second warm-up call is to prevent that and was not tried by itself. When the device
is full the pool gives its unused blocks, a graph's temporaries among them, back to the driver, so allocate caches and
weights before capturing.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_compile.errors import BuildError, GptqCompileError, OutputError
from gptq_compile.kernels.fatbin import archs_in
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.toolchain import Nvcc, require_ar, require_cc, require_nvcc
from gptq_compile.kernels.tvm_env import relax, require_cuda_codegen, tvm
from gptq_compile.passes.default_schedule import KeepKernels, ScheduleLeftovers, SortShapeFunctions

logger = logging.getLogger(__name__)

_CODE = "generating code"
_CALLBACK = "tvm_callback_cuda_compile"
_callback_lock = threading.Lock()
# TVM's tensor expressions keep state that threads share; its code generation does not.
_lowering_lock = threading.Lock()


@dataclass(frozen=True)
class BuildInfo:
    """What a build made.

    Attributes:
        path: The library.
        seconds: Wall-clock time of the whole build.
        size: Bytes of the library.
        archs: Machine code found inside: ``sm_NN`` and ``compute_NN`` (PTX) for CUDA, else the ``-mcpu`` name.
    """

    path: Path
    seconds: float
    size: int
    archs: tuple[str, ...]


OnStep = Callable[[str | None], None]
"""Is told each step of a build when it starts, and None after the last."""


def build(
    mod: Any, target: Target, out: Path, *, fast_math: bool = False, on_step: OnStep = lambda _: None
) -> BuildInfo:
    """Compiles a Relax module into one shared library; several may be compiled at once, by threads.

    Args:
        mod: ``tvm.IRModule``; Relax functions over ``call_tir`` and Relax operators. PrimFuncs with a schedule are
            kept as they are, the others get a default one. A Relax function's attribute ``tir_var_upper_bound``
            (name of a symbolic dimension -> largest value) lets its temporaries be planned statically. The result of
            a ``call_tir_inplace`` must be used or returned.
        target: What to emit code for; for the CPU, code that runs on every one of its architectures, which is code
            for the first of them. Build each of its ``variants`` to have code that is made for each.
        out: The library's path; replaced atomically. With the suffix ``.a``, an archive of objects to be linked
            elsewhere (``gcc -shared -Wl,--whole-archive model.a``), for which no linker is needed.
        fast_math: Let nvcc approximate divisions and transcendental functions, and flush denormals.
        on_step: is told what is done: TVM's passes by their names, code generation, nvcc, linking.

    Returns:
        What was built.

    Raises:
        BuildError: if a compiler is missing or fails, or the module cannot be lowered.
        OutputError: if ``out`` cannot be written; nothing half-written is left.
    """
    started = time.perf_counter()
    out = Path(out)
    archive = out.suffix == ".a"
    linker = [str(require_ar()), "rcsD"] if archive else [str(require_cc(target.is_arm)), "-shared", "-fPIC", "-o"]
    nvcc = None
    if target.kind == "cuda":
        nvcc = require_nvcc(target.archs)
        require_cuda_codegen()
    with _scratch_beside(out) as scratch:
        library = scratch / out.name
        _emit(mod, target, nvcc, linker, library, scratch, fast_math, on_step)
        on_step(None)
        found = tuple(archs_in(library)) if target.kind == "cuda" else target.archs[:1]
        missing = [arch for arch in target.archs if arch not in found] if target.kind == "cuda" else []
        if missing:
            raise BuildError(
                f"The build of {out.name} finished without machine code for {', '.join(missing)} "
                f"(found: {', '.join(found) or 'none'}). Does the module have any kernel for the GPU?"
            )
        os.replace(library, out)
    info = BuildInfo(out, time.perf_counter() - started, out.stat().st_size, found)
    logger.info("built %s: %.1f MB for %s in %.1f s", out, info.size / 1e6, ", ".join(found), info.seconds)
    return info


def relax_passes(target: Target) -> list[Any]:
    """Lists the passes from Relax operators to VM instructions, in order.

    This is TVM's own list with four differences: kernels are kept out of fusion, CPU leftovers are scheduled too, shape
    functions are put in order, and RewriteCUDAGraph is left out because the runtime captures whole steps.
    """
    transform = relax.transform
    return [
        KeepKernels(),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        ScheduleLeftovers(target.kind),
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        SortShapeFunctions(),
        transform.AttachGlobalSymbol(),
    ]


def _emit(
    mod: Any,
    target: Target,
    nvcc: Nvcc | None,
    linker: Sequence[str],
    library: Path,
    scratch: Path,
    fast_math: bool,
    on_step: OnStep,
) -> None:
    """Lowers, generates code and links ``library``; failures come out as this project's errors."""
    tvm_target = target.tvm()
    failures: list[GptqCompileError] = []
    compile_cuda = _cuda_compiler(nvcc, target.archs, scratch, fast_math, failures, on_step) if nvcc else None

    def link(output: str, objects: Sequence[str], **_: Any) -> None:
        on_step("linking")
        _run(
            [*linker, output, *map(str, objects), *([] if output.endswith(".a") else ["-lm"])],
            f"linking {library.name}",
            failures,
        )

    try:
        with _cuda_callback(compile_cuda), tvm_target:
            with _lowering_lock, tvm.transform.PassContext(instruments=[_steps(on_step)]):
                lowered = tvm.transform.Sequential(relax_passes(target))(mod)
                on_step("checking in-place calls")
                _check_in_place_calls(mod, lowered)
            on_step(_CODE)
            executable = relax.build(lowered, tvm_target, relax_pipeline=None)
            executable.export_library(str(library), fcompile=link, workspace_dir=str(scratch))
    except (OSError, GptqCompileError):
        raise
    except Exception as error:
        # What crosses TVM's C++ comes back as another exception; the one that was raised first says how to mend it.
        if failures:
            raise failures[0] from error
        if "No space left on device" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise BuildError(f"TVM could not compile the module for {target}: {_last_words(str(error))}") from error


def _steps(on_step: OnStep) -> Any:
    """A pass instrument that tells the names of passes, but not of those inside of others."""

    @tvm.ir.instrument.pass_instrument
    class Steps:
        depth = 0

        def run_before_pass(self, _: Any, info: Any) -> None:
            self.depth += 1
            if self.depth == 2:  # 1 is the list of all
                on_step(str(info.name))

        def run_after_pass(self, _: Any, info: Any) -> None:
            self.depth -= 1

    return Steps()


def _check_in_place_calls(before: Any, after: Any) -> None:
    """Checks that no in-place call was lost: TVM drops a call whose result nobody reads, whatever it writes.

    Raises:
        BuildError: naming the kernel whose call disappeared.
    """
    wanted, found = _kernel_calls(before), _kernel_calls(after)
    lost = sorted(name for name, count in wanted.items() if found[name] < count)
    if lost:
        raise BuildError(
            f"TVM dropped in-place calls of {', '.join(lost)}, because nothing reads their results. Pass the result "
            f"of call_tir_inplace on to what depends on it, or return it from the function."
        )


def _kernel_calls(mod: Any) -> Counter[str]:
    """Counts the in-place calls of each PrimFunc before lowering, or its direct calls after."""
    counts: Counter[str] = Counter()
    in_place = tvm.ir.Op.get("relax.call_tir_inplace")
    for _, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        # Every call is the value of a binding. (A visitor of all expressions would look at shared ones again and again:
        # millions, and a third of the time of a build.)
        for block in func.body.blocks:
            for binding in block.bindings:
                call = binding.value
                if not isinstance(call, tvm.ir.Call):
                    continue
                if isinstance(call.op, tvm.ir.GlobalVar):
                    counts[call.op.name_hint] += 1
                elif call.op == in_place:
                    counts[call.args[0].name_hint] += 1
    return counts


def _cuda_compiler(
    nvcc: Nvcc,
    archs: Sequence[str],
    scratch: Path,
    fast_math: bool,
    failures: list[GptqCompileError],
    on_step: OnStep,
) -> Any:
    """Returns the function TVM calls with CUDA source; it answers with a fatbin for every architecture asked."""

    def compile_cuda(code: str) -> bytes:
        source, fatbin = scratch / "kernels.cu", scratch / "kernels.fatbin"
        source.write_text(code)
        command = [str(nvcc.path), "--fatbin", "-O3", "--threads", str(min(len(archs), os.cpu_count() or 1))]
        command += gencode_flags(archs)
        # TVM's generated code uses the operators of __half and __nv_bfloat16 and constexpr device helpers.
        command += [f"-U__CUDA_NO_{kind}__" for kind in ("HALF_OPERATORS", "HALF_CONVERSIONS")]
        command += [f"-U__CUDA_NO_BFLOAT16_{kind}__" for kind in ("OPERATORS", "CONVERSIONS")]
        command += ["-U__CUDA_NO_BFLOAT162_OPERATORS__", "-U__CUDA_NO_BFLOAT162_CONVERSIONS__"]
        command += ["--expt-relaxed-constexpr", "--expt-extended-lambda", "-w"]
        command += ["--use_fast_math"] if fast_math else []
        started = time.perf_counter()
        on_step("nvcc")
        _run([*command, "-o", str(fatbin), str(source)], f"nvcc for {', '.join(archs)}", failures)
        logger.debug("nvcc took %.1f s for %s", time.perf_counter() - started, ", ".join(archs))
        on_step(_CODE)
        return fatbin.read_bytes()

    return compile_cuda


def gencode_flags(archs: Sequence[str]) -> list[str]:
    """Returns nvcc's flags for machine code of every architecture, plus PTX of the highest portable one.

    PTX of an architecture-specific target (``sm_90a``) runs on no newer GPU, so it is not added for those.
    """
    flags = []
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch[3:]},code={arch}"]
    portable = [arch[3:] for arch in archs if arch[3:].isdigit()]
    if portable:
        highest = max(portable, key=int)
        flags += ["-gencode", f"arch=compute_{highest},code=compute_{highest}"]
    return flags


@contextmanager
def _cuda_callback(compile_cuda: Any | None) -> Iterator[None]:
    """Makes TVM hand CUDA source to ``compile_cuda`` for the time of one build."""
    if compile_cuda is None:
        yield
        return
    with _callback_lock:
        previous = tvm.get_global_func(_CALLBACK)
        tvm.register_global_func(_CALLBACK, compile_cuda, override=True)
        try:
            yield
        finally:
            tvm.register_global_func(_CALLBACK, previous, override=True)


def _run(command: Sequence[str], what: str, failures: list[GptqCompileError]) -> None:
    """Runs a compiler; what it says when it fails goes into a BuildError that is also noted in ``failures``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        said, status = f"{done.stdout}\n{done.stderr}".strip(), done.returncode
    except OSError as error:
        said, status = str(error), -1
    if status == 0:
        return
    if "No space left on device" in said:
        failure: GptqCompileError = OutputError(
            f"The disk is full: {what} could not write its output. Free some space, or choose another output folder."
        )
    else:
        failure = BuildError(
            f"{what} failed with status {status}: {_last_words(said)}\nThe command was: {' '.join(command)}"
        )
    failures.append(failure)
    raise failure


def _last_words(text: str, limit: int = 4000) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"[...] {text[-limit:]}"


@contextmanager
def _scratch_beside(out: Path) -> Iterator[Path]:
    """Yields a temporary folder on the disk of ``out``, so that a rename moves the result into place.

    Raises:
        OutputError: if the folder of ``out`` cannot be written or the disk fills up meanwhile.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputError(
            f"{out} could not be written: {error.strerror or error}. "
            f"Choose an output folder that exists, is writable and has free space."
        ) from error
