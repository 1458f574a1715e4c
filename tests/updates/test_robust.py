"""Robust rules: between honest values, never filled with zeros, in bounded memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2.common.settings import AggregationSettings
from samv2.updates import robust
from samv2.updates.aggregate import aggregate
from samv2.updates.robust import clipped_mean, coordinate_median, trimmed_mean
from tests.updates.test_aggregate import MANIFEST, SIZES, contribution

MEDIAN = AggregationSettings(rule="median", quorum=3)
TRIMMED = AggregationSettings(rule="trimmed_mean", quorum=3, trim=0.2)


def stack(rows: list[list[float]]) -> np.ndarray:
    """Rows as a float32 array."""
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize(
    "trim, expected",
    [(0.0, (1 + 2 + 3 + 100) / 4), (0.1, 2.5), (0.25, 2.5), (0.3, 2.5)],
)
def test_trimmed_mean_cuts_both_ends_rounded_up(trim: float, expected: float) -> None:
    values = stack([[100.0], [2.0], [1.0], [3.0]])
    assert trimmed_mean(values, trim)[0] == expected


def test_a_share_of_ten_clients_is_that_many() -> None:
    values = stack([[float(value)] for value in (0, 0, 1, 1, 1, 1, 1, 1, 9, 9)])
    assert trimmed_mean(values, 0.2)[0] == 1.0
    assert trimmed_mean(values, 0.1)[0] == np.float32((0 + 6 + 9) / 8)


def test_median_of_odd_and_even() -> None:
    assert coordinate_median(stack([[3, -1], [1, 5], [2, 0]])).tolist() == [2, 0]
    assert coordinate_median(stack([[3], [1], [8], [2]])).tolist() == [2.5]
    assert coordinate_median(stack([[7]])).tolist() == [7]


@given(
    rows=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=2),
        min_size=1,
        max_size=9,
    ),
    trim=st.floats(0, 0.49),
)
def test_the_centre_lies_among_the_values_that_are_left(
    rows: list[list[float]], trim: float
) -> None:
    values = stack(rows)
    ranked = np.sort(values, axis=0)
    cut = min(int(np.ceil(trim * len(rows) - 1e-9)), (len(rows) - 1) // 2)
    for found, kept in (
        (trimmed_mean(values, trim), ranked[cut : len(rows) - cut]),
        (coordinate_median(values), np.median(values, axis=0, keepdims=True)),
    ):
        assert np.all(found >= kept.min(axis=0)) and np.all(found <= kept.max(axis=0))


def test_below_the_quorum_the_largest_norm_is_the_median() -> None:
    found = clipped_mean(stack([[3, 4], [0, 500]]))
    assert found.tolist() == pytest.approx([3 / 2, (4 + 5) / 2])
    assert clipped_mean(stack([[30, 40]])).tolist() == [30, 40]


def test_zeros_below_the_quorum_do_not_hold_others_back() -> None:
    assert clipped_mean(stack([[0, 0], [3, 4]])).tolist() == [1.5, 2]
    assert clipped_mean(stack([[0, 0], [0, 0]])).tolist() == [0, 0]


def test_below_the_quorum_a_claim_of_many_examples_buys_nothing() -> None:
    honest, _ = contribution(0, [0])
    modest, update = contribution(1, [0])
    liar = replace(modest, weight=1e6)
    equal = aggregate([honest, modest], MANIFEST, round=3, rules=MEDIAN)
    found = aggregate([honest, liar], MANIFEST, round=3, rules=MEDIAN)
    assert torch.equal(found.mean[0], equal.mean[0])
    assert not torch.allclose(found.mean[0], update[0], atol=0.1)


def plain(
    updates: list[dict[int, Tensor]], key: int, rules: AggregationSettings
) -> Tensor | None:
    """The centre by torch, of the clients that sent a block; None below the quorum."""
    rows = torch.stack([update[key] for update in updates if key in update]).double()
    if len(rows) < rules.quorum:
        return None
    if rules.rule == "median":
        return rows.quantile(0.5, dim=0)
    cut = min(-int(-rules.trim * len(rows) // 1), (len(rows) - 1) // 2)
    return rows.sort(dim=0).values[cut : len(rows) - cut].mean(dim=0)


@pytest.mark.parametrize("stack_bytes", [1, 200, 2**20])
@pytest.mark.parametrize("rules", [MEDIAN, TRIMMED], ids=lambda item: item.rule)
def test_rules_run_over_those_who_sent_an_expert(
    monkeypatch: pytest.MonkeyPatch, rules: AggregationSettings, stack_bytes: int
) -> None:
    monkeypatch.setattr(robust, "STACK_BYTES", stack_bytes)
    sent = [[0, 1, 2], [1, 9], [0, 1], [1, 2], [0, 1, 9]]
    made = [contribution(c, own, 10.0**c) for c, own in enumerate(sent)]
    found = aggregate([item for item, _ in made], MANIFEST, round=3, rules=rules)
    assert sorted(found.mean) == sorted(SIZES)
    for key in (0, 1):
        expected = plain([update for _, update in made], key, rules)
        assert expected is not None
        assert torch.allclose(found.mean[key].double(), expected, rtol=1e-6, atol=0)
    for key in (2, 9):
        assert plain([update for _, update in made], key, rules) is None
        below = clipped_mean(np.stack([u[key].numpy() for _, u in made if key in u]))
        assert torch.equal(found.mean[key], torch.from_numpy(below))


@pytest.mark.parametrize("rules", [MEDIAN, TRIMMED], ids=lambda item: item.rule)
def test_honest_sparse_updates_survive(rules: AggregationSettings) -> None:
    """Two clients train block 2, one block 1, two another: all three learn."""
    made = [contribution(c, own) for c, own in enumerate([[2], [2], [1], [0], [0]])]
    found = aggregate([item for item, _ in made], MANIFEST, round=3, rules=rules)
    assert torch.equal(found.mean[1], made[2][1][1])
    for key, clients in ((2, (0, 1)), (0, (3, 4))):
        assert found.contributors[key] == clients
        assert 0 < float(found.mean[key].norm())
        least = min(float(made[c][1][key].norm()) for c in clients)
        assert float(found.mean[key].norm()) <= least * (1 + 1e-6)


def test_all_scales_by_the_share_of_clients() -> None:
    made = [contribution(c, [0] if c < 3 else [1]) for c in range(4)]
    items = [item for item, _ in made]
    own = aggregate(items, MANIFEST, round=3, rules=MEDIAN)
    everyone = aggregate(items, MANIFEST, round=3, normalise="all", rules=MEDIAN)
    assert torch.equal(everyone.mean[0], own.mean[0] * 0.75)
    assert torch.equal(everyone.mean[1], own.mean[1] * 0.25)


def test_whole_updates_are_clipped_before_the_rule() -> None:
    made = [contribution(c, [0, 2], scale=10.0 ** (c - 1)) for c in range(3)]
    rules = replace(MEDIAN, clip_to_median=1.0)
    found = aggregate([item for item, _ in made], MANIFEST, round=3, rules=rules)
    norms = [float(torch.cat([u[0], u[2]]).norm()) for _, u in made]
    limit = sorted(norms)[1]
    for key in (0, 2):
        scaled = [u[key] * min(1.0, limit / n) for (_, u), n in zip(made, norms)]
        expected = torch.stack(scaled).median(dim=0).values
        assert torch.allclose(found.mean[key], expected, rtol=1e-5, atol=1e-7)
