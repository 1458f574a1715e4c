"""Gram matrices by blocks and leading eigenvectors, against the dense operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from samv2.experts import linear_algebra
from samv2.experts.linear_algebra import BLOCK, add_gram, leading_eigenvectors
from tests.helpers import assert_close, randn


@pytest.mark.parametrize("width", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_a_gram_matrix_is_added_whole(width: int) -> None:
    rows_NM = randn(9, width, seed=0, dtype=torch.double)
    start_MM = randn(width, width, seed=1, dtype=torch.double)
    found_MM, kept_NM = start_MM.clone(), rows_NM.clone()
    add_gram(found_MM, rows_NM)
    assert_close("gram", found_MM, start_MM + rows_NM.T @ rows_NM, "fp64")
    assert torch.equal(rows_NM, kept_NM)


def test_grams_of_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_algebra, "BLOCK", 4)
    rows_NM = randn(20, 11, seed=0, dtype=torch.double)
    found_MM = torch.zeros(11, 11, dtype=torch.double)
    for part in (rows_NM[:7], rows_NM[7:7], rows_NM[7:]):
        add_gram(found_MM, part)
    assert_close("gram", found_MM, rows_NM.T @ rows_NM, "fp64")
    assert torch.equal(found_MM.tril(-9), found_MM.triu(9).T)


def decaying(size: int) -> Tensor:
    """A positive matrix whose eigenvalues fall by a tenth each."""
    basis = torch.linalg.qr(randn(size, size, seed=3, dtype=torch.double))[0]
    return basis @ torch.diag(0.9 ** torch.arange(size)).double() @ basis.T


@pytest.mark.parametrize("whole_below", [0, 1000])
@pytest.mark.parametrize("count", [1, 8, 60])
def test_leading_eigenvectors_are_those_of_the_whole_matrix(
    count: int, whole_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by subspace iteration, where the matrix is large and the count small."""
    monkeypatch.setattr(linear_algebra, "WHOLE_BELOW", whole_below)
    matrix_MM = decaying(120)
    torch.manual_seed(1)
    values, vectors = leading_eigenvectors(matrix_MM, count)
    expected = torch.linalg.eigvalsh(matrix_MM)[-count:]
    assert_close("values", values, expected, "fp32")
    assert values.tolist() == sorted(values.tolist())
    assert vectors.dtype == torch.float32 and vectors.shape == (120, count)
    assert_close("orthonormal", vectors.T @ vectors, torch.eye(count), "fp32")
    assert_close(
        "eigenvectors", matrix_MM.float() @ vectors, vectors * values, "logits"
    )
    torch.manual_seed(2)
    again = leading_eigenvectors(matrix_MM, count)
    assert torch.equal(again[1], vectors), "no global generator is read"


def test_every_eigenvector_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_algebra, "WHOLE_BELOW", 0)
    matrix_MM = decaying(9)
    values, vectors = leading_eigenvectors(matrix_MM, 9)
    assert_close("matrix", vectors * values @ vectors.T, matrix_MM, "fp32")
