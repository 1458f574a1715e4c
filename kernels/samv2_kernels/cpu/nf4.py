"""NF4 on a CPU: one part of one expert unpacked at a time, by bitsandbytes where it pays.

Shapes: D model width, F rows an expert, n rows of inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from samv2_kernels.nf4 import BLOCK, Nf4Experts, dequantise

WORTH_AN_IMPORT = 2**18
"""Weights of a part from which on bitsandbytes' op repays the seconds of its import."""
_MARK = torch.tensor([-1.0, -0.5])
"""bitsandbytes' product tells NF4 by a second level below 0."""


def unpack(
    codes_H: Tensor, absmax_N: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """One expert by ``samv2_kernels.nf4.dequantise``, or faster and in the same bits.

    Args:
        codes_H: (ceil(F D / 2),) uint8.
        absmax_N: (ceil(F D / 64),) float32.
        shape: (F, D).
        dtype: float32 or bfloat16.
    """
    weights = prod(shape)
    if weights >= WORTH_AN_IMPORT and weights % 2 == 0 and bitsandbytes():
        flat = torch.ops.bitsandbytes.dequantize_4bit(
            codes_H, absmax_N, BLOCK, "nf4", (weights,), dtype
        )
        return flat.view(shape)
    packed = Nf4Experts(
        codes_EH=codes_H.unsqueeze(0),
        absmax_EN=absmax_N.unsqueeze(0),
        shape=(1, *shape),
    )
    return dequantise(packed, dtype)[0]


def project(x_nD: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """(n, 2 F): rows of one expert's gate and up projections side by side.

    Args:
        x_nD: (n, D) bfloat16.
        codes: (2 F, D / 2) uint8 in decoding order; see :mod:`samv2_kernels.decoding`.
        absmax: (D / 64, 2 F) bfloat16.
    """
    shape = (codes.shape[0], x_nD.shape[1])
    return torch.ops.bitsandbytes.gemv_4bit(x_nD, codes, shape, absmax, _MARK, BLOCK)


@cache
def bitsandbytes() -> ModuleType | None:
    """Its functions, or None where it is missing; importing it takes seconds."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    # It warns of an optional package whose fused product is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes.functional")
