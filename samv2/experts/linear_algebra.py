"""Dense linear algebra on large symmetric matrices, for clustering and calibration.

Shapes: N rows, M columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samv2.common.threads import one_thread

BLOCK = 512
"""Columns that are multiplied at once where a product is symmetric."""
WHOLE_BELOW = 640
"""Up to this size all eigenvectors are computed."""
SPARE, POWERS = 16, 6


def add_gram(gram_MM: Tensor, rows_NM: Tensor) -> None:
    """Add rows' rows to a Gram matrix in place; what lies below the diagonal is copied.

    Args:
        gram_MM: (M, M) float32.
        rows_NM: (N, M) in any dtype; products are made in it.
    """
    width = rows_NM.shape[1]
    for begin in range(0, width, BLOCK):
        block = slice(begin, begin + BLOCK)
        product = rows_NM[:, block].T @ rows_NM[:, begin:]
        gram_MM[block, begin:] += product
        past = product.shape[0]
        gram_MM[begin + past :, block] += product[:, past:].T


def leading_eigenvectors(matrix_MM: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues of a symmetric positive matrix, rising.

    Large matrices are reduced by subspace iteration first (Halko, Martinsson & Tropp
    2011, algorithm 4.4), from a fixed start.

    Returns:
        (count,) and (M, count) float32, orthonormal columns.
    """
    matrix_MM = matrix_MM.float()
    size = len(matrix_MM)
    with one_thread():
        if size <= max(WHOLE_BELOW, count + SPARE):
            values, vectors = torch.linalg.eigh(matrix_MM)
            return values[-count:], vectors[:, -count:]
        source = torch.Generator().manual_seed(0)
        start = torch.randn(size, count + SPARE, generator=source)
        basis = torch.linalg.qr(start.to(matrix_MM.device))[0]
        for _ in range(POWERS):
            basis = torch.linalg.qr(matrix_MM @ basis)[0]
        values, vectors = torch.linalg.eigh(basis.T @ (matrix_MM @ basis))
    return values[-count:], (basis @ vectors)[:, -count:]
