"""Expert layers on a GPU against its own measured ceilings.

    python bench/roofline_gpu.py [--save FOLDER]

Per shape and token count: milliseconds of ``samv2_kernels.grouped_experts`` in bfloat16
and NF4, forward and forward + backward, beside the least that the same work could take:
the larger one of its bytes at the copy bandwidth and its multiply-adds at the matmul rate,
both measured first in the same run. Bytes are the touched experts' weights (once a pass),
inputs, outputs and saved activations; arithmetic is that of the visited experts alone. Outputs
are compared with the plain-torch reference before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from triton import testing

from samv2_kernels import reference
from samv2_kernels.gpu.bench_cases import (
    FORMS,
    SHAPES,
    TOKENS,
    Batch,
    Layer,
    Shape,
    batch,
    forward,
    layer,
    train_step,
)

COPY_BYTES = 1 << 29
MATMUL_SIZE = 8192
NF4_BYTES = 0.5 + 4 / 64
LARGEST_ERROR = 3e-2
"""Share of the largest output: bfloat16 keeps 8 bits, outputs see three roundings."""
NO_GPU = "There is no CUDA GPU here; this script times GPUs only."

MODES = [f"{w} {p}" for w in FORMS for p in ("forward", "forward+backward")]
ROOF = " roofline"


@cache
def copy_bytes_per_ms() -> float:
    """Bytes read and written a millisecond by a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_ms(lambda: target.copy_(source))


@cache
def multiply_adds_per_ms() -> float:
    """bfloat16 multiply-adds a millisecond of a large matmul."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16)
    return MATMUL_SIZE**3 / median_ms(lambda: a @ a)


def median_ms(run: Callable[[], object]) -> float:
    """Milliseconds of a call; L2 is flushed before each."""
    return testing.do_bench(run, warmup=50, rep=200, return_mode="median")


@torch.no_grad()
def check(found: Layer, given: Batch) -> None:
    """Compare an output with the plain-torch reference.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    y_TD = forward(found, given).float()
    expected_TD = reference.grouped_experts(
        given.x_TD, given.walked, given.combine_TE, found.plain, adapters=found.adapters
    ).float()
    error = float((y_TD - expected_TD).abs().max() / expected_TD.abs().max())
    assert error <= LARGEST_ERROR, f"error {error:.3g} exceeds {LARGEST_ERROR}"


def roofline_ms(shape: Shape, given: Batch, form: str, backward: bool) -> float:
    """The least that the bytes and the arithmetic take at the measured ceilings."""
    tokens = len(given.x_TD)
    visits = tokens * shape.experts_per_token
    expert_weights = 3 * shape.expert_rows * shape.model_width
    weight_bytes = NF4_BYTES if form == "nf4" else 2
    moved = given.experts_touched * expert_weights * weight_bytes
    moved += 2 * tokens * shape.model_width * 2
    multiply_adds = visits * expert_weights
    if backward:
        saved = 2 * visits * shape.expert_rows * 2
        moved, multiply_adds = 2 * (moved + saved), 2 * multiply_adds
    return max(moved / copy_bytes_per_ms(), multiply_adds / multiply_adds_per_ms())


def milliseconds(tokens: int, mode: str, shape: str) -> float:
    """One figure of the table: a measured time or its roofline."""
    form, _, passes = mode.removesuffix(ROOF).partition(" ")
    backward = passes == "forward+backward"
    size = SHAPES[shape]
    given = batch(size, tokens)
    if mode.endswith(ROOF):
        return roofline_ms(size, given, form, backward)
    found = layer(size, form)
    check(found, given)
    if not backward:
        with torch.no_grad():
            return median_ms(lambda: forward(found, given))
    given.x_TD.requires_grad_()
    grad_TD = torch.randn_like(given.x_TD)
    return median_ms(lambda: train_step(found, given, grad_TD))


def reports() -> list[testing.Benchmark]:
    """One table a shape; every measured column is followed by its roofline."""
    columns = [column for mode in MODES for column in (mode, mode + ROOF)]
    return [
        testing.Benchmark(
            x_names=["tokens"],
            x_vals=list(TOKENS),
            line_arg="mode",
            line_vals=columns,
            line_names=columns,
            plot_name=f"experts-{shape.name}",
            ylabel="ms",
            x_log=True,
            y_log=True,
            args={"shape": shape.name},
        )
        for shape in SHAPES.values()
    ]


def main() -> int:
    """Run every report; returns the exit status, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, help="folder for plots and CSV files")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name())
    print(f"copy: {copy_bytes_per_ms() / 1e6:.0f} GB/s (read + write)")
    print(f"bf16 matmul: {2 * multiply_adds_per_ms() / 1e9:.1f} TFLOP/s")
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
    testing.perf_report(reports())(milliseconds).run(
        print_data=True, save_path=str(arguments.save) if arguments.save else ""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
