"""Balanced clustering of FFN rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.experts import emoe_cluster
from samv2.experts.emoe_cluster import (
    FEATURES,
    SOLVERS,
    balanced_clusters,
    check_divisible,
    choose_shared_rows,
    cluster_layer,
    coactivation_embedding,
    format_stats,
    inertia,
    row_features,
)
from tests.helpers import generator, randn

ROWS, WIDTH, TOKENS = 48, 10, 60


def layer(seed: int = 0) -> dict[str, Tensor]:
    """Weights and activations of one FFN with six loose groups of rows."""
    group = torch.arange(ROWS) % 6
    weights = (
        randn(3, ROWS, WIDTH, seed=seed) + randn(3, 6, WIDTH, seed=seed + 1)[:, group]
    )
    strength = (2 * randn(TOKENS, 6, seed=seed + 2)).exp()[:, group]
    return {
        "gate_MD": weights[0],
        "up_MD": weights[1],
        "down_DM": weights[2].T,
        "hidden_NM": strength * randn(TOKENS, ROWS, seed=seed + 3),
    }


def cluster(tensors: dict[str, Tensor] | None = None, **changes: object):
    values: dict[str, object] = dict(
        num_experts=6, num_shared=0, feature="coactivation", seed=0
    )
    return cluster_layer(4, **(tensors or layer()), **(values | changes))


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("feature", FEATURES)
def test_clusters_are_exactly_balanced_and_better_than_random(
    feature: str, num_shared: int
) -> None:
    order, stats = cluster(feature=feature, num_shared=num_shared)
    assert sorted(order.tolist()) == list(range(ROWS))
    assert stats.sizes == (8,) * (6 - num_shared)
    assert stats.layer == 4 and 0 < stats.inertia_ratio < 1
    again, _ = cluster(feature=feature, num_shared=num_shared)
    assert order.tolist() == again.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_planted_groups_are_found(solver: str) -> None:
    truth = torch.arange(40) % 4
    shuffled = truth[torch.randperm(40, generator=generator(0))]
    centres = 10 * randn(4, 6, seed=1)
    features_MF = centres[shuffled] + randn(40, 6, seed=2)
    labels = balanced_clusters(features_MF, 4, seed=0, solver=solver)
    pairs = set(zip(labels.tolist(), shuffled.tolist()))
    assert len(pairs) == 4
    first = [int(np.flatnonzero(labels == e)[0]) for e in range(4)]
    assert first == sorted(first), "labels are numbered by their smallest row"


@pytest.mark.parametrize("most, used", [(5, "reference"), (6, "fast")])
def test_many_clusters_go_to_the_reference(
    most: int, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoe_cluster, "FAST_CLUSTERS", most)
    features_MF = randn(60, 5, seed=0)
    labels = balanced_clusters(features_MF, 6, seed=0)
    by_solver = {
        solver: balanced_clusters(features_MF, 6, seed=0, solver=solver)
        for solver in ("fast", "reference")
    }
    assert by_solver["fast"].tolist() != by_solver["reference"].tolist()
    assert labels.tolist() == by_solver[used].tolist()


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ModelError, match="solver is 'slow'; use one of auto, fast"):
        balanced_clusters(randn(12, 3, seed=0), 3, seed=0, solver="slow")


def test_rows_that_fire_together_are_put_together() -> None:
    """Every tenth row fires on the same tokens; the weights say nothing."""
    fires = torch.arange(40).unsqueeze(1) % 10 == torch.arange(100) % 10
    hidden_NM = fires * (1 + randn(40, 100, seed=0).abs())
    embedding = coactivation_embedding(hidden_NM, randn(5, 100, seed=1))
    labels = balanced_clusters(embedding, 10, seed=0)
    assert labels.tolist() == list(range(10)) * 10


def test_inertia_is_the_distance_to_the_means() -> None:
    features = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    assert inertia(features, np.array([0, 0, 1, 1])) == 2 + 8
    assert inertia(features, np.array([0, 1, 2, 3])) == 0


@pytest.mark.parametrize("num_experts", [1, ROWS])
def test_one_expert_and_one_row_each_keep_the_order(num_experts: int) -> None:
    order, stats = cluster(num_experts=num_experts)
    assert order.tolist() == list(range(ROWS))
    assert stats.sizes == (ROWS // num_experts,) * num_experts


@pytest.mark.parametrize("silent", [slice(0, 20), slice(0, ROWS)])
def test_rows_that_never_fire_are_still_divided(silent: slice) -> None:
    tensors = layer()
    tensors["hidden_NM"][:, silent] = 0
    embedding = coactivation_embedding(tensors["hidden_NM"], tensors["down_DM"])
    assert float(embedding[silent].abs().max()) < 1e-5
    order, stats = cluster(tensors)
    assert sorted(order.tolist()) == list(range(ROWS))
    assert stats.sizes == (8,) * 6 and np.isfinite(stats.inertia_ratio)


def test_a_silent_token_fires_nothing() -> None:
    hidden_NM = torch.zeros(3, 20)
    hidden_NM[0, 4] = hidden_NM[0, 7] = 1.0
    embedding = coactivation_embedding(hidden_NM, torch.ones(5, 20))
    assert embedding.norm(dim=1).nonzero().flatten().tolist() == [4, 7]


def test_shared_rows_have_the_most_activation_mass() -> None:
    hidden_NM = torch.tensor([[1.0, 2.0, 0.0, 3.0], [1.0, 2.0, 0.0, 3.0]])
    down_DM = torch.tensor([[1.0, 1.0, 9.0, 1.0]])
    shared, rest = choose_shared_rows(hidden_NM, down_DM, 2)
    assert (shared.tolist(), rest.tolist()) == ([1, 3], [0, 2])
    down_DM[0, 0] = 5.0
    assert choose_shared_rows(hidden_NM, down_DM, 2)[0].tolist() == [0, 3]


def test_shared_experts_come_first() -> None:
    tensors = layer()
    shared, _ = choose_shared_rows(tensors["hidden_NM"], tensors["down_DM"], 16)
    order, _ = cluster(tensors, num_shared=2)
    assert order[:16].tolist() == shared.tolist()


def test_features_are_the_rows_of_their_projections() -> None:
    tensors = layer()
    gate = row_features("gate", **tensors)
    assert torch.allclose(gate.norm(dim=1), torch.ones(ROWS))
    three = row_features("gate_up_down", **tensors)
    assert three.shape == (ROWS, 3 * WIDTH)
    assert torch.equal(three[:, :WIDTH], gate)
    down = tensors["down_DM"].T
    cosine = torch.cosine_similarity(three[:, 2 * WIDTH :], down, dim=1)
    assert torch.allclose(cosine, torch.ones(ROWS))


@pytest.mark.parametrize(
    "num_experts, below, above", [(5, 4, 6), (0, 1, 1), (100, 48, 48), (47, 24, 48)]
)
def test_a_count_that_does_not_divide_is_refused_with_alternatives(
    num_experts: int, below: int, above: int
) -> None:
    with pytest.raises(
        ModelError, match=f"num_experts is {num_experts}, .* use {below} or {above}"
    ):
        check_divisible(ROWS, num_experts)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"feature": "colour"}, "experts.feature is 'colour'; use one of coactivation"),
        ({"num_shared": 6}, "num_shared is 6 of 6 experts; leave at least one"),
        ({"num_experts": 7}, "num_experts is 7"),
    ],
)
def test_settings_that_cannot_be_clustered_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        cluster(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "'coactivation', which needs calibration text"),
        ({"feature": "gate", "num_shared": 1}, "needs calibration text"),
    ],
)
def test_what_needs_text_is_refused_without(
    changes: dict[str, object], message: str
) -> None:
    tensors = {name: value for name, value in layer().items() if name != "hidden_NM"}
    with pytest.raises(ModelError, match=message):
        cluster(tensors, hidden_NM=None, **changes)


def test_statistics_have_a_line_a_layer() -> None:
    _, stats = cluster()
    lines = format_stats([stats, stats], feature="gate").splitlines()
    assert lines[0] == "# feature: gate"
    assert lines[2].split()[:3] == ["layer", "clusters", "rows_each"]
    assert lines[3].split()[:3] == ["4", "6", "8"]
    assert float(lines[3].split()[4]) == pytest.approx(stats.inertia_ratio, abs=1e-4)
    assert len(lines) == 5
