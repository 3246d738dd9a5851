# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="valid-type"
"""A tiny hand-made artifact with every entry of the runtime contract, and its numpy reference.

The model is small but not trivial: two layers with different paged caches, an output that depends on every earlier
token and on the position, byte-level tokens (0..255), ``<eos>`` 256 and ``<bos>`` 257. A mistake in page tables, slots,
row order or padding changes its logits.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np

VOCAB, HIDDEN, LAYERS, PAGE, EOS, BOS = 258, 8, 2, 16, 256, 257
CONTEXT = 96
BUCKETS = (1, 2, 4)


def toy_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights in the order of the weights tuple, float32: embedding [V, C], two mixers [C, C], head [V, C]."""
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.standard_normal((VOCAB, HIDDEN)).astype("float32"),
        "mix.0": rng.standard_normal((HIDDEN, HIDDEN)).astype("float32"),
        "mix.1": rng.standard_normal((HIDDEN, HIDDEN)).astype("float32"),
        "head": rng.standard_normal((VOCAB, HIDDEN)).astype("float32") * 2,
    }


def reference_logits(ids: list[int], weights: dict[str, np.ndarray]) -> np.ndarray:
    """Full-sequence float64 logits [n, V] of the toy model, with no cache."""
    w = {k: v.astype("float64") for k, v in weights.items()}
    n = len(ids)
    h = w["embed"][ids]
    for layer in range(LAYERS):
        k, v = h, h @ w[f"mix.{layer}"].T
        out = np.zeros_like(h)
        for t in range(n):
            for j in range(t + 1):
                out[t] += v[j] * np.tanh(k[j]) / (1.0 + t - j)
        h = np.tanh(h + out + 0.01 * np.arange(n)[:, None])
    return h @ w["head"].T


def hash_uniform(seed: int, position: int, token: int) -> float:
    """The toy sampler's counter-based uniform in (0, 1), float32 arithmetic on 32-bit integers."""
    x = (seed * 747796405 + position * 2891336453 + token * 277803737 + 12345) & 0xFFFFFFFF
    x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    x = (x >> 16) ^ x
    return ((x >> 8) + 0.5) / 16777216.0


def build_module() -> Any:
    """Compiles the toy's Relax module for the CPU."""
    from gptq_compile.kernels.tvm_env import T, relax, tvm

    C, V, P = HIDDEN, VOCAB, PAGE

    @T.prim_func(private=True)
    def embed(ids: T.handle, table: T.Buffer((T.int64(V), T.int64(C)), "float32"), out: T.handle):
        n = T.int64()
        a = T.match_buffer(ids, (n,), "int32")
        o = T.match_buffer(out, (n, T.int64(C)), "float32")
        for i, c in T.grid(n, C):
            o[i, c] = table[T.cast(a[i], "int64"), c]

    @T.prim_func(private=True)
    def project(x: T.handle, w: T.Buffer((T.int64(C), T.int64(C)), "float32"), out: T.handle):
        n = T.int64()
        a = T.match_buffer(x, (n, T.int64(C)), "float32")
        o = T.match_buffer(out, (n, T.int64(C)), "float32")
        for i, c in T.grid(n, C):
            o[i, c] = T.float32(0)
            for d in range(C):
                o[i, c] = o[i, c] + a[i, d] * w[c, d]

    @T.prim_func(private=True)
    def append(k: T.handle, v: T.handle, slots: T.handle, kc: T.handle, vc: T.handle):
        n = T.int64()
        pages = T.int64()
        a = T.match_buffer(k, (n, T.int64(C)), "float32")
        b = T.match_buffer(v, (n, T.int64(C)), "float32")
        s = T.match_buffer(slots, (n,), "int32")
        kb = T.match_buffer(kc, (pages, T.int64(1), T.int64(P), T.int64(C)), "float32")
        vb = T.match_buffer(vc, (pages, T.int64(1), T.int64(P), T.int64(C)), "float32")
        for i, c in T.grid(n, C):
            kb[T.cast(s[i], "int64") // P, 0, T.cast(s[i], "int64") % P, c] = a[i, c]
            vb[T.cast(s[i], "int64") // P, 0, T.cast(s[i], "int64") % P, c] = b[i, c]

    @T.prim_func(private=True)
    def attend(x: T.handle, kc: T.handle, vc: T.handle, pos: T.handle, seq: T.handle, table: T.handle, out: T.handle):
        n = T.int64()
        pages = T.int64()
        b = T.int64()
        p = T.int64()
        a = T.match_buffer(x, (n, T.int64(C)), "float32")
        kb = T.match_buffer(kc, (pages, T.int64(1), T.int64(P), T.int64(C)), "float32")
        vb = T.match_buffer(vc, (pages, T.int64(1), T.int64(P), T.int64(C)), "float32")
        q = T.match_buffer(pos, (n,), "int32")
        s = T.match_buffer(seq, (n,), "int32")
        t = T.match_buffer(table, (b, p), "int32")
        o = T.match_buffer(out, (n, T.int64(C)), "float32")
        for i, c in T.grid(n, C):
            o[i, c] = T.float32(0)
            for j in range(T.cast(q[i], "int64") + T.int64(1)):
                o[i, c] = o[i, c] + vb[T.cast(t[T.cast(s[i], "int64"), j // P], "int64"), 0, j % P, c] * T.tanh(
                    kb[T.cast(t[T.cast(s[i], "int64"), j // P], "int64"), 0, j % P, c]
                ) / T.cast(T.int64(1) + T.cast(q[i], "int64") - j, "float32")
            o[i, c] = T.tanh(a[i, c] + o[i, c] + T.float32(0.01) * T.cast(q[i], "float32"))

    @T.prim_func(private=True)
    def head(x: T.handle, rows: T.handle, w: T.Buffer((T.int64(V), T.int64(C)), "float32"), out: T.handle):
        n = T.int64()
        m = T.int64()
        a = T.match_buffer(x, (n, T.int64(C)), "float32")
        r = T.match_buffer(rows, (m,), "int32")
        o = T.match_buffer(out, (m, T.int64(V)), "float32")
        for i, v in T.grid(m, V):
            o[i, v] = T.float32(0)
            for d in range(C):
                o[i, v] = o[i, v] + a[T.cast(r[i], "int64"), d] * w[v, d]

    @T.prim_func(private=True)
    def sample(
        logits: T.handle, temperature: T.handle, top_k: T.handle, top_p: T.handle, min_p: T.handle,
        seeds: T.handle, positions: T.handle, out: T.handle,
    ):  # fmt: skip
        b = T.int64()
        x = T.match_buffer(logits, (b, T.int64(V)), "float32")
        te = T.match_buffer(temperature, (b,), "float32")
        tk = T.match_buffer(top_k, (b,), "int32")
        tp = T.match_buffer(top_p, (b,), "float32")
        mp = T.match_buffer(min_p, (b,), "float32")
        se = T.match_buffer(seeds, (b,), "int32")
        po = T.match_buffer(positions, (b,), "int32")
        o = T.match_buffer(out, (b,), "int32")
        best = T.alloc_buffer((1,), "float32")
        score = T.alloc_buffer((1,), "float32")
        h = T.alloc_buffer((1,), "uint32")
        for i in range(b):
            best[0] = T.float32(-3e38)
            o[i] = -1
            for v in range(V):
                score[0] = x[i, v]
                if te[i] > T.float32(0):
                    h[0] = (
                        T.cast(se[i], "uint32") * T.uint32(747796405)
                        + T.cast(po[i], "uint32") * T.uint32(2891336453)
                        + T.cast(v, "uint32") * T.uint32(277803737)
                        + T.uint32(12345)
                    )
                    h[0] = (T.shift_right(h[0], T.uint32(16)) ^ h[0]) * T.uint32(0x45D9F3B)
                    h[0] = (T.shift_right(h[0], T.uint32(16)) ^ h[0]) * T.uint32(0x45D9F3B)
                    h[0] = T.shift_right(h[0], T.uint32(16)) ^ h[0]
                    # top_k, top_p and min_p shift the noise, so that a test sees whether they arrive.
                    score[0] = x[i, v] / te[i] - T.log(
                        -T.log(
                            (T.cast(T.shift_right(h[0], T.uint32(8)), "float32") + T.float32(0.5)) / T.float32(16777216)
                        )
                    ) * (T.float32(1) + T.cast(tk[i], "float32") + (T.float32(1) - tp[i]) + mp[i])
                if score[0] > best[0]:
                    best[0] = score[0]
                    o[i] = T.cast(v, "int32")

    @T.prim_func(private=True)
    def penalize(logits: T.handle, seen: T.handle, penalty: T.handle):
        b = T.int64()
        x = T.match_buffer(logits, (b, T.int64(V)), "float32")
        s = T.match_buffer(seen, (b, T.int64(V)), "uint8")
        p = T.match_buffer(penalty, (b,), "float32")
        for i, v in T.grid(b, V):
            if s[i, v] != T.uint8(0):
                x[i, v] = T.if_then_else(x[i, v] > T.float32(0), x[i, v] / p[i], x[i, v] * p[i])

    @T.prim_func(private=True)
    def mark(seen: T.handle, tokens: T.handle):
        b = T.int64()
        s = T.match_buffer(seen, (b, T.int64(V)), "uint8")
        t = T.match_buffer(tokens, (b,), "int32")
        for i in range(b):
            s[i, T.cast(t[i], "int64")] = T.uint8(1)

    @T.prim_func(private=True)
    def step(tokens: T.handle, table: T.handle, ids: T.handle, positions: T.handle, slots: T.handle):
        b = T.int64()
        p = T.int64()
        a = T.match_buffer(tokens, (b,), "int32")
        t = T.match_buffer(table, (b, p), "int32")
        o = T.match_buffer(ids, (b,), "int32")
        q = T.match_buffer(positions, (b,), "int32")
        s = T.match_buffer(slots, (b,), "int32")
        for i in range(b):
            o[i] = T.max(a[i], 0)
            q[i] = q[i] + 1
            s[i] = t[i, T.cast(q[i], "int64") // P] * P + q[i] % P

    i64 = lambda name: tvm.tirx.Var(name, "int64")  # noqa: E731
    ty = lambda shape, dtype="float32": relax.TensorType(shape, dtype)  # noqa: E731
    bb = relax.BlockBuilder()
    gv = {
        name: bb.add_func(f, f"toy_{name}")
        for name, f in {
            "embed": embed, "project": project, "append": append, "attend": attend, "head": head,
            "sample": sample, "penalize": penalize, "mark": mark, "step": step,
        }.items()
    }  # fmt: skip

    def emit(name: str, args: list[Any], out: Any) -> Any:
        return bb.emit(relax.op.call_tir(gv[name], relax.Tuple(args), out))

    def inplace(name: str, args: list[Any], indices: list[int], out: Any) -> Any:
        return bb.emit(relax.op.call_tir_inplace(gv[name], relax.Tuple(args), indices, out))

    def forward(name: str, n: Any, b: Any, m: Any) -> None:
        p, pages = i64("p"), i64("pages")
        cache = ty([pages, 1, P, C])
        params = [
            relax.Var("input_ids", ty([n], "int32")),
            relax.Var("positions", ty([n], "int32")),
            relax.Var("seq_of_token", ty([n], "int32")),
            relax.Var("slots", ty([n], "int32")),
            relax.Var("page_table", ty([b, p], "int32")),
            relax.Var("logit_rows", ty([m], "int32")),
            relax.Var("caches", relax.TupleType([cache] * (2 * LAYERS))),
            relax.Var("weights", relax.TupleType([ty([V, C]), ty([C, C]), ty([C, C]), ty([V, C])])),
        ]
        ids, pos, seq, slots, table, rows, caches, weights = params
        with bb.function(name, params):
            w = [bb.emit(relax.TupleGetItem(weights, i)) for i in range(4)]
            h = emit("embed", [ids, w[0]], ty([n, C]))
            for layer in range(LAYERS):
                kc, vc = (bb.emit(relax.TupleGetItem(caches, 2 * layer + i)) for i in range(2))
                v = emit("project", [h, w[1 + layer]], ty([n, C]))
                both = inplace("append", [h, v, slots, kc, vc], [3, 4], [cache, cache])
                kc, vc = (bb.emit(relax.TupleGetItem(both, i)) for i in range(2))
                h = emit("attend", [h, kc, vc, pos, seq, table], ty([n, C]))
            bb.emit_func_output(emit("head", [h, rows, w[3]], ty([m, V])))

    forward("forward", i64("n"), i64("b"), i64("m"))
    for bucket in BUCKETS:
        forward(f"decode_{bucket}", bucket, bucket, bucket)

    b, p = i64("b"), i64("p")
    f32, i32 = (lambda n: relax.Var(n, ty([b]))), (lambda n: relax.Var(n, ty([b], "int32")))
    params = [relax.Var("logits", ty([b, V])), f32("t"), i32("k"), f32("p"), f32("mp"), i32("s"), i32("q")]
    with bb.function("sample", params):
        bb.emit_func_output(emit("sample", params, ty([b], "int32")))
    params = [relax.Var("logits", ty([b, V])), relax.Var("seen", ty([b, V], "uint8")), f32("penalty")]
    with bb.function("repetition_penalty", params):
        bb.emit_func_output(inplace("penalize", params, [0], ty([b, V])))
    params = [relax.Var("seen", ty([b, V], "uint8")), i32("tokens")]
    with bb.function("mark_seen", params):
        bb.emit_func_output(inplace("mark", params, [0], ty([b, V], "uint8")))
    params = [i32("tokens"), relax.Var("table", ty([b, p], "int32")), i32("ids"), i32("pos"), i32("slots")]
    with bb.function("advance", params):
        bb.emit_func_output(inplace("step", params, [2, 3, 4], [ty([b], "int32")] * 3))
    mod = bb.get()
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2", "num-cores": 2})
    with target:
        return tvm.compile(mod, target)


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes float32/int32/uint8 arrays in the safetensors format, header padded to 64 bytes."""
    names = {"float32": "F32", "int32": "I32", "uint8": "U8", "float16": "F16", "int64": "I64"}
    header: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": names[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            f.write(array.tobytes())


def write_tokenizer(path: pathlib.Path) -> None:
    """Byte-level tokenizer: token i is byte i; <eos> and <bos> are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = bytes_to_unicode()
    vocab = {alphabet[i]: i for i in range(256)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<bos>", special=True)])
    assert tok.token_to_id("<eos>") == EOS and tok.token_to_id("<bos>") == BOS
    tok.save(str(path))


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's byte alphabet: printable bytes map to themselves, the others to code points from 256 on."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in keep}
    for n, b in enumerate(x for x in range(256) if x not in table):
        table[b] = chr(256 + n)
    return table


def manifest(add_bos: bool = True) -> dict[str, Any]:
    """The toy's manifest without the list of files."""
    layer = {"kv_heads": 1, "head_dim": HIDDEN, "v_head_dim": HIDDEN}
    shapes = {k: list(v.shape) for k, v in toy_weights().items()}
    return {
        "format": "gptq-compile",
        "schema_version": 1,
        "model": {
            "name": "toy", "model_type": "toy", "source": "hand-made", "vocab_size": VOCAB,
            "context_length": CONTEXT, "bos_token_id": BOS, "eos_token_ids": [EOS], "add_bos": add_bos,
        },
        "target": {"kind": "cpu", "archs": ["x86-64-v2"]},
        "dtype": "float32",
        "quantization": {"layers": []},
        "kv_cache": {"page_size": PAGE, "dtype": "float32", "layers": [layer] * LAYERS},
        "entries": {
            "forward": "forward", "decode": {str(b): f"decode_{b}" for b in BUCKETS}, "sample": "sample",
            "repetition_penalty": "repetition_penalty", "mark_seen": "mark_seen", "advance": "advance",
        },
        "library": "model.so",
        "weights": [
            {"name": n, "shape": s, "dtype": "float32", "file": "weights.safetensors"} for n, s in shapes.items()
        ],
        "generation": {"temperature": 0.7},
        "chat": {
            "bos": "<bos>",
            "roles": {
                r: {"prefix": f"[{r}]", "suffix": "[/]\n"} for r in ("system", "user", "assistant")
            },
            "generation_prompt": "[assistant]",
            "default_system": "[system]Be brief.[/]\n",
        },
        "versions": {"gptq_compile": "0.1.0"},
    }  # fmt: skip


def write_manifest(folder: pathlib.Path, data: dict[str, Any]) -> None:
    """Writes manifest.json with the sizes and hashes of the files that are in the folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            blob = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            files[name] = {"sha256": hashlib.sha256(blob).hexdigest(), "size": len(blob)}
    (folder / "manifest.json").write_text(json.dumps({**data, "files": files}, indent=1))


def write_artifact(folder: pathlib.Path) -> pathlib.Path:
    """Builds the whole toy artifact folder, runtime library included."""
    import tvm
    import tvm_ffi

    folder.mkdir(parents=True)
    build_module().export_library(str(folder / "model.so"))
    write_safetensors(folder / "weights.safetensors", toy_weights())
    write_tokenizer(folder / "tokenizer.json")
    (folder / "lib").mkdir()
    shutil.copy(pathlib.Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so", folder / "lib")
    shutil.copy(tvm_ffi.libinfo.find_libtvm_ffi(), folder / "lib")
    write_manifest(folder, manifest())
    return folder
