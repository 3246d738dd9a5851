# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile MODEL``: quantize and compile a model into a folder."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_compile.cli.output import note_line
from gptq_compile.cli.parser import Parser
from gptq_compile.errors import ConfigError
from gptq_compile.options import ACTIVATIONS, CHECKPOINTS, DTYPES, KV_CACHES, CompileOptions
from gptq_compile.passes.gptq.config import COMPUTE_DTYPES, METHODS, SEQUENTIAL, QuantizeConfig

if TYPE_CHECKING:
    from gptq_compile.cli.reporters import Reporter

_EPILOG = """\
examples:
  gptq-compile HuggingFaceTB/SmolLM2-135M-Instruct --target cpu --wbits 4 -o smollm2
  gptq-compile ./model --target cuda:sm_90 --wbits 3 --group-size 64 --calibration text.jsonl -o model-cuda
  gptq-compile run smollm2 "What is a compiler?"
"""

_QUANTIZE: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(QuantizeConfig)}
_COMPILE: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(CompileOptions)}
_SELF_ON_CPU = {"nsamples": 16, "seqlen": 512}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    arguments = parser().parse_args(argv)
    options = to_options(arguments)
    # Threads that wait by spinning take the cores from those that work as soon as anything else runs: measured on two
    # busy cores, 1.4 s of processor time a generated batch of tokens against 0.2 s. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":  # torchrun: the first reports
        from gptq_compile.api import compile_model

        compile_model(options, dry_run=arguments.dry_run)
        return 0
    from gptq_compile.cli.reporters import reporter

    with reporter(options, as_json=arguments.json) as report:
        return compile_with(options, report, dry_run=arguments.dry_run)


def compile_with(options: CompileOptions, report: Reporter, *, dry_run: bool) -> int:
    """Compiles and reports; what goes wrong is reported there too and raised again."""
    try:
        report.loading()
        from gptq_compile.api import compile_model

        report.finish(compile_model(options, report, dry_run=dry_run), dry_run=dry_run)
    except Exception as e:
        report.failed(e)
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        if options.work_dir is not None and not dry_run:
            from gptq_compile.workdir.folder import holds_work

            if holds_work(options.work_dir):
                note_line(f"What was finished is kept in {options.work_dir}; add --resume to go on with it.")
        raise
    return 0


def to_options(arguments: argparse.Namespace) -> CompileOptions:
    """The settings that were given, on top of the defaults.

    Raises:
        ConfigError: a setting is out of its range.
    """
    given = _with_defaults(vars(arguments))
    quantize = QuantizeConfig(**{k: v for k, v in given.items() if k in _QUANTIZE})
    rest = {k: v for k, v in given.items() if k in _COMPILE and k != "out"}
    kind = rest.get("target", _COMPILE["target"]).partition(":")[0]
    form = rest.get("format", _COMPILE["format"])
    out = given.get("out") or _default_out(arguments.model, kind if form == "artifact" else form, quantize)
    asked = tuple(k for k in vars(arguments) if k in _QUANTIZE or k == "calibration")
    return CompileOptions(out=Path(out).expanduser(), quantize=quantize, asked=asked, **rest)


def _with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Fills in how much text a model writes for itself on a CPU, where the usual 128 x 2048 tokens would take hours."""
    if given.get("calibration", _COMPILE["calibration"]) != "self" or given.get("method") == "rtn":
        return given
    if {"nsamples", "seqlen"} & set(given):
        return given
    import torch

    on_gpu = given.get("device", "cuda" if torch.cuda.is_available() else "cpu") != "cpu"
    return given if on_gpu else {**given, **_SELF_ON_CPU}


def _default_out(model: str, kind: str, quantize: QuantizeConfig) -> str:
    bits = f"w{quantize.wbits if quantize.avg_bits is None else quantize.avg_bits:g}"
    if quantize.max_size is not None:
        bits = f"{quantize.max_size / 1e6:g}MB"
    elif quantize.max_ppl_increase is not None:
        bits = f"ppl{100 * quantize.max_ppl_increase:g}"
    name = Path(model).name.removesuffix(".gguf") if Path(model).name not in ("", ".", "..") else "model"
    return re.sub(r"[^\w.-]+", "-", f"{name}-{kind}-{bits}")


def parser() -> argparse.ArgumentParser:
    """The command's arguments; only those given end up in the namespace, so that defaults live in one place."""
    from gptq_compile.cli.main import COMMANDS

    commands = "\n".join(f"  {name:11} {what}" for name, (_, what) in COMMANDS.items())
    p = Parser(
        prog="gptq-compile",
        usage="gptq-compile MODEL [--target cpu|cuda|cuda:sm_90] [--wbits 2|3|4|8] [-o OUT] [options]\n"
        "       gptq-compile COMMAND ...",
        description="Quantizes a Hugging Face model with GPTQ and compiles it to one folder of machine code and "
        f"weights\nthat generates text without torch.\n\ncommands:\n{commands}",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a hub id (org/name), or a .gguf file")
    p.add_argument("-o", "--out", metavar="OUT", help="folder to make (default: NAME-TARGET-wBITS here)")
    p.add_argument(
        "--format",
        choices=("artifact", *CHECKPOINTS),
        help="artifact: compiled, for `gptq-compile run`; gptq, gptq_v2: a checkpoint for transformers, GPTQModel and "
        f"vLLM, not compiled (default: {_COMPILE['format']})",
    )
    _target(p.add_argument_group("target"))
    add_quantization(p.add_argument_group("quantization"))
    add_calibration(p.add_argument_group("calibration"))
    add_input(p.add_argument_group("input"))
    add_output(p.add_argument_group("output"))
    add_debugging(p.add_argument_group("looking inside"))
    return p


def _target(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target",
        metavar="T",
        help=f"cpu, cuda (sm_80, sm_89 and sm_90 in one), or cuda:sm_90 (default: {_COMPILE['target']})",
    )
    group.add_argument("--dtype", choices=DTYPES, help="type of activations (default: float32 on cpu, float16 on cuda)")
    group.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        help="what quantized linears on the CPU multiply: int8, rounded for each group, or float (default: int8 for "
        "float32 on the CPU)",
    )
    group.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        help="type of the KV cache; int8 has a scale for each token and head (default: float16 for float32 on the CPU, "
        "else the type of activations)",
    )
    group.add_argument(
        "--batch-buckets",
        type=_sizes,
        metavar="B,B,...",
        help=f"batch sizes with a decode step of their own (default: {','.join(map(str, _COMPILE['batch_buckets']))})",
    )


def add_quantization(group: argparse._ArgumentGroup) -> None:
    default = _QUANTIZE
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--wbits", "--bits", type=int, metavar="N", help=f"2, 3, 4 or 8 (default: {default['wbits']})")
    bits.add_argument(
        "--avg-bits",
        type=float,
        metavar="F",
        help="choose bits and group size of every linear by measured sensitivity, so that its weights take F bits on "
        "average, scales and zero points included",
    )
    bits.add_argument("--max-size", type=_bytes, metavar="SIZE", help="the same, with all weights in SIZE, as 90MB")
    bits.add_argument(
        "--max-ppl-increase",
        type=_share,
        metavar="X",
        help="the same, with perplexity on held-out calibration text raised by X at most, as 5%% or 0.05 (quantizes "
        "several times)",
    )
    group.add_argument(
        "--group-size",
        "--groupsize",
        type=int,
        metavar="G",
        help=f"input features that share a scale, -1 for a whole row (default: {default['group_size']})",
    )
    group.add_argument("--method", choices=METHODS, help=f"gptq, or rtn: plain rounding (default: {default['method']})")
    _switch(group, "sym", "symmetric grid without zero points", off=("--asym",))
    _switch(group, "act_order", "columns by decreasing activation energy", more=("--desc-act",))
    _switch(group, "static_groups", "grids fitted before the column loop, so that act-order costs nothing at run time")
    _switch(group, "mse", "clip ranges by squared error instead of min and max (default: with gptq)")
    group.add_argument(
        "--damp",
        "--percdamp",
        "--damp-percent",
        type=float,
        metavar="F",
        help=f"added to the Hessian's diagonal, as a fraction of its mean (default: {default['damp']})",
    )
    group.add_argument(
        "--sequential",
        choices=SEQUENTIAL,
        help="true: every solve sees all earlier ones quantized; block: the paper's one block at a time "
        f"(default: {default['sequential']})",
    )
    group.add_argument(
        "--token-weighting",
        choices=("gradient", "none"),
        help=f"weight of a calibration token in the Hessian (default: {default['token_weighting']})",
    )
    group.add_argument(
        "--token-strength",
        type=float,
        metavar="F",
        help=f"weight of gradients against equal weights (default: {default['token_strength']})",
    )
    _switch(group, "quantize_lm_head", "quantize the output projection too")
    group.add_argument(
        "--lm-head-bits",
        type=int,
        metavar="N",
        help="else round the output projection to so many bits, 0 to leave it (default: 8 for the CPU, 0 elsewhere)",
    )
    group.add_argument(
        "--tune-epochs",
        type=int,
        metavar="N",
        help="then tune scales and norm weights on the calibration tokens, N times through, so that predictions match "
        f"the original model's; 4 to 6 is good, and costs no bits (default: {default['tune_epochs']})",
    )
    group.add_argument(
        "--tune-nsamples",
        type=int,
        metavar="N",
        help="tune on N sequences that the original model writes as well; four times --nsamples is good (default: "
        f"{default['tune_nsamples']})",
    )


def add_calibration(group: argparse._ArgumentGroup) -> None:
    default = _QUANTIZE
    group.add_argument(
        "--calibration",
        metavar="SPEC",
        help="a .txt, .jsonl or .npy (token ids) file, a datasets name as NAME[:CONFIG][:SPLIT], or self: text that "
        f"the model generates (default: {_COMPILE['calibration']})",
    )
    group.add_argument(
        "--nsamples",
        type=int,
        metavar="N",
        help=f"sequences (default: {default['nsamples']}; {_SELF_ON_CPU['nsamples']} of the model's own on a CPU)",
    )
    group.add_argument(
        "--seqlen",
        type=int,
        metavar="N",
        help=f"tokens of one, at most the context (default: {default['seqlen']}; {_SELF_ON_CPU['seqlen']} likewise)",
    )
    group.add_argument("--seed", type=int, metavar="N", help=f"seed of the sequences (default: {default['seed']})")
    group.add_argument(
        "--compute-dtype",
        choices=COMPUTE_DTYPES,
        help="type in which the sequences run through the model (default: float32 on a CPU, the model's own on a GPU)",
    )
    group.add_argument("--device", metavar="D", help="where torch quantizes: cpu, cuda (default: cuda if there)")


def add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    group.add_argument("--offline", action="store_true", help="take a hub id from the cache only")
    group.add_argument("--trust-remote-code", action="store_true", help="run the Python code in the model's repository")


def add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dequantized",
        type=Path,
        metavar="DIR",
        help="also write a Hugging Face folder with the dequantized weights, to check the result against",
    )
    group.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="keep every finished solve, and the calibration text the model writes, in DIR while the run goes on",
    )
    group.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in --work-dir")
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="HTML report of what was done (a compiled model has it inside, as report.html; this is a copy. Default "
        "for other formats: OUT.report.html)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace OUT if it is a compiled model")
    group.add_argument("--dry-run", action="store_true", default=False, help="print the plan and stop")
    group.add_argument("--json", action="store_true", default=False, help="events as JSON lines on stdout")
    group.add_argument("-v", "--verbose", action="store_true", help="log what is done; tracebacks; -vv for more")
    group.add_argument("--version", action="store_true", help="print the version")


def add_debugging(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="write what is done when, for Perfetto or chrome://tracing"
    )
    group.add_argument("--dump-ir", type=Path, metavar="DIR", help="write the IR before the first and after every pass")
    group.add_argument("--stop-after", metavar="PASS", help="end after this pass (no artifact)")
    group.add_argument("--reproducer", type=Path, metavar="DIR", help="if a pass fails, write the IR before it here")
    group.add_argument(
        "--no-validate",
        dest="validate",
        action="store_false",
        help="skip running the reference before and after every pass",
    )


def _switch(
    group: argparse._ArgumentGroup, name: str, what: str, more: tuple[str, ...] = (), off: tuple[str, ...] = ()
) -> None:
    """Adds ``--name`` and ``--no-name`` (or the words in ``off``); the last one given wins."""
    flag = "--" + name.replace("_", "-")
    on_flags, off_flags = (flag, *more), off or (f"--no-{flag[2:]}", *(f"--no-{m[2:]}" for m in more))
    default = (on_flags if _QUANTIZE[name] else off_flags)[0]
    group.add_argument(*on_flags, dest=name, action="store_true", help=f"{what} (default: {default})")
    group.add_argument(
        *off_flags, dest=name, action="store_false", help=argparse.SUPPRESS if not off else f"not {flag}"
    )


def _bytes(text: str) -> int:
    """Bytes of words like 90MB, 1.5 GiB or 90000000."""
    units = {"": 1, **{f"{p}{i}B": (1024 if i else 1000) ** (n + 1) for n, p in enumerate("KMGT") for i in ("", "i")}}
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([A-Za-z]*)", text.strip())
    unit = {u.lower(): v for u, v in units.items()}.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"The size {text!r} is not a number of bytes, as 90MB, 1.5GiB or 90000000.")
    return int(float(match.group(1)) * unit)


def _share(text: str) -> float:
    """A fraction, or a percentage with its sign."""
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise ConfigError(f"The increase {text!r} is not a number, as 5% or 0.05.") from None


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(
            f"The batch buckets {text!r} are not whole numbers with commas between, as 1,2,4,8."
        ) from None
