"""Exactly balanced k-means and the assignment under it."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.experts.balanced_assignment import ascend, balanced_assignment
from samv2.experts.balanced_kmeans import (
    Rows,
    balanced_kmeans,
    descend,
    settle,
    sketch,
)
from samv2.experts.emoe_cluster import balanced_clusters, inertia
from tests.helpers import assert_close, generator, randn


def planted(rows: int, width: int, *, groups: int = 7, seed: int = 0) -> Tensor:
    """Uneven groups of rows: the last is about as large as all others together."""
    size = torch.arange(1.0, groups + 1).square()
    which = torch.multinomial(size, rows, replacement=True, generator=generator(seed))
    centres = 2 * randn(groups, width, seed=seed + 1)
    return centres[which] + randn(rows, width, seed=seed + 2)


def counts(labels: Tensor, num_clusters: int) -> list[int]:
    return labels.bincount(minlength=num_clusters).tolist()


def total_cost(cost_EM: Tensor, labels_M: Tensor) -> float:
    return float(cost_EM.double().gather(0, labels_M.unsqueeze(0)).sum())


@pytest.mark.parametrize("warm", [False, True])
def test_the_assignment_is_the_cheapest(warm: bool) -> None:
    shapes = [(2, 2), (2, 9), (3, 4), (5, 6), (7, 3), (12, 2), (16, 5)]
    for seed in range(20):
        for num_clusters, size in shapes:
            cost_EM = randn(num_clusters, num_clusters * size, seed=seed)
            # A common slope makes all rows want the same clusters.
            cost_EM += torch.arange(num_clusters).unsqueeze(1) * (seed % 4)
            prices_E = randn(num_clusters, seed=seed + 1) if warm else None
            labels_M, prices_E = balanced_assignment(cost_EM, prices_E)
            assert counts(labels_M, num_clusters) == [size] * num_clusters
            square = cost_EM.double().repeat_interleave(size, dim=0).numpy()
            best = square[linear_sum_assignment(square)].sum()
            assert total_cost(cost_EM, labels_M) == pytest.approx(best, abs=1e-4)
            least_M = (cost_EM - prices_E.unsqueeze(1)).amin(dim=0)
            bound = float(least_M.double().sum() + size * prices_E.double().sum())
            assert bound == pytest.approx(best, abs=1e-3), "prices prove the optimum"


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_rows_of_equal_cost_are_divided(distinct: int) -> None:
    cost_EM = randn(6, distinct, seed=0)[:, torch.arange(600) % distinct]
    labels_M, _ = balanced_assignment(cost_EM)
    assert counts(labels_M, 6) == [100] * 6
    square = cost_EM.double().repeat_interleave(100, dim=0).numpy()
    best = square[linear_sum_assignment(square)].sum()
    assert total_cost(cost_EM, labels_M) == pytest.approx(best, abs=600 * 1e-5)


def test_several_problems_have_the_prices_of_each() -> None:
    cost_AEM, prices_AE = randn(3, 5, 40, seed=0), randn(3, 5, seed=1)
    together = ascend(cost_AEM, prices_AE)
    alone = [ascend(cost, prices) for cost, prices in zip(cost_AEM, prices_AE)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("width", [1, 3, 64, 300])
@pytest.mark.parametrize("num_clusters", [2, 6, 24, 60])
def test_clusters_are_balanced_and_better_than_random(
    num_clusters: int, width: int, offset: float
) -> None:
    features_MF = planted(120, width) + offset
    labels_M = balanced_kmeans(features_MF, num_clusters, seed=0)
    assert labels_M.dtype == torch.int64
    assert counts(labels_M, num_clusters) == [120 // num_clusters] * num_clusters
    shuffled_M = labels_M[torch.randperm(120, generator=generator(0))]
    found = inertia(features_MF, labels_M.numpy())
    assert found < 0.98 * inertia(features_MF, shuffled_M.numpy())


@pytest.mark.parametrize("width", [12, 200])
def test_a_common_offset_is_taken_off(width: int) -> None:
    """Whole numbers, so that adding the offset rounds nothing."""
    features_MF = planted(240, width).round()
    near, far = Rows.of(features_MF), Rows.of(features_MF + 4096)
    vectors_EF, weights_EM = randn(5, width, seed=3), torch.eye(5).repeat(1, 48)
    pairs = {
        "lengths": (far.norms_M, near.norms_M),
        "sums": (far.weighted_sums(weights_EM), near.weighted_sums(weights_EM)),
        "products": (far.dots(vectors_EF), near.dots(vectors_EF)),
    }
    # At 4096 a float32 has twelve bits fewer left for the mean and the products.
    for name, (moved, still) in pairs.items():
        error = float((moved - still).abs().max() / still.abs().max())
        assert error < 1e-3, f"{name}: {error:.2g}"


@pytest.mark.parametrize("num_clusters", [1, 30])
def test_one_cluster_and_one_row_each_need_no_search(num_clusters: int) -> None:
    labels_M = balanced_kmeans(randn(30, 4, seed=0), num_clusters, seed=0)
    assert labels_M.tolist() == [i % num_clusters for i in range(30)]


@pytest.mark.parametrize("num_clusters", [2, 16, 48])
@pytest.mark.parametrize("case", ["zero", "constant", "mostly zero", "four times"])
@pytest.mark.parametrize("width", [8, 150])
def test_equal_rows_are_divided(case: str, width: int, num_clusters: int) -> None:
    features_MF = randn(96, width, seed=0)
    if case == "zero":
        features_MF.zero_()
    elif case == "constant":
        features_MF[:] = features_MF[0]
    elif case == "mostly zero":
        features_MF[:80] = 0
    else:
        features_MF = features_MF[torch.arange(96) % 24]
    labels_M = balanced_kmeans(features_MF, num_clusters, seed=0)
    assert counts(labels_M, num_clusters) == [96 // num_clusters] * num_clusters


def test_copies_of_a_row_stay_together() -> None:
    which = torch.arange(96) % 12
    labels_M = balanced_kmeans(randn(12, 20, seed=0)[which], 12, seed=0)
    assert len(set(zip(labels_M.tolist(), which.tolist()))) == 12


@pytest.mark.parametrize("width", [5, 64, 400])
@pytest.mark.parametrize("num_clusters", [2, 8, 48])
def test_descent_never_raises_the_inertia(width: int, num_clusters: int) -> None:
    for seed in range(4):
        features_MF = planted(96, width, seed=seed)
        order = torch.randperm(96, generator=generator(seed))
        before_M = torch.arange(96)[order] % num_clusters
        rows = Rows.of(features_MF)
        after_M = descend(rows, before_M, num_clusters)
        assert counts(after_M, num_clusters) == [96 // num_clusters] * num_clusters
        before = inertia(features_MF, before_M.numpy())
        after = inertia(features_MF, after_M.numpy())
        again = inertia(features_MF, descend(rows, after_M, num_clusters).numpy())
        assert after < before and again <= after * (1 + 1e-6)


def test_descent_goes_on_where_means_alone_are_stuck() -> None:
    """Two rows a cluster: half of each mean is the row itself."""
    features_MF = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [2.2, 1.0]])
    stuck_M = torch.tensor([0, 0, 1, 1])
    means_EF = torch.tensor([[1.5, 0.0], [1.1, 1.0]])
    cost_EM = torch.cdist(means_EF, features_MF).square()
    assert balanced_assignment(cost_EM)[0].tolist() == stuck_M.tolist()
    labels_M = descend(Rows.of(features_MF), stuck_M, 2)
    assert inertia(features_MF, labels_M.numpy()) == pytest.approx(0.5 + 0.82)


@pytest.mark.parametrize("rows, width, num_clusters", [(192, 24, 6), (240, 160, 12)])
def test_inertia_is_no_higher_than_the_reference(
    rows: int, width: int, num_clusters: int
) -> None:
    for seed in range(3):
        features_MF = planted(rows, width, seed=seed)
        found = {
            solver: inertia(
                features_MF,
                balanced_clusters(
                    features_MF, num_clusters, seed=seed, starts=3, solver=solver
                ),
            )
            for solver in ("fast", "reference")
        }
        assert found["fast"] <= found["reference"] * (1 + 1e-6)


def test_the_sketch_keeps_the_leading_directions() -> None:
    tall = 5 * randn(300, 6, seed=0) @ randn(6, 200, seed=1)
    features_MF = tall + 0.1 * randn(300, 200, seed=2) + 7
    rows = Rows.of(features_MF)
    points_MR = sketch(rows, generator(0))
    centred = features_MF - features_MF.mean(dim=0)
    assert points_MR.shape == (300, 64)
    assert float(points_MR.square().sum()) > 0.999 * float(centred.square().sum())
    narrow = sketch(Rows.of(features_MF[:, :128]), generator(0))
    assert_close("narrow rows", narrow, centred[:, :128], "fp32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 140])
def test_other_floats_are_clustered_as_their_float32(
    dtype: torch.dtype, width: int
) -> None:
    features_MF = planted(96, width).to(dtype)
    labels_M = balanced_kmeans(features_MF, 8, seed=0)
    same_M = balanced_kmeans(features_MF.float(), 8, seed=0)
    assert torch.equal(labels_M, same_M)


@pytest.mark.parametrize("width", [16, 140])
def test_the_seed_decides_and_nothing_else(width: int) -> None:
    features_MF = planted(192, width)
    kept_MF, global_state = features_MF.clone(), torch.get_rng_state()
    labels_M = balanced_kmeans(features_MF, 12, seed=3)
    assert torch.equal(features_MF, kept_MF), "the features were modified"
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(balanced_kmeans(features_MF, 12, seed=3), labels_M)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    torch.set_rng_state(global_state)
    striped_MF = features_MF.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(balanced_kmeans(striped_MF, 12, seed=3), labels_M)


def test_the_start_of_least_inertia_is_kept() -> None:
    """One start's centres are planted, the other's are one point."""
    points_MR = torch.arange(4.0).repeat(10).unsqueeze(1) * 10
    points_MR -= points_MR.mean()
    centres_A = [torch.zeros(4, 1), torch.tensor([[-15.0], [-5.0], [5.0], [15.0]])]
    costs = [c.square() - 2 * c @ points_MR.T for c in centres_A]
    for order in ([0, 1], [1, 0]):
        cost_AEM = torch.stack([costs[i] for i in order])
        labels_M = settle(points_MR, cost_AEM, torch.zeros(2, 4))
        assert inertia(points_MR, labels_M.numpy()) == 0


@pytest.mark.parametrize("solver", ["fast", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused(value: float, solver: str) -> None:
    features_MF = randn(24, 4, seed=0)
    features_MF[17, 2] = value
    with pytest.raises(ModelError, match="not all finite; check the weights"):
        balanced_clusters(features_MF, 4, seed=0, solver=solver)


def test_a_count_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ModelError, match="num_experts is 5, .* use 4 or 6"):
        balanced_kmeans(randn(24, 4, seed=0), 5, seed=0)
