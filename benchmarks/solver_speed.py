# SPDX-License-Identifier: Apache-2.0
"""The solver against the plain column loop of the paper on the same matrices: time and objective.

The plain loop is algorithm 1 of arXiv 2210.17323 in straightforward torch, one column after the other: Cholesky factor
of the inverse Hessian, blocks of 128 columns, a min-max grid per group fitted when the loop arrives at it::

    python benchmarks/solver_speed.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.solver import solve

DAMP, BLOCK, BITS, GROUP = 0.01, 128, 4, 128


@torch.no_grad()
def plain_loop(weight: Tensor, hessian: Tensor, bits: int = BITS, group_size: int = GROUP) -> Tensor:
    """Dequantized weight [N, K] by the paper's algorithm 1, column by column; asymmetric min-max grids."""
    w, h = weight.float().clone(), hessian.clone()
    rows, columns = w.shape
    diagonal = torch.arange(columns, device=w.device)
    h[diagonal, diagonal] += DAMP * h.diagonal().mean()
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    upper = torch.linalg.cholesky(h, upper=True)
    result = torch.zeros_like(w)
    top = 2**bits - 1
    scale, zero = torch.zeros(rows, device=w.device), torch.zeros(rows, device=w.device)
    for i in range(0, columns, BLOCK):
        j = min(i + BLOCK, columns)
        block, errors, corner = w[:, i:j].clone(), torch.zeros(rows, j - i, device=w.device), upper[i:j, i:j]
        for c in range(j - i):
            column, pivot = block[:, c], corner[c, c]
            if (i + c) % group_size == 0:
                group = w[:, i + c : i + c + group_size]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = ((high - low) / top).clamp(min=1e-12)
                zero = torch.round(-low / scale)
            q = scale * (torch.clamp(torch.round(column / scale) + zero, 0, top) - zero)
            result[:, i + c] = q
            error = (column - q) / pivot
            block[:, c:] -= error.unsqueeze(1) @ corner[c, c:].unsqueeze(0)
            errors[:, c] = error
        w[:, j:] -= errors @ upper[i:j, j:]
    return result


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) in float64, a few rows at a time."""
    h = hessian.double()
    parts = [
        ((e := (a - b).double()) @ h * e).sum() for a, b in zip(weight.split(512), quantized.split(512), strict=True)
    ]
    return float(torch.stack(parts).sum())


def timed(run: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[float, Tensor]:
    """Median seconds, and the last result."""
    seconds, out = [], run()  # the first call compiles and fills caches
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2], out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--plain-repeats", type=int, default=1)
    parser.add_argument("--skip-plain", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    # The loop's own settings: natural order, a min-max grid fitted when a group is reached.
    config = QuantizeConfig(wbits=BITS, group_size=GROUP, act_order=False, static_groups=False, mse=False, damp=DAMP)
    defaults = QuantizeConfig(wbits=BITS, group_size=GROUP)
    for rows, columns in args.shape or [(4096, 4096), (14336, 4096), (4096, 14336)]:
        generator = torch.Generator(device).manual_seed(rows + columns)
        weight = torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5
        mix = torch.randn(columns, columns, generator=generator, device=device) * columns**-0.5
        hessian = Hessian(columns, device=device)
        for _ in range(4):
            x = torch.randn(8192, columns, generator=generator, device=device) @ mix
            hessian.add(x + 0.3 * torch.randn(8192, columns, generator=generator, device=device))
        h = hessian.matrix()
        del mix, hessian
        ours, solution = timed(lambda: solve(weight, h, config).weight, device, 3)  # noqa: B023
        line = {"rows": rows, "columns": columns, "fused_seconds": round(ours, 4)}
        default, _ = timed(lambda: solve(weight, h, defaults).weight, device, 3)  # noqa: B023
        line["fused_seconds_default_settings"] = round(default, 4)
        if not args.skip_plain:
            plain, reference = timed(lambda: plain_loop(weight, h), device, args.plain_repeats)  # noqa: B023
            a, b = objective(weight, solution, h), objective(weight, reference, h)
            line |= {"plain_seconds": round(plain, 3), "speedup": round(plain / ours, 1)}
            line |= {"objective": a, "plain_objective": b, "relative_difference": abs(a - b) / b}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
