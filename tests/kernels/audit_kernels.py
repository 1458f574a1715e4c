"""A small matmul that the audit's tests compile; not shipped."""

from __future__ import annotations

import triton
import triton.language as tl

from samv2_kernels.gpu.spec import KernelSpec

BLOCK_N, BLOCK_K = 64, 64


@triton.jit
def matmul_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, K) bfloat16 rows times a block of (N, K) weights, stored as bfloat16."""
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row[:, None] * K + start + k[None, :])
        weight = tl.load(weight_ptr + column[None, :] * K + start + k[:, None])
        total = tl.dot(x, weight, total)
    out = out_ptr + row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out, total.to(tl.bfloat16))


@triton.jit
def broken_kernel(x_ptr):
    """Does not compile: blocks of 2 and of 4 do not broadcast."""
    tl.store(x_ptr + tl.arange(0, 2), tl.arange(0, 4))


def matmul_spec(rows: int = 16, divisible: tuple[str, ...] = ("K",)) -> KernelSpec:
    """bfloat16 weights; without ``divisible`` K, loads cannot be 16 bytes wide."""
    return KernelSpec(
        kernel="matmul",
        config=f"{rows}x64x64 w4 s3" if divisible else "unaligned",
        function=matmul_kernel,
        # Not in the order of the arguments, which must not matter.
        signature={
            "K": "i32",
            "out_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "x_ptr": "*bf16",
        },
        constexprs=dict(BLOCK_M=rows, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K),
        divisible=divisible,
        rows_per_tile=rows,
        weights="bf16",
        direction="forward",
        weights_per_step=BLOCK_N * BLOCK_K,
    )


def specs(arch: str) -> list[KernelSpec]:
    """One that keeps the budgets; its 64 rows become wgmma on sm_90."""
    return [matmul_spec(rows=64)]


def bad_specs(arch: str) -> list[KernelSpec]:
    """One that loads narrowly, one that does not compile."""
    broken = KernelSpec(
        kernel="broken",
        config="w4",
        function=broken_kernel,
        signature={"x_ptr": "*i32"},
        constexprs={},
        rows_per_tile=1,
        weights="none",
        direction="route",
    )
    return [matmul_spec(divisible=()), broken]
