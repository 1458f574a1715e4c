"""Balanced clustering of FFN rows into experts (EMoE, arXiv 2310.10908, section 3).

Minimises ||X - Z C||^2_F over assignments Z in which each of the E clusters has exactly
M / E members. X is one feature row per FFN row:

- ``coactivation``: the row's place in the spectral embedding of how rows fire together
  on calibration text (MoEfication, arXiv 2110.01786, uses the same graph);
- ``gate``: its L2-normalised gate-projection row (EMoE);
- ``gate_up_down``: gate, up and down rows, each normalised, side by side.

Shapes: M FFN rows, D model width, E experts, N calibration tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from k_means_constrained import KMeansConstrained
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.common.settings_checks import FEATURES
from samv2.experts.balanced_kmeans import (
    balanced_kmeans,
    check_divisible,
    check_finite,
)
from samv2.experts.linear_algebra import leading_eigenvectors

EMBEDDING_WIDTH = 64
ACTIVE_FRACTION = 0.1
SOLVERS = ("auto", "fast", "reference")
FAST_CLUSTERS = 256
"""Up to so many clusters the fast solver is used: see :func:`balanced_clusters`."""


@dataclass(frozen=True, kw_only=True)
class ClusterStats:
    """What one layer's clustering found; a line of ``cluster_stats.txt``."""

    layer: int
    """Index of the decoder layer."""
    sizes: tuple[int, ...]
    inertia: float
    """Sum of squared distances to the cluster means."""
    inertia_ratio: float
    """Inertia over that of a random balanced partition; below 1 is structure found."""
    within_variance: float
    """Inertia per row and feature."""
    seconds: float


def row_features(
    feature: str,
    *,
    gate_MD: Tensor,
    up_MD: Tensor,
    down_DM: Tensor,
    hidden_NM: Tensor | None,
) -> Tensor:
    """Features that the rows are clustered by.

    Args:
        feature: one of :data:`FEATURES`.
        gate_MD: (M, D) gate projection.
        up_MD: (M, D) up projection.
        down_DM: (D, M) down projection.
        hidden_NM: (N, M) activations silu(gate) * up on calibration tokens; needed for
            ``coactivation`` only.

    Returns:
        (M, features) float32.
    """
    if feature == "coactivation":
        if hidden_NM is None:
            raise ModelError(
                "experts.feature is 'coactivation', which needs calibration text; give "
                "some, or use 'gate'"
            )
        return coactivation_embedding(hidden_NM, down_DM)
    normalise = torch.nn.functional.normalize
    if feature == "gate":
        return normalise(gate_MD.float(), dim=1)
    if feature == "gate_up_down":
        parts = (gate_MD.float(), up_MD.float(), down_DM.float().T)
        return torch.cat([normalise(part, dim=1) for part in parts], dim=1)
    raise ModelError(
        f"experts.feature is {feature!r}; use one of {', '.join(FEATURES)}"
    )


def coactivation_embedding(hidden_NM: Tensor, down_DM: Tensor) -> Tensor:
    """Spectral embedding of which rows contribute most to the same tokens.

    A row is active at a token if its contribution |h_i| ||W_down[:, i]|| is among the
    token's largest tenth. Rows are embedded by the leading eigenvectors of the cosine
    co-activation matrix, scaled by the square roots of their eigenvalues.

    Args:
        hidden_NM: (N, M) activations.
        down_DM: (D, M) down projection.

    Returns:
        (M, min(64, M)) float32; rows that are never active get zeros.
    """
    strength_NM = hidden_NM.float().abs() * down_DM.float().norm(dim=0)
    num_rows = strength_NM.shape[1]
    active = max(1, int(num_rows * ACTIVE_FRACTION))
    threshold_N1 = strength_NM.topk(active, dim=1).values[:, -1:]
    fires_NM = ((strength_NM >= threshold_N1) & (strength_NM > 0)).float()
    fires_NM = fires_NM / fires_NM.norm(dim=0).clamp(min=1e-8)
    width = min(EMBEDDING_WIDTH, num_rows)
    values, vectors = leading_eigenvectors(fires_NM.T @ fires_NM, width)
    return vectors * values.clamp(min=0).sqrt()


def balanced_clusters(
    features_MF: Tensor,
    num_experts: int,
    *,
    seed: int,
    starts: int = 3,
    solver: str = "auto",
) -> np.ndarray:
    """Cluster rows into ``num_experts`` sets of exactly M / E rows.

    Args:
        features_MF: (M, features) of any floating dtype, finite; not modified.
        num_experts: E, must divide M.
        seed: seed of the starts; the global generators are not read.
        starts: how many starts; the best is kept.
        solver: ``fast`` (:mod:`samv2.experts.balanced_kmeans`), ``reference``
            (``k-means-constrained``) or ``auto``: fast up to 256 clusters. Measured in
            CPU seconds with 3 starts: below about 150 rows the reference is some 6 ms
            quicker but 1 to 5 % higher in inertia; fast is 11 times quicker at 1,536
            rows and 16 clusters, 8 times at 64, 1.3 times at 256; its time grows with
            E^2 M and is longer than the reference's at 512.

    Returns:
        (M,) int64 labels, numbered by the smallest row they hold. A seed gives the same
        labels with any number of threads by the fast solver; by the reference only if
        numpy's BLAS rounds alike.

    Raises:
        ModelError: E does not divide M, a feature is not finite, or no such solver.
    """
    num_rows = features_MF.shape[0]
    check_divisible(num_rows, num_experts)
    if solver not in SOLVERS:
        raise ModelError(f"solver is {solver!r}; use one of {', '.join(SOLVERS)}")
    if num_experts in (1, num_rows):
        return np.arange(num_rows) % num_experts
    if solver == "auto":
        solver = "fast" if num_experts <= FAST_CLUSTERS else "reference"
    if solver == "fast":
        labels = balanced_kmeans(features_MF, num_experts, seed=seed, starts=starts)
        return _by_smallest_row(labels.cpu().numpy(), num_experts)
    check_finite(features_MF)
    size = num_rows // num_experts
    reference = KMeansConstrained(
        n_clusters=num_experts,
        size_min=size,
        size_max=size,
        n_init=starts,
        random_state=seed,
        n_jobs=1,
    )
    labels = reference.fit_predict(features_MF.double().cpu().numpy())
    return _by_smallest_row(labels, num_experts)


def _by_smallest_row(labels: np.ndarray, num_experts: int) -> np.ndarray:
    """(M,) int64 labels renumbered in the order in which they first occur."""
    first_row = np.unique(labels, return_index=True)[1]
    rename = np.empty(num_experts, dtype=np.int64)
    rename[np.argsort(first_row)] = np.arange(num_experts)
    return rename[labels]


def inertia(features_MF: Tensor, labels: np.ndarray) -> float:
    """||X - Z C||^2_F for the cluster means C of the given labels."""
    total = 0.0
    for label in np.unique(labels):
        members = features_MF[torch.from_numpy(labels == label)].double()
        total += float((members - members.mean(dim=0)).square().sum())
    return total


def choose_shared_rows(
    hidden_NM: Tensor, down_DM: Tensor, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into the ones with most activation mass and the rest.

    The mass of a row is the mean over tokens of its share of the summed squared
    contributions (|h_i| ||W_down[:, i]||)^2.

    Returns:
        (count,) and (M - count,) int64 row indices, each ascending.
    """
    energy_NM = (hidden_NM.float() * down_DM.float().norm(dim=0)).square()
    share_M = (energy_NM / energy_NM.sum(dim=1, keepdim=True).clamp(min=1e-30)).mean(0)
    order = torch.sort(share_M, descending=True, stable=True)[1].numpy()
    return np.sort(order[:count]), np.sort(order[count:])


def cluster_layer(
    layer: int,
    *,
    gate_MD: Tensor,
    up_MD: Tensor,
    down_DM: Tensor,
    hidden_NM: Tensor | None,
    num_experts: int,
    num_shared: int,
    feature: str,
    seed: int,
    starts: int = 3,
) -> tuple[np.ndarray, ClusterStats]:
    """Divide one FFN's rows into experts, shared experts first.

    Args:
        layer: the layer's index (for the statistics).
        gate_MD: (M, D) gate projection.
        up_MD: (M, D) up projection.
        down_DM: (D, M) down projection.
        hidden_NM: (N, M) activations on calibration tokens, or None.
        num_experts: E in all.
        num_shared: how many of them are shared experts: the rows of highest activation
            mass; they become experts 0..num_shared-1.
        feature: one of :data:`FEATURES`.
        seed: seed of the clustering.
        starts: k-means starts; the best is kept.

    Returns:
        (M,) int64 row order in which expert e owns rows e M/E .. (e + 1) M/E - 1, and
        the statistics of the clustered (not shared) rows.

    Raises:
        ModelError: E does not divide M, no expert is left to cluster, or shared experts
            are asked without text.
    """
    num_rows = gate_MD.shape[0]
    check_divisible(num_rows, num_experts)
    if num_shared >= num_experts:
        raise ModelError(
            f"experts.num_shared is {num_shared} of {num_experts} experts; leave at least "
            "one to be routed"
        )
    size = num_rows // num_experts
    start = time.perf_counter()
    if num_shared:
        if hidden_NM is None:
            raise ModelError(
                f"experts.num_shared is {num_shared}: shared experts are chosen by "
                "activation mass, which needs calibration text; give some, or set it to 0"
            )
        shared, routed = choose_shared_rows(hidden_NM, down_DM, num_shared * size)
    else:
        shared, routed = np.empty(0, dtype=np.int64), np.arange(num_rows)
    features_MF = row_features(
        feature, gate_MD=gate_MD, up_MD=up_MD, down_DM=down_DM, hidden_NM=hidden_NM
    )[torch.from_numpy(routed)]
    labels = balanced_clusters(
        features_MF, num_experts - num_shared, seed=seed, starts=starts
    )
    order = np.concatenate([shared, routed[np.argsort(labels, kind="stable")]])

    found = inertia(features_MF, labels)
    shuffled = np.random.default_rng(seed).permutation(labels)
    stats = ClusterStats(
        layer=layer,
        sizes=tuple(int(n) for n in np.bincount(labels)),
        inertia=found,
        inertia_ratio=found / max(inertia(features_MF, shuffled), 1e-30),
        within_variance=found / features_MF.numel(),
        seconds=time.perf_counter() - start,
    )
    return order, stats


def format_stats(stats: Sequence[ClusterStats], *, feature: str) -> str:
    """The text of ``cluster_stats.txt``: one line a layer."""
    lines = [
        f"# feature: {feature}",
        "# inertia_ratio: inertia over that of a random balanced partition",
        "layer  clusters  rows_each  inertia  inertia_ratio  within_variance  seconds",
    ]
    for row in stats:
        sizes = set(row.sizes)
        each = str(row.sizes[0]) if len(sizes) == 1 else str(sorted(sizes))
        lines.append(
            f"{row.layer:5d}  {len(row.sizes):8d}  {each:>9}  {row.inertia:.6g}  "
            f"{row.inertia_ratio:.4f}  {row.within_variance:.6g}  {row.seconds:.2f}"
        )
    return "\n".join(lines) + "\n"
