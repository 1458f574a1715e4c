"""The gate that tells kinds of text apart: buckets, causality, fit and clusters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from samv2.experts.sibling_gate import (
    BUCKETS,
    NEVER,
    SiblingGate,
    bucket_of,
    count_tokens,
    fit_sibling_gate,
)
from tests.helpers import assert_close, generator

HALF = BUCKETS // 2


def text(kind: int, seed: int, length: int = 4000) -> Tensor:
    """Tokens of one of three kinds: overlapping ranges of ids."""
    return torch.randint(
        40 * kind, 40 * kind + 100, (length,), generator=generator(seed)
    )


def fitted(*texts: Tensor, siblings: int) -> tuple[SiblingGate, list[int]]:
    """A gate for texts, and their siblings."""
    counts = torch.stack([count_tokens(tokens) for tokens in texts])
    flat, members = fit_sibling_gate(counts, siblings)
    gate = SiblingGate(siblings)
    sizes = [part.numel() for part in gate.parameters()]
    for part, values in zip(gate.parameters(), flat.split(sizes)):
        part.data.copy_(values.view_as(part))
    return gate, members


def test_frequent_tokens_have_buckets_of_their_own() -> None:
    assert torch.equal(bucket_of(torch.arange(HALF)), torch.arange(HALF))


def test_other_tokens_are_spread_over_the_upper_half() -> None:
    buckets = bucket_of(torch.arange(HALF, 200_000))
    assert int(buckets.min()) >= HALF and int(buckets.max()) < BUCKETS
    counts = torch.bincount(buckets)[HALF:]
    assert counts.max() < 2 * counts.double().mean()


def test_counts_are_of_buckets() -> None:
    counts = count_tokens(torch.tensor([3, 3, 5, 100_000]))
    assert counts[3] == 2 and counts[5] == 1 and counts.sum() == 4
    assert counts.dtype == torch.float32 and counts.shape == (BUCKETS,)


def test_an_unfitted_gate_counts_siblings_alike() -> None:
    share, _ = SiblingGate(3)(text(0, 0, 10).unsqueeze(0))
    assert torch.equal(share.softmax(2), torch.full((1, 10, 3), 1 / 3))


def test_shares_are_the_posterior_of_naive_bayes() -> None:
    gate, _ = fitted(text(0, 0), text(1, 1), siblings=2)
    tokens = text(1, 2, 6)
    share, _ = gate(tokens.unsqueeze(0))
    total = gate.prior_G.clone()
    for position, token in enumerate(tokens.tolist()):
        total = total + gate.ratio_NG[token]
        assert_close(f"token {position}", share[0, position], total, "fp32")


def test_no_later_token_is_looked_at() -> None:
    gate, _ = fitted(text(0, 0), text(2, 1), siblings=2)
    tokens = text(1, 3, 20).view(2, 10)
    changed = tokens.clone()
    changed[:, 6:] = 7
    assert torch.equal(gate(tokens)[0][:, :6], gate(changed)[0][:, :6])


def test_evidence_carries_over_a_cut() -> None:
    gate, _ = fitted(text(0, 0), text(2, 1), siblings=2)
    tokens = text(1, 3, 20).view(2, 10)
    whole, last = gate(tokens)
    first, evidence = gate(tokens[:, :4])
    second, end = gate(tokens[:, 4:], evidence)
    assert_close("shares", torch.cat([first, second], 1), whole, "fp32")
    assert_close("evidence", end, last, "fp32")


def test_each_text_gets_the_sibling_that_knows_it() -> None:
    gate, members = fitted(*(text(kind, kind) for kind in range(3)), siblings=3)
    assert members == [0, 1, 2]
    for kind in range(3):
        share, _ = gate(text(kind, 10 + kind, 64).unsqueeze(0))
        assert share.softmax(2)[0, -1, kind] > 0.9


def test_more_texts_than_siblings_share_by_kind() -> None:
    kinds = [0, 2, 1, 2, 0, 1, 1]
    texts = [text(kind, 20 + index) for index, kind in enumerate(kinds)]
    _, members = fitted(*texts, siblings=3)
    groups = {(kind, member) for kind, member in zip(kinds, members)}
    assert len(groups) == 3 == len(set(members))


def test_a_sibling_without_text_is_never_chosen() -> None:
    gate, members = fitted(text(0, 0), text(1, 1), siblings=4)
    assert members == [0, 1]
    assert gate.prior_G.tolist() == [0, 0, NEVER, NEVER]
    share, _ = gate(text(1, 5, 30).unsqueeze(0))
    assert float(share.softmax(2)[..., 2:].max()) == 0


def test_equal_texts_are_still_divided() -> None:
    same = text(0, 0)
    _, members = fitted(same, same, same, siblings=2)
    assert set(members) == {0, 1}


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_the_length_of_a_text_does_not_matter(scale: float) -> None:
    counts = torch.stack([count_tokens(text(0, 0)), count_tokens(text(1, 1))])
    flat, _ = fit_sibling_gate(counts, 2)
    scaled, _ = fit_sibling_gate(counts * torch.tensor([[scale], [1.0]]), 2)
    assert_close("gate", scaled, flat, "fp32")


def test_a_gate_is_not_trained() -> None:
    gate = SiblingGate(2)
    assert not any(part.requires_grad for part in gate.parameters())
