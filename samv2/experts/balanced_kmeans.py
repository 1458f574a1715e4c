"""Exactly balanced k-means: E clusters of M / E rows each, of least squared distance.

Minimises J = sum_i ||x_i - c_(label of i)||^2 in two stages:

- *Annealing* (Rose 1998, mass-constrained clustering) of several random starts side by
  side, with soft memberships w_ie ~ exp((price_e - ||x_i - c_e||^2) / T). Prices keep the
  clusters' masses equal while T falls. Wide rows are first projected on their leading
  directions (Halko, Martinsson & Tropp 2011).
- *Descent* of the best starts by exact balanced assignments. If row i of cluster a and
  row j of b change places, J falls by 2 (c_a - c_b).(x_j - x_i) + 2 / S ||x_j - x_i||^2.
  Distances to the means know the first term only, and Lloyd's steps get stuck where a
  row's own share of its mean outweighs how the means differ. A charge for staying of
  2 / S ||x_i - c_a||^2 stands for the second (after Hartigan & Wong 1979).

Shapes: M rows, F features, E clusters, S = M / E rows a cluster, R sketch columns, A
starts, B = A E.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.common.threads import one_thread
from samv2.experts.balanced_assignment import ascend, balanced_assignment

SKETCH_WIDTH, SKETCH_PASSES = 64, 3
"""Rows more than twice as wide are annealed in this many directions, found by so many
subspace iterations."""
SLICE_NUMBERS = 1 << 22
"""Numbers in a slice of the features: 16 MiB in float32."""
ANNEAL_STEPS, PRICE_STEPS, HOT, COLD = 60, 2, 0.7, 0.05
"""Steps of the centres, of the prices in each, and first and last temperature over the
Frobenius norm of the rows' covariance."""
PACE_UP, PACE_DOWN, FASTEST = 1.3, 0.5, 5.0
"""How a price's step grows while its sign stays and shrinks when it turns (Riedmiller &
Braun 1993), in multiples of Sinkhorn's step, which is slow across gaps between rows."""
DESCENT_STEPS, LEAST_GAIN = 60, 5e-4
"""At most, and the share of J that a step must gain to be followed by one like it."""
MANY_CLUSTERS = 32
"""Above this only one start descends."""
STAY_CHARGES = (1.0, 0.5, 0.0)
"""Shares of the charge for staying, used one after the other; 0 is Lloyd's step."""


def check_divisible(num_rows: int, num_experts: int) -> None:
    """Refuse an expert count that does not cut the FFN into equal parts.

    Raises:
        ModelError: with the next smaller and larger counts that do.
    """
    if num_experts >= 1 and num_rows % num_experts == 0:
        return
    divisors = [n for n in range(1, num_rows + 1) if num_rows % n == 0]
    below = max((n for n in divisors if n < num_experts), default=1)
    above = min((n for n in divisors if n > num_experts), default=num_rows)
    raise ModelError(
        f"experts.num_experts is {num_experts}, which does not divide the FFN's "
        f"{num_rows} rows into equal experts; use {below} or {above}"
    )


def check_finite(values: Tensor) -> None:
    """Raises ModelError if a feature, or what was computed from it, is not finite."""
    if not bool(values.isfinite().all()):
        raise ModelError(
            "features to be clustered are not all finite; check the weights and the "
            "calibration text"
        )


def balanced_kmeans(
    features_MF: Tensor, num_clusters: int, *, seed: int, starts: int = 3
) -> Tensor:
    """Cluster rows into ``num_clusters`` sets of exactly M / E rows.

    Args:
        features_MF: (M, F) of any floating dtype, on any device; finite. Read only, and
            computed with in float32, slice by slice.
        num_clusters: E, must divide M.
        seed: seed of the sketch and the starts; the global generator is not read.
        starts: how many starts are annealed, at least 1; those in reach of the best
            descend.

    Returns:
        (M,) int64 labels on the features' device; each of 0..E-1 occurs M / E times. On
        one processor and build of torch a seed gives the same labels, with any number
        of threads, since one is used. Written for CUDA as well, but not tested there.

    Raises:
        ModelError: E does not divide M, or a feature is not finite.
    """
    num_rows = features_MF.shape[0]
    check_divisible(num_rows, num_clusters)
    if num_clusters in (1, num_rows):
        return torch.arange(num_rows, device=features_MF.device) % num_clusters
    source = torch.Generator(device=features_MF.device).manual_seed(seed)
    with torch.no_grad(), one_thread():
        rows = Rows.of(features_MF)
        points_MR = sketch(rows, source)
        labels_M = settle(points_MR, *anneal(points_MR, num_clusters, starts, source))
        if points_MR.shape[1] < features_MF.shape[1]:
            labels_M = descend(rows, labels_M, num_clusters)
    return labels_M


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows less their mean, in float32, without a copy of them.

    Taking the mean off keeps the digits of rows that lie far from the origin.
    """

    features_MF: Tensor
    """As given: any floating dtype, not centred."""
    mean_F: Tensor
    """float32."""
    norms_M: Tensor
    """float32 squared lengths of the centred rows."""

    @classmethod
    def of(cls, features_MF: Tensor) -> Rows:
        """Raises ModelError if a feature is not finite."""
        totals = [x.sum(dim=0, dtype=torch.double) for x in slices(features_MF)]
        mean_F = (torch.stack(totals).sum(dim=0) / len(features_MF)).float()
        norms = [(x - mean_F).square().sum(dim=1) for x in slices(features_MF)]
        norms_M = torch.cat(norms)
        check_finite(norms_M)
        return cls(features_MF=features_MF, mean_F=mean_F, norms_M=norms_M)

    def dots(self, vectors_EF: Tensor) -> Tensor:
        """(E, M) float32 products of each vector with each row."""
        parts = [vectors_EF @ x.T for x in slices(self.features_MF)]
        return torch.cat(parts, dim=1) - (vectors_EF @ self.mean_F).unsqueeze(1)

    def weighted_sums(self, weights_EM: Tensor) -> Tensor:
        """(E, F) float32 sums of the rows, each with its weights; zeros cost nothing."""
        used = weights_EM.any(dim=0).nonzero().squeeze(1)
        sums_EF = self.mean_F.new_zeros(len(weights_EM), len(self.mean_F))
        for part in used.split(max(1, SLICE_NUMBERS // len(self.mean_F))):
            x = self.features_MF[part].float() - self.mean_F
            sums_EF += weights_EM[:, part] @ x
        return sums_EF


def slices(features_MF: Tensor) -> Iterator[Tensor]:
    """The rows in float32, some at a time."""
    for part in features_MF.split(max(1, SLICE_NUMBERS // features_MF.shape[1])):
        yield part.float()


def sketch(rows: Rows, source: torch.Generator) -> Tensor:
    """(M, R) float32 centred rows along their leading directions; narrow rows whole."""
    width = len(rows.mean_F)
    if width <= 2 * SKETCH_WIDTH:
        return rows.features_MF.float() - rows.mean_F
    basis_RF = torch.randn(
        SKETCH_WIDTH, width, generator=source, device=rows.mean_F.device
    )
    for _ in range(SKETCH_PASSES):
        image_RF = rows.weighted_sums(rows.dots(basis_RF))
        basis_RF = torch.linalg.qr(image_RF.T)[0].T
    return rows.dots(basis_RF).T.contiguous()


def anneal(
    points_MR: Tensor, num_clusters: int, starts: int, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Centres and prices of several starts, cooled side by side.

    Centres start as random combinations of all rows, which have the rows' covariance and
    never coincide. A step is two products for all starts together.

    Args:
        points_MR: (M, R) float32, of mean 0.
        num_clusters: E.
        starts: A.
        source: generator on the points' device.

    Returns:
        (A, E, M) float32 squared distances to the centres, less the rows' own squared
        lengths, and (A, E) prices for them.
    """
    num_rows = len(points_MR)
    size = num_rows // num_clusters
    unit = float(torch.linalg.matrix_norm(points_MR.T @ points_MR)) / num_rows
    unit = max(unit, 1e-30)
    draws = torch.randn(
        starts * num_clusters, num_rows, generator=source, device=points_MR.device
    )
    centres_BR = draws @ points_MR / num_rows**0.5
    prices_B = centres_BR.new_zeros(len(centres_BR))
    pace_B, last_B = torch.ones_like(prices_B), prices_B
    for step in range(ANNEAL_STEPS):
        heat = unit * HOT * (COLD / HOT) ** (step / (ANNEAL_STEPS - 1))
        bias_B = (prices_B - centres_BR.square().sum(dim=1)) / heat
        logits_MB = torch.addmm(bias_B, points_MR, (2 / heat) * centres_BR.T)
        for _ in range(PRICE_STEPS):
            share_MB = logits_MB.view(num_rows, starts, -1).softmax(dim=2).flatten(1)
            mass_B = share_MB.sum(dim=0).clamp(min=1e-3 * size)
            want_B = (size / mass_B).log()
            steady_B = want_B * last_B > 0
            pace_B = torch.where(steady_B, PACE_UP * pace_B, PACE_DOWN * pace_B)
            pace_B, last_B = pace_B.clamp(1, FASTEST), want_B
            raise_B = pace_B * want_B
            logits_MB += raise_B
            prices_B = prices_B + heat * raise_B
        centres_BR = (share_MB.T @ points_MR) / mass_B.unsqueeze(1)
    cost_BM = torch.addmm(
        centres_BR.square().sum(dim=1, keepdim=True), centres_BR, points_MR.T, alpha=-2
    )
    cost_AEM = cost_BM.view(starts, num_clusters, num_rows)
    prices_AE = ascend(cost_AEM, prices_B.view(starts, num_clusters))
    return cost_AEM, prices_AE


def settle(points_MR: Tensor, cost_AEM: Tensor, prices_AE: Tensor) -> Tensor:
    """(M,) labels of least J to which the annealed starts descend.

    A start's dual value bounds the cost of every balanced assignment to its centres. A
    start that is behind the first by more than descent gained there is left out; with
    many clusters, where descent takes longest, all others are.
    """
    num_clusters, num_rows = cost_AEM.shape[1:]
    size, rows = num_rows // num_clusters, Rows.of(points_MR)
    least_AM = (cost_AEM - prices_AE.unsqueeze(2)).amin(dim=1)
    bounds = (least_AM.sum(dim=1) + size * prices_AE.sum(dim=1)).tolist()
    order = sorted(range(len(bounds)), key=bounds.__getitem__)
    if num_clusters > MANY_CLUSTERS:
        order = order[:1]
    ahead = bounds[order[0]]
    found: list[tuple[float, Tensor]] = []
    for start in order:
        if found and bounds[start] - ahead > ahead - found[0][0]:
            break
        labels_M, _ = balanced_assignment(cost_AEM[start], prices_AE[start])
        labels_M = descend(rows, labels_M, num_clusters)
        sums_EF = rows.weighted_sums(one_hot(labels_M, num_clusters))
        found.append((-squared(sums_EF) / size, labels_M))
    return min(found, key=lambda item: item[0])[1]


def descend(rows: Rows, labels_M: Tensor, num_clusters: int) -> Tensor:
    """Balanced assignments, charged for staying, while J falls.

    Args:
        rows: (M, F).
        labels_M: (M,) int64, balanced.
        num_clusters: E >= 2.

    Returns:
        (M,) int64 balanced labels whose J is no higher.
    """
    size = len(labels_M) // num_clusters
    sums_EF = rows.weighted_sums(one_hot(labels_M, num_clusters))
    inertia = float(rows.norms_M.double().sum() - squared(sums_EF) / size)
    prices_E: Tensor | None = None
    charges = list(STAY_CHARGES)
    for _ in range(DESCENT_STEPS):
        means_EF = sums_EF / size
        cost_EM = means_EF.square().sum(dim=1, keepdim=True) - 2 * rows.dots(means_EF)
        own_1M = rows.norms_M + cost_EM.gather(0, labels_M.unsqueeze(0))
        cost_EM.scatter_add_(0, labels_M.unsqueeze(0), own_1M * (2 * charges[0] / size))
        moved_M, prices_E = balanced_assignment(cost_EM, prices_E)
        change_EM = one_hot(moved_M, num_clusters) - one_hot(labels_M, num_clusters)
        after_EF = sums_EF + rows.weighted_sums(change_EM)
        gain = (squared(after_EF) - squared(sums_EF)) / size
        if gain > 0:
            labels_M, sums_EF = moved_M, after_EF
        if gain <= LEAST_GAIN * inertia:
            charges.pop(0)
            # Labels that are best where staying is dear are best where it is cheap.
            if not charges or not bool(change_EM.any()):
                break
    return labels_M


def one_hot(labels_M: Tensor, num_clusters: int) -> Tensor:
    """(E, M) float32."""
    cluster_E1 = torch.arange(num_clusters, device=labels_M.device).unsqueeze(1)
    return (labels_M == cluster_E1).float()


def squared(sums_EF: Tensor) -> float:
    """Sum of squares; J is a constant less this over S."""
    return float(sums_EF.double().square().sum())
