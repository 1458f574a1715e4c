"""Splits: disjoint, complete, as non-IID as promised; distances with known values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from samv2.common.errors import DataError
from samv2.data.allocation import (
    Indices,
    heterogeneity,
    split_by_domain,
    split_dirichlet,
    split_shards,
)

LABELS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**32 - 1)


def check(clients: list[Indices], num_items: int, num_clients: int) -> None:
    assert len(clients) == num_clients
    assert all(len(items) and items.dtype == np.int64 for items in clients)
    assert sorted(np.concatenate(clients).tolist()) == list(range(num_items))


@given(labels=LABELS, num_clients=st.integers(1, 12))
def test_domain_split_is_disjoint_complete_and_pure(
    labels: list[str], num_clients: int
) -> None:
    kinds = list(dict.fromkeys(labels))
    owners = {k: len(range(i, num_clients, len(kinds))) for i, k in enumerate(kinds)}
    assume(all(labels.count(kind) >= count for kind, count in owners.items()))
    clients = split_by_domain(labels, num_clients)
    check(clients, len(labels), num_clients)
    if num_clients >= len(kinds):
        assert all(len({labels[i] for i in items}) == 1 for items in clients)


@given(labels=LABELS, num_clients=st.integers(1, 8), per=st.integers(1, 3), seed=SEEDS)
def test_shard_split_is_disjoint_complete_and_reproducible(
    labels: list[str], num_clients: int, per: int, seed: int
) -> None:
    assume(len(labels) >= num_clients * per)
    clients = split_shards(labels, num_clients, per, seed=seed)
    check(clients, len(labels), num_clients)
    again = split_shards(labels, num_clients, per, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(clients, again))
    sizes = [len(items) for items in clients]
    assert max(sizes) - min(sizes) <= per


@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=30, max_size=80),
    num_clients=st.integers(1, 4),
    alpha=st.sampled_from([0.3, 1.0, 100.0]),
    seed=SEEDS,
)
def test_dirichlet_split_is_disjoint_complete_and_reproducible(
    labels: list[str], num_clients: int, alpha: float, seed: int
) -> None:
    clients = split_dirichlet(labels, num_clients, alpha, min_items=2, seed=seed)
    check(clients, len(labels), num_clients)
    assert min(map(len, clients)) >= 2
    again = split_dirichlet(labels, num_clients, alpha, min_items=2, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(clients, again))


def test_domains_go_round_when_clients_are_more() -> None:
    clients = split_by_domain(list("aabbaabb"), 4)
    assert [items.tolist() for items in clients] == [[0, 4], [2, 6], [1, 5], [3, 7]]


def test_clients_go_round_when_domains_are_more() -> None:
    clients = split_by_domain(list("abcab"), 2)
    assert [items.tolist() for items in clients] == [[0, 2, 3], [1, 4]]


def test_shards_are_contiguous_in_the_sorted_items() -> None:
    labels = list("ab" * 8)
    clients = split_shards(labels, 4, 2, seed=0)
    in_order = [*range(0, 16, 2), *range(1, 16, 2)]
    shards = [set(in_order[i : i + 2]) for i in range(0, 16, 2)]
    for items in clients:
        assert sum(shard <= set(items.tolist()) for shard in shards) == 2
    orders = {tuple(split_shards(labels, 4, seed=s)[0].tolist()) for s in range(9)}
    assert len(orders) > 1


def counts_of(labels: list[str], clients: list[Indices]) -> list[list[int]]:
    kinds = sorted(set(labels))
    return [[sum(labels[i] == k for i in c) for k in kinds] for c in clients]


def test_a_smaller_alpha_makes_clients_more_unlike() -> None:
    labels = list("abcdefgh" * 100)
    distances = [
        heterogeneity(counts_of(labels, split_dirichlet(labels, 6, alpha, seed=1)))
        for alpha in (0.05, 0.5, 5.0, 500.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.7 and distances[-1] < 0.1


def test_a_client_with_its_share_gets_no_later_category() -> None:
    labels = list("a" * 100 + "b" * 100)
    for seed in range(30):
        counts = counts_of(labels, split_dirichlet(labels, 4, 0.5, seed=seed))
        assert all(b == 0 for a, b in counts if a >= 50)


def test_a_tiny_alpha_still_divides_everything() -> None:
    labels = list("abcdefgh" * 10)
    check(split_dirichlet(labels, 3, 1e-4, seed=0), 80, 3)


def test_a_draw_that_never_suffices_stops_with_the_remedy() -> None:
    with pytest.raises(DataError, match="1000 Dirichlet draws.*raise alpha"):
        split_dirichlet(["a"] * 40, 4, 0.01, min_items=10, seed=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(DataError, match="alpha is"):
        split_dirichlet(["a"] * 9, 2, alpha, seed=0)


@pytest.mark.parametrize("min_items", [0, 6])
def test_min_items_must_be_possible(min_items: int) -> None:
    with pytest.raises(DataError, match=f"min_items is {min_items}.* 1 to 5"):
        split_dirichlet(["a"] * 10, 2, min_items=min_items, seed=0)


def test_impossible_divisions_are_errors() -> None:
    with pytest.raises(DataError, match="2 items .* 3 clients"):
        split_by_domain(["a", "b"], 3)
    with pytest.raises(DataError, match="number of clients is 0"):
        split_by_domain(["a"], 0)
    with pytest.raises(DataError, match="Client 2 would get no items: use fewer"):
        split_by_domain(["a", "b", "b"], 3)
    with pytest.raises(DataError, match="5 items cannot be cut into 6 shards"):
        split_shards(["a"] * 5, 3, seed=0)
    with pytest.raises(DataError, match="shards_per_client is 0"):
        split_shards(["a"] * 5, 3, 0, seed=0)


def test_heterogeneity_of_known_tables() -> None:
    assert heterogeneity([[3, 0], [0, 9]]) == 1.0
    assert heterogeneity([[1, 2, 3], [10, 20, 30]]) == 0.0
    assert heterogeneity([[5, 5]]) == 0.0
    # JSD = (log2(4/3) + log2(2/3) / 2 + 1 / 2) / 2 bits.
    assert heterogeneity([[1, 0], [1, 1]]) == pytest.approx(math.sqrt(0.3112781245))


@given(st.integers(2, 5), st.integers(1, 6), st.randoms(use_true_random=False))
def test_heterogeneity_is_scipys_mean_over_pairs(
    clients: int, kinds: int, random: object
) -> None:
    table = np.array(
        [
            [random.randint(0, 9) + (k == 0) for k in range(kinds)]
            for _ in range(clients)
        ]
    )
    with np.errstate(invalid="ignore"):  # scipy may take the root of -1e-17
        pairs = [
            np.nan_to_num(jensenshannon(p, q, base=2))
            for p, q in itertools.combinations(table, 2)
        ]
    assert heterogeneity(table) == pytest.approx(np.mean(pairs), abs=1e-7)


def test_tables_without_a_distribution_are_errors() -> None:
    with pytest.raises(DataError, match="Client 1 has no counts"):
        heterogeneity([[1, 2], [0, 0]])
    with pytest.raises(DataError, match="non-negative"):
        heterogeneity([[1, -2]])
    with pytest.raises(DataError, match=r"shape \(2,\)"):
        heterogeneity([1, 2])
