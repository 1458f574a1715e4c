"""NF4 codes to 16-bit floats in registers: a byte-permute decode, and a portable twin.

A 16-bit word holds four codes, one for each quarter ("plane") of a block of 64 weights
(:mod:`samv2_kernels.nf4_layout`), so that the j-th codes of neighbouring words are
neighbouring weights and no shuffle is needed. PTX's ``prmt`` looks up four bytes of a
table of eight at once: the codebook is kept as two planes of bytes (low, high) in two
tables of eight each; the fourth bit of a code chooses between the tables.

Where a reduction runs along the model width, magnitudes are constant over a block, the
products are scaled afterwards, and activations are bfloat16: the decode gives
``bf16(LIFT * level)``. LIFT = 1.4367 is where rounding the codebook to bfloat16 loses
least: 0.8e-3 of its root mean square instead of 1.4e-3 at a factor of one
(:func:`codebook_error`); kernels divide by it once, in float32, at the end. Where the
reduction runs along an expert's rows, the decode gives ``fp16(level)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from samv2_kernels.nf4 import LEVELS

LIFT = 1.4367


def lifted_levels() -> torch.Tensor:
    """(16,) bfloat16, what the bfloat16 decodes return for code 0..15."""
    return (LIFT * torch.tensor(LEVELS, dtype=torch.float64)).float().bfloat16()


def half_levels() -> torch.Tensor:
    """(16,) float16, what the float16 decodes return for code 0..15."""
    return torch.tensor(LEVELS).half()


def codebook_error(lift: float, shares: torch.Tensor) -> float:
    """Root mean square error of ``bf16(lift * level) / lift``, relative to the levels'.

    Args:
        lift: the factor.
        shares: (16,) float64, how often each code occurs; sums to 1.
    """
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    rounded = (lift * levels).float().bfloat16().double() / lift
    error, size = (rounded - levels).square() @ shares, levels.square() @ shares
    return float((error / size).sqrt())


def _byte_table(levels: torch.Tensor, plane: int, quarter: int) -> str:
    """Four bytes of a codebook as one word: codes 4q..4q+3, low or high byte."""
    bits = [int(b) & 0xFFFF for b in levels.view(torch.int16)]
    four = bits[4 * quarter : 4 * quarter + 4]
    word = sum(((b >> 8 * plane) & 0xFF) << 8 * i for i, b in enumerate(four))
    return f"0x{word:08X}"


def _decode_ptx(levels: torch.Tensor) -> str:
    """PTX for two words (one register) to four pairs of 16-bit floats.

    ``prmt`` selectors use three bits of each code; its fourth bit, spread over a byte by
    the sign-replicating mode, blends the halves of the codebook.
    """
    lines = [
        ".reg .b32 sel, selh, left, mask, maskh, a, b;",
        ".reg .b32 lo, hi, loh, hih, p, q, r, s;",
        "and.b32 sel, $4, 0x77777777;",
        "shr.b32 selh, sel, 16;",
        "shl.b32 left, $4, 4;",
        "prmt.b32 mask, $4, left, 0x9D8C;",
        "prmt.b32 maskh, $4, left, 0xBFAE;",
    ]
    for half in ("", "h"):
        for plane, name in enumerate(("lo", "hi")):
            t = [_byte_table(levels, plane, quarter) for quarter in range(4)]
            lines += [
                f"prmt.b32 a, {t[0]}, {t[1]}, sel{half};",
                f"prmt.b32 b, {t[2]}, {t[3]}, sel{half};",
                f"lop3.b32 {name}{half}, mask{half}, b, a, 0xCA;",
            ]
    lines += [
        "prmt.b32 p, lo, hi, 0x5140;",
        "prmt.b32 q, lo, hi, 0x7362;",
        "prmt.b32 r, loh, hih, 0x5140;",
        "prmt.b32 s, loh, hih, 0x7362;",
        "prmt.b32 $0, p, r, 0x5410;",
        "prmt.b32 $1, p, r, 0x7632;",
        "prmt.b32 $2, q, s, 0x5410;",
        "prmt.b32 $3, q, s, 0x7632;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


INVERSE_LIFT = tl.constexpr(1 / LIFT)
_PTX_LIFTED = tl.constexpr(_decode_ptx(lifted_levels()))
_PTX_HALF = tl.constexpr(_decode_ptx(half_levels()))
_L = [tl.constexpr(float(level)) for level in lifted_levels()]
_H = [tl.constexpr(float(level)) for level in half_levels()]
L0, L1, L2, L3, L4, L5, L6, L7, L8, L9, L10, L11, L12, L13, L14, L15 = _L
H0, H1, H2, H3, H4, H5, H6, H7, H8, H9, H10, H11, H12, H13, H14, H15 = _H


@triton.jit
def decode_lifted(words):
    """int16 words to four bfloat16 tensors of their shape, by byte permutes."""
    return tl.inline_asm_elementwise(
        _PTX_LIFTED,
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def decode_half(words):
    """int16 words to four float16 tensors of their shape, by byte permutes."""
    return tl.inline_asm_elementwise(
        _PTX_HALF,
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _choose(code, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15):
    """One of 16 values, by a tree of selections."""
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    low = tl.where(
        b2,
        tl.where(b1, tl.where(b0, v7, v6), tl.where(b0, v5, v4)),
        tl.where(b1, tl.where(b0, v3, v2), tl.where(b0, v1, v0)),
    )
    high = tl.where(
        b2,
        tl.where(b1, tl.where(b0, v15, v14), tl.where(b0, v13, v12)),
        tl.where(b1, tl.where(b0, v11, v10), tl.where(b0, v9, v8)),
    )
    return tl.where((code & 8) != 0, high, low)


@triton.jit
def _lifted(code):
    return _choose(
        code, L0, L1, L2, L3, L4, L5, L6, L7, L8, L9, L10, L11, L12, L13, L14, L15
    ).to(tl.bfloat16)


@triton.jit
def _half(code):
    return _choose(
        code, H0, H1, H2, H3, H4, H5, H6, H7, H8, H9, H10, H11, H12, H13, H14, H15
    ).to(tl.float16)


@triton.jit
def decode_lifted_portable(words):
    """The bits of :func:`decode_lifted` without inline assembly, several times slower."""
    c = words.to(tl.int32)
    return (
        _lifted(c & 15),
        _lifted((c >> 4) & 15),
        _lifted((c >> 8) & 15),
        _lifted((c >> 12) & 15),
    )


@triton.jit
def decode_half_portable(words):
    """The bits of :func:`decode_half` without inline assembly, several times slower."""
    c = words.to(tl.int32)
    return (
        _half(c & 15),
        _half((c >> 4) & 15),
        _half((c >> 8) & 15),
        _half((c >> 12) & 15),
    )


@triton.jit
def block_scale(
    absmax_ptr,
    second_ptr,
    table_ptr,
    offset,
    place,
    mask,
    NESTED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """float32 magnitudes of blocks: stored so, or quantised once more.

    bitsandbytes' double quantisation (QLoRA, arXiv 2305.14314, section 3): a magnitude
    is ``table[code] * second + offset``, one ``second`` for 256 blocks.

    Args:
        absmax_ptr: of the expert's first block; float32, or uint8 where NESTED.
        second_ptr: of the expert's first second-level magnitude, float32.
        table_ptr: 256 float32.
        offset: float32 scalar.
        place: numbers of the blocks within the expert.
        mask: where MASKED, which of them exist; others give 0.
    """
    if MASKED:
        stored = tl.load(absmax_ptr + place, mask=mask, other=0)
    else:
        stored = tl.load(absmax_ptr + place)
    if NESTED:
        level = tl.load(table_ptr + stored.to(tl.int32))
        if MASKED:
            second = tl.load(second_ptr + (place >> 8), mask=mask, other=0.0)
            scale = tl.where(mask, level * second + offset, 0.0)
        else:
            scale = level * tl.load(second_ptr + (place >> 8)) + offset
    else:
        scale = stored
    return scale
