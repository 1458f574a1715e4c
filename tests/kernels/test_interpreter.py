"""The repaired interpreter computes what a GPU would in bfloat16, and runs PTX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.helpers import randn
from tests.kernels.interpreter import exact, lop3, narrow, prmt, run_ptx, widen


def every_bfloat16() -> torch.Tensor:
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16)


def test_rounding_is_torchs_for_every_pattern_and_between_them() -> None:
    values = every_bfloat16().float()
    step = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    near = (values.view(torch.int32).unsqueeze(1) + step).view(torch.float32).flatten()
    near = near[~near.isnan()]
    found = torch.from_numpy(narrow(near.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found, near.bfloat16())
    assert np.isnan(widen(narrow(np.array([np.nan], np.float32)))).all()


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    a = tl.load(a_ptr + place)
    b = tl.load(b_ptr + place)
    tl.store(out_ptr + place, a + b)
    tl.store(out_ptr + COUNT + place, a * b)
    tl.store(out_ptr + 2 * COUNT + place, tl.where(a < b, a, -b))
    tl.store(out_ptr + 3 * COUNT + place, a.to(tl.float32) * 1.003)


def test_bfloat16_arithmetic_rounds_once() -> None:
    a, b = (randn(1024, seed=seed).bfloat16() for seed in (0, 1))
    found = torch.full((4, 1024), torch.nan, dtype=torch.bfloat16)
    with exact():
        _arithmetic_kernel[(1,)](a, b, found, COUNT=1024)
    expected = (a + b, a * b, torch.where(a < b, a, -b), (a.float() * 1.003).bfloat16())
    for got, want in zip(found, expected):
        assert torch.equal(got, want)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    place = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    product = tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place))
    tl.store(out_ptr + place, product)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_summed_in_float32(dtype: torch.dtype) -> None:
    a, b = (randn(32, 32, seed=seed).to(dtype) for seed in (0, 1))
    found = torch.full((32, 32), torch.nan)
    with exact():
        _dot_kernel[(1,)](a, b, found, SIDE=32)
    expected = a.double() @ b.double()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_repair_ends_with_its_block() -> None:
    """Outside, the interpreter is the one that Triton ships: wrong for bfloat16."""
    a = randn(1024, seed=0).bfloat16()
    found = torch.full((4, 1024), torch.nan, dtype=torch.bfloat16)
    with exact():
        _arithmetic_kernel[(1,)](a, a, found, COUNT=1024)
    assert torch.equal(found[0], a + a)
    _arithmetic_kernel[(1,)](a, a, found, COUNT=1024)
    assert not torch.equal(found[0], a + a)


def test_byte_permutation_and_truth_tables() -> None:
    a, b = np.array([0x83020100], np.uint32), np.array([0x07060504], np.uint32)
    assert prmt(a, b, np.array([0x7531], np.uint32))[0] == 0x07058301
    assert prmt(a, b, np.array([0xBBB3], np.uint32))[0] == 0xFFFFFF83
    assert prmt(a, b, np.array([0x8888], np.uint32))[0] == 0
    x, y, z = (np.array([v], np.uint32) for v in (0b1100, 0b1010, 0b0110))
    assert lop3(x, y, z, np.array([0xCA], np.uint32))[0] == ((x & y) | (~x & z))
    assert lop3(x, y, z, np.array([0x96], np.uint32))[0] == (x ^ y ^ z)


def test_ptx_that_is_not_known_is_refused() -> None:
    one = {"$1": np.array([1], np.uint32)}
    assert run_ptx("{\n.reg .b32 a;\nshl.b32 a, $1, 4;\nor.b32 $0, a, 3;\n}", one)["$0"]
    with pytest.raises(KeyError, match="add.s32"):
        run_ptx("add.s32 $0, $1, 1;", one)
