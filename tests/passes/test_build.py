# SPDX-License-Identifier: Apache-2.0
"""A built library runs without TVM's compiler and holds machine code for every architecture asked for."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from gptq_compile.errors import BuildError, OutputError
from gptq_compile.kernels import toolchain
from gptq_compile.kernels.runtime_libs import copy_runtime_libraries
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import I, R, T, tvm
from gptq_compile.passes.build import build, gencode_flags, relax_passes
from gptq_compile.passes.default_schedule import SortShapeFunctions, is_scheduled

WIDTH = 256
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not installed")


@I.ir_module
class Sample:
    """One in-place kernel, and elementwise and reduction operators no kernel exists for."""

    @T.prim_func(private=True, s_tir=True)
    def add_rows(rows: T.handle, cache: T.handle):
        n = T.int64()
        X = T.match_buffer(rows, (n, 256), "float32")
        C = T.match_buffer(cache, (16, 256), "float32")
        for i, j in T.grid(n, 256):
            with T.sblock("append"):
                vi, vj = T.axis.remap("SS", [i, j])
                C[vi, vj] = C[vi, vj] + X[vi, vj]

    @R.function
    def main(
        x: R.Tensor(("n", 256), "float32"),
        pair: R.Tuple(R.Tensor((256,), "float32"), R.Tensor((16, 256), "float32")),
    ) -> R.Tuple(R.Tensor(("n",), "float32"), R.Tensor(("n", 256), "float32"), R.Tensor((16, 256), "float32")):
        R.func_attr({"tir_var_upper_bound": {"n": 16}})
        cls = Sample
        with R.dataflow():
            weight = pair[0]
            cache = pair[1]
            scaled = R.multiply(x, weight)
            normed = R.nn.rms_norm(scaled, weight, axes=-1)
            mean = R.mean(R.add(normed, x), axis=-1)
            kept = R.call_tir_inplace(
                cls.add_rows, (scaled, cache), inplace_indices=1, out_ty=R.Tensor((16, 256), "float32")
            )
            R.output(mean, normed, kept)
        return (mean, normed, kept)


RUN = textwrap.dedent(
    """
    import ctypes, json, sys
    sys.modules["torch"] = None  # tvm_ffi imports torch when it can
    import numpy as np, tvm_ffi

    folder = sys.argv[1]
    ctypes.CDLL(folder + "/lib/libtvm_runtime.so", mode=ctypes.RTLD_GLOBAL)
    library = tvm_ffi.load_module(folder + "/model.so")
    vm = library["vm_load_executable"]()
    vm["vm_initialization"](1, 0, 2)
    data = np.load(folder + "/in.npz")
    empty = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    def tensor(array):
        made = empty(tvm_ffi.Shape(array.shape), tvm_ffi.dtype(str(array.dtype)), tvm_ffi.device("cpu", 0), None)
        np.from_dlpack(made)[...] = array
        return made
    cache = tensor(data["cache"])
    out = vm["main"](tensor(data["x"]), tvm_ffi.convert((tensor(data["w"]), cache)))
    mean, normed, kept = (np.from_dlpack(t) for t in out)
    np.savez(folder + "/out.npz", mean=mean, normed=normed, kept=kept, cache=np.from_dlpack(cache))
    mapped = {line.split()[-1] for line in open("/proc/self/maps") if "libtvm" in line}
    loaded = [name for name, module in sys.modules.items() if module and name.split(".")[0] in ("tvm", "torch")]
    print(json.dumps({"modules": loaded, "mapped": sorted(mapped)}))
    """
)


def test_cpu_library_runs_without_the_compiler(tmp_path: Path) -> None:
    target = Target.parse("cpu")
    info = build(Sample, target, tmp_path / "model.so")
    assert info.size == (tmp_path / "model.so").stat().st_size > 0
    assert info.archs == ("x86-64-v3",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.so"], "scratch files were left"
    copy_runtime_libraries(target, tmp_path / "lib")

    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, WIDTH)).astype(np.float32)
    w = rng.standard_normal(WIDTH).astype(np.float32)
    cache = rng.standard_normal((16, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x, w=w, cache=cache)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TVM_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["modules"] == []
    assert not [path for path in seen["mapped"] if "libtvm_compiler" in path]
    assert str(tmp_path / "lib" / "libtvm_runtime.so") in seen["mapped"]
    assert len([path for path in seen["mapped"] if path.endswith("/libtvm_ffi.so")]) == 1, "two registries"

    scaled = x.astype(np.float64) * w
    normed = scaled / np.sqrt((scaled**2).mean(-1, keepdims=True) + 1e-5) * w
    cache64 = cache.astype(np.float64)
    cache64[:5] += scaled
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["normed"], normed, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(out["mean"], (normed + x).mean(-1), rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(out["kept"], cache64, rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(out["cache"], out["kept"], err_msg="the cache was copied, not changed in place")


@I.ir_module
class Written:
    """A kernel with its own schedule between two operators it could be fused with."""

    @T.prim_func(private=True, s_tir=True)
    def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        for b in T.thread_binding(2, thread="blockIdx.x"):
            for t in T.thread_binding(32, thread="threadIdx.x"):
                y[b * 32 + t] = x[b * 32 + t] * T.float32(2)

    @R.function
    def main(x: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
        cls = Written
        with R.dataflow():
            once = R.add(x, x)
            twice = R.call_tir(cls.double, (once,), R.Tensor((64,), "float32"))
            out = R.add(twice, x)
            R.output(out)
        return out


def lowered_functions(mod: Any, target: Target) -> dict[str, Any]:
    """Runs the passes up to and including the default schedules."""
    names = [p.info.name for p in relax_passes(target)]
    with target.tvm():
        mod = tvm.transform.Sequential(relax_passes(target)[: names.index("ScheduleLeftovers") + 1])(mod)
    return {v.name_hint: f for v, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}


def test_leftovers_on_the_cpu_are_vectorized_and_shared_out() -> None:
    functions = lowered_functions(Sample, Target.parse("cpu"))
    for name in ("rms_norm", "mean"):
        text = functions[name].script()
        assert "T.parallel(n)" in text and "T.vectorized(T.int64(32))" in text, text
    assert "T.parallel(n)" in functions["multiply"].script()


def test_written_kernels_are_left_alone() -> None:
    functions = lowered_functions(Written, Target.parse("cuda:sm_80"))
    root = functions["double"].body  # a function of two tensors gets a root block around its unchanged loops
    assert tvm_ffi.structural_equal(root.block.body, Written["double"].body)
    assert set(functions) == {"double", "add"}, "an operator was fused into the kernel"
    assert not is_scheduled(Sample["add_rows"])
    assert is_scheduled(Sample["add_rows"].with_attr("tirx.is_scheduled", True))


def test_sizes_are_computed_in_the_order_of_their_places() -> None:
    @T.prim_func(private=True, s_tir=True)
    def sizes(H: T.Buffer((T.int64(4),), "int64")):
        H[T.int64(3)] = H[T.int64(0)] * T.int64(12)
        H[T.int64(1)] = H[T.int64(0)] * T.int64(4)
        H[T.int64(2)] = H[T.int64(0)] * T.int64(8)

    sorted_ = SortShapeFunctions()(tvm.IRModule({"shape_func": sizes, "other": sizes}))
    places = {var.name_hint: [int(s.indices[0]) for s in f.body.seq] for var, f in sorted_.functions_items()}
    assert places == {"shape_func": [1, 2, 3], "other": [3, 1, 2]}


def test_passes_do_not_change_their_input() -> None:
    before = Sample.script()
    lowered_functions(Sample, Target.parse("cpu"))
    assert Sample.script() == before


@needs_nvcc
def test_cuda_library_holds_code_for_every_architecture(tmp_path: Path) -> None:
    info = build(Sample, Target.parse("cuda:sm_80,sm_90"), tmp_path / "model.so")
    assert info.archs == ("sm_80", "sm_90", "compute_90")
    # An independent reader: the ELF files inside, with the architecture in e_flags (byte 1 since CUDA ABI 8, else 0).
    data = (tmp_path / "model.so").read_bytes()
    elves = set()
    at = data.find(b"\x7fELF", 4)
    while at >= 0:
        if int.from_bytes(data[at + 18 : at + 20], "little") == 190:  # EM_CUDA
            elves.add(data[at + 0x30 + (data[at + 8] >= 8)])
        at = data.find(b"\x7fELF", at + 4)
    assert elves == {80, 90}


def libraries_mapped_by(code: str, *args: Path) -> set[str]:
    """Runs ``code`` in a bare Python and returns the paths of the TVM and CUDA libraries it has mapped."""
    code += "\nprint({l.split()[-1] for l in open('/proc/self/maps') if 'libtvm' in l or 'libcuda' in l})"
    command = [sys.executable, "-c", "import ctypes, sys\n" + code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return set(ast.literal_eval(done.stdout))


def test_runtime_libraries_need_only_their_own_folder(tmp_path: Path) -> None:
    copies = copy_runtime_libraries(Target.parse("cpu"), tmp_path / "moved" / "lib")
    mapped = libraries_mapped_by("ctypes.CDLL(sys.argv[1])", copies[-1])
    assert mapped == {str(copy) for copy in copies}


@pytest.mark.skipif(toolchain.find_cudart() is None, reason="libcudart.so.13 is not installed")
@pytest.mark.skipif(toolchain.find_cc() is None, reason="no C compiler is installed")
def test_cuda_runtime_libraries_need_only_their_own_folder_and_the_driver(tmp_path: Path) -> None:
    copies = copy_runtime_libraries(Target.parse("cuda:sm_80"), tmp_path / "lib")
    driver = toolchain.build_libcuda_stub(tmp_path)
    mapped = libraries_mapped_by("ctypes.CDLL(sys.argv[1]); ctypes.CDLL(sys.argv[2])", driver, copies[-1])
    assert mapped == {str(copy) for copy in copies} | {str(driver)}


def test_architecture_flags() -> None:
    assert gencode_flags(["sm_80", "sm_90a"]) == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_80,code=compute_80"),
    ]
    assert "code=compute_90a" not in " ".join(gencode_flags(["sm_90a"]))


def fake_nvcc(folder: Path, compile_command: str) -> Path:
    """Writes a program that introduces itself as nvcc 13.0 and compiles with ``compile_command``."""
    path = folder / "nvcc"
    path.write_text(
        "#!/bin/sh\ncase $1 in\n--version) echo 'release 13.0, V13.0.88';;\n"
        f"--list-gpu-code) echo sm_80;;\n*) {compile_command};;\nesac\n"
    )
    path.chmod(0o755)
    return path


def test_failing_nvcc_says_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path, "echo 'kernels.cu(7): error: bad lane' >&2; exit 2")))
    with pytest.raises(BuildError, match=r"kernels.cu\(7\): error: bad lane"):
        build(Sample, Target.parse("cuda:sm_80"), tmp_path / "model.so")
    assert [p.name for p in tmp_path.iterdir()] == ["nvcc"]


def test_unknown_architecture_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path, "exit 1")))
    with pytest.raises(BuildError, match="cannot emit code for sm_90"):
        build(Sample, Target.parse("cuda:sm_80,sm_90"), tmp_path / "model.so")


def test_missing_compilers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BuildError, match="No C compiler"):
        build(Sample, Target.parse("cpu"), tmp_path / "model.so")
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA_ROOT", tmp_path / "none")
    with pytest.raises(BuildError, match="nvcc was not found"):
        toolchain.require_nvcc(["sm_80"])


def test_unwritable_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="could not be written"):
        build(Sample, Target.parse("cpu"), tmp_path / "no such folder" / "model.so")
    (tmp_path / "model.so").mkdir()
    with pytest.raises(OutputError):
        build(Sample, Target.parse("cpu"), tmp_path / "model.so")
    assert [p.name for p in tmp_path.iterdir()] == ["model.so"]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linker = tmp_path / "cc"
    linker.write_text("#!/bin/sh\necho '/usr/bin/ld: final link failed: No space left on device' >&2; exit 1\n")
    linker.chmod(0o755)
    monkeypatch.setenv("CC", str(linker))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="disk is full"):
        build(Sample, Target.parse("cpu"), tmp_path / "out" / "model.so")
    assert not list((tmp_path / "out").iterdir())


@I.ir_module
class Forgotten:
    """An in-place call whose result nobody reads."""

    @T.prim_func(private=True, s_tir=True)
    def double(x: T.Buffer((64,), "float32")):
        for i in range(64):
            with T.sblock("double"):
                v = T.axis.spatial(64, i)
                x[v] = x[v] * T.float32(2)

    @R.function
    def main(x: R.Tensor((64,), "float32"), y: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
        cls = Forgotten
        _changed = R.call_tir_inplace(cls.double, (x,), 0, R.Tensor((64,), "float32"))
        z = R.add(y, y)
        return z


def test_an_in_place_call_is_never_dropped_silently(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="dropped in-place calls of double"):
        build(Forgotten, Target.parse("cpu"), tmp_path / "model.so")


def test_softmax_computes_its_exponentials_once() -> None:
    builder = tvm.relax.BlockBuilder()
    x = tvm.relax.Var("x", R.Tensor((tvm.tirx.Var("n", "int64"), 512), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(tvm.relax.op.nn.softmax(x, axis=-1)))
    text = lowered_functions(builder.get(), Target.parse("cpu"))["softmax"].script()
    assert text.count("T.exp(") == 1 and "T.parallel(n)" in text, text


def test_code_for_several_processors_runs_on_all_of_them(tmp_path):
    both = Target.parse("cpu:x86-64-v3,x86-64-v4+avx512vnni")
    found = {}
    for name, target in (("both", both), ("v4", both.variants[1])):
        info = build(Sample, target, tmp_path / f"{name}.so")
        assert info.archs == target.archs[:1]
        text = subprocess.run(["objdump", "-d", info.path], capture_output=True, text=True, check=True).stdout
        found[name] = "%zmm" in text or "%xmm16" in text or "{%k" in text
    assert found == {"both": False, "v4": True}, "AVX-512 is in the wrong library"
