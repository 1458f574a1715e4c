"""Closed-form repair of a converted layer: what it computes when it makes K < E visits.

A token that visits K experts loses the outputs of the others, and the layers before lost
some too. A repair for one K replaces the down projection of every expert and adds one
linear stand-in for all that is not visited:

    y = sum_{e visited} h_e D_e + (x U') V + b,      h_e = silu(W_g[e] x) * (W_u[e] x)

D, U, V and b are fitted at once, on calibration tokens in the stream of the layers that
are converted already, to bring the stream back to the dense one. With z = [h, x], h the
hidden units of unvisited experts set to zero, and r the dense stream minus the converted
one, both after the layer, it is a ridge regression of r on z in which the coefficients
of x have rank Q:

    min sum_t w_t |r_t - h_t A - x_t B - b|^2 + lambda_h |A|^2 + lambda_x |B|^2,
    D = W_d + A,  B = U' V

(reduced-rank regression with partialled-out regressors: Izenman 1975; Anderson 1951).
With the Cholesky factor L of the regularised Gram matrix of z and T = L^-1 z'r, the rows
of T that belong to x are projected on their Q leading right singular vectors; back
substitution then gives the optimum. Token weights w_t are the caller's: a few
tokens carry norms above 1e4, and must not rule. lambda_h and lambda_x are chosen by
validation: fitted to one half of the sequences, judged on the other.

Shapes: N tokens, M FFN rows, D model width, E experts, F = M / E, Q rank, Z = M + D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.experts.linear_algebra import add_gram, leading_eigenvectors

FOLDS = 2
START = (4.0, 1.0)
"""lambda_h and lambda_x to begin the search from, as shares of the mean diagonals."""
STEP = 4.0
LOWEST, HIGHEST = 1e-4, 1e6
LOWEST_ROUNDED = 1e-2
"""The same for sums of bfloat16 products, so that penalties exceed their rounding."""
JUDGED_COLUMNS = 64
"""The search looks at this many random projections of the residual."""
LEAST_DIAGONAL = 1e-8
ROUNDING = 1e-6
"""Least penalty as a share of the mean diagonal before it is centred."""
RAISED = 16
"""How often penalties are raised where rounding left a matrix indefinite."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What a layer uses instead of its own down projection at one K."""

    down_EFD: Tensor
    """(E, F, D) refitted columns of the down projection, transposed."""
    in_QD: Tensor
    """(Q, D) U: what the stand-in reads of x; Q may be 0."""
    out_QD: Tensor
    """(Q, D) V: what it writes."""
    bias_D: Tensor
    """(D,) float32 b."""


def repair_name(k: int, part: str) -> str:
    """What a part of the repair for ``k`` visits is called in a layer and on disk."""
    return f"repair_{k}_{part}"


@dataclass(frozen=True, kw_only=True)
class RepairFit:
    """A repair's coefficients and how they were chosen."""

    change_MD: Tensor
    """(M, D) float32 A: to be added to the transposed down projection."""
    in_QD: Tensor
    out_QD: Tensor
    bias_D: Tensor
    ridges: tuple[float, float]
    """lambda_h and lambda_x as shares of the mean diagonals."""
    left: float
    """Share of the weighted residual that is left on validation tokens."""


class RepairStatistics:
    """Sums over tokens that a repair is fitted from, in two folds.

    Args:
        ffn_width: M.
        model_width: D.
        device: of the sums.
    """

    def __init__(
        self, ffn_width: int, model_width: int, device: torch.device | str = "cpu"
    ) -> None:
        width = ffn_width + model_width
        self.ffn_width, self.model_width = ffn_width, model_width

        def zeros(*shape: int) -> list[Tensor]:
            return [torch.zeros(shape, device=device) for _ in range(FOLDS)]

        self._gram_ZZ, self._cross_ZD = zeros(width, width), zeros(width, model_width)
        self._sum_Z, self._sum_D = zeros(width), zeros(model_width)
        self._weight, self._energy = [0.0] * FOLDS, [0.0] * FOLDS
        self._lowest = LOWEST

    def add(
        self,
        hidden_NM: Tensor,
        x_ND: Tensor,
        residual_ND: Tensor,
        weight_N: Tensor,
        *,
        fold: int,
    ) -> None:
        """Count tokens in.

        Args:
            hidden_NM: (N, M) hidden units, 0 where the expert is not visited.
            x_ND: (N, D) FFN inputs.
            residual_ND: (N, D) what should be added to the stream.
            weight_N: (N,) positive weights, of a common scale.
            fold: 0 or 1; sequences of one fold must not be split.

        Products are made in the dtype of the hidden units and x, and summed up in
        float32. In bfloat16 that is twice as fast on CPUs that have it, and a sum over a
        few calls is off by less than a thousandth, far below the penalties.
        """
        z_NZ = torch.cat([hidden_NM, x_ND], dim=1)
        if z_NZ.dtype != torch.float32:
            self._lowest = LOWEST_ROUNDED
        root_N = weight_N.float().sqrt()
        z_NZ = z_NZ * root_N.to(z_NZ.dtype).unsqueeze(1)
        residual_ND = residual_ND.float() * root_N.unsqueeze(1)
        self._sum_Z[fold] += root_N @ z_NZ.float()
        self._sum_D[fold] += root_N @ residual_ND
        self._weight[fold] += float(weight_N.double().sum())
        self._energy[fold] += float(residual_ND.double().square().sum())
        self._cross_ZD[fold] += z_NZ.T @ residual_ND.to(z_NZ.dtype)
        add_gram(self._gram_ZZ[fold], z_NZ)

    def solve(
        self, rank: int, *, near: tuple[float, float] = START, seed: int = 0
    ) -> RepairFit:
        """Fit A, U, V and b.

        The sums are used up: they are merged in place to halve the memory.

        Args:
            rank: Q; 0 leaves the linear stand-in out.
            near: where the search for the ridges begins, e.g. the last layer's.
            seed: of the projections that the search looks at.
        """
        ridges, left = self._search(rank > 0, near, seed)
        merged = _Fold.of(
            self._gram_ZZ[0].add_(self._gram_ZZ[1]),
            self._cross_ZD[0].add_(self._cross_ZD[1]),
            self._sum_Z[0] + self._sum_Z[1],
            self._sum_D[0] + self._sum_D[1],
            sum(self._weight),
            sum(self._energy),
        )
        # The best penalty is the same on twice the tokens, so its share is half.
        halved = (ridges[0] / FOLDS, ridges[1] / FOLDS)
        factor_ZZ = merged.factor(self.ffn_width, halved, rank > 0)
        half_ZD = torch.linalg.solve_triangular(
            factor_ZZ, merged.cross_ZD[: len(factor_ZZ)], upper=False
        )
        rows = self.ffn_width
        out_DQ = half_ZD.new_zeros(self.model_width, 0)
        if rank:
            low_DD = half_ZD[rows:].T @ half_ZD[rows:]
            out_DQ = leading_eigenvectors(low_DD, min(rank, self.model_width))[1]
            half_ZD[rows:] = (half_ZD[rows:] @ out_DQ) @ out_DQ.T
        whole_ZD = torch.linalg.solve_triangular(factor_ZZ.T, half_ZD, upper=True)
        change_MD, in_DQ = whole_ZD[:rows], whole_ZD[rows:] @ out_DQ
        mean_Z = merged.mean_Z
        bias_D = merged.mean_D - mean_Z[:rows] @ change_MD
        if rank:
            bias_D = bias_D - (mean_Z[rows:] @ in_DQ) @ out_DQ.T
        else:
            in_DQ = out_DQ
        return RepairFit(
            change_MD=change_MD,
            in_QD=in_DQ.T.contiguous(),
            out_QD=out_DQ.T.contiguous(),
            bias_D=bias_D,
            ridges=ridges,
            left=left,
        )

    def _search(
        self, with_x: bool, near: tuple[float, float], seed: int
    ) -> tuple[tuple[float, float], float]:
        """Ridges that do best on the other half: one coordinate at a time, until no
        step pays."""
        source = torch.Generator().manual_seed(seed)
        count = min(self.model_width, JUDGED_COLUMNS)
        basis_DJ = torch.linalg.qr(
            torch.randn(self.model_width, count, generator=source)
        )[0].to(self._sum_D[0].device)
        fitted, judged = (
            _Fold.of(
                self._gram_ZZ[fold],
                self._cross_ZD[fold] @ basis_DJ,
                self._sum_Z[fold],
                self._sum_D[fold] @ basis_DJ,
                self._weight[fold],
                self._energy[fold],
            )
            for fold in range(FOLDS)
        )
        tried: dict[tuple[float, float], float] = {}

        def loss(ridges: tuple[float, float]) -> float:
            if ridges not in tried:
                factor_ZZ = fitted.factor(self.ffn_width, ridges, with_x)
                tried[ridges] = judged.gain(
                    torch.cholesky_solve(fitted.cross_ZD[: len(factor_ZZ)], factor_ZZ)
                )
            return tried[ridges]

        def descend(start: tuple[float, float], place: int) -> tuple[float, float]:
            best = start
            for factor in (STEP, 1 / STEP):
                while True:
                    step = list(best)
                    step[place] *= factor
                    if not self._lowest <= step[place] <= HIGHEST:
                        break
                    if not loss((step[0], step[1])) < loss(best):
                        break
                    best = (step[0], step[1])
                if best != start:
                    break
            return best

        best, before = near, None
        while best != before:
            before = best
            for place in (0, 1) if with_x else (0,):
                best = descend(best, place)
        # The projections keep count / D of the energy; the bias takes its share too.
        share = count / self.model_width * max(judged.energy, 1e-30)
        constant = judged.weight * float(judged.mean_D.double().square().sum())
        return best, max(0.0, 1 + (loss(best) - constant) / share)


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """Weighted sums of a set of tokens; the Gram matrix is not centred."""

    gram_ZZ: Tensor
    cross_ZD: Tensor
    """Centred."""
    mean_Z: Tensor
    mean_D: Tensor
    weight: float
    energy: float

    @classmethod
    def of(
        cls,
        gram_ZZ: Tensor,
        cross_ZD: Tensor,
        sum_Z: Tensor,
        sum_D: Tensor,
        weight: float,
        energy: float,
    ) -> _Fold:
        weight = max(weight, 1e-30)
        return cls(
            gram_ZZ=gram_ZZ,
            cross_ZD=cross_ZD - torch.outer(sum_Z, sum_D / weight),
            mean_Z=sum_Z / weight,
            mean_D=sum_D / weight,
            weight=weight,
            energy=energy,
        )

    def factor(self, rows: int, ridges: tuple[float, float], with_x: bool) -> Tensor:
        """Lower Cholesky factor of the centred Gram matrix with its penalties."""
        size = len(self.gram_ZZ) if with_x else rows
        mean_Z = self.mean_Z[:size]
        centred_ZZ = torch.outer(mean_Z, mean_Z).mul_(-self.weight)
        centred_ZZ += self.gram_ZZ[:size, :size]
        diagonal_Z, penalty_Z = centred_ZZ.diagonal(), torch.empty_like(mean_Z)
        whole_Z = self.gram_ZZ.diagonal()
        for part, ridge in (
            (slice(0, rows), ridges[0]),
            (slice(rows, size), ridges[1]),
        ):
            if part.start < size:
                level = ridge * float(diagonal_Z[part].double().mean())
                least = ROUNDING * float(whole_Z[part].double().mean())
                penalty_Z[part] = max(level, least, LEAST_DIAGONAL)
        for _ in range(RAISED):
            diagonal_Z += penalty_Z
            factor_ZZ, fault = torch.linalg.cholesky_ex(centred_ZZ)
            if not int(fault):
                return factor_ZZ
            penalty_Z *= STEP
        raise ModelError(
            "a layer's repair cannot be fitted: the sums over its hidden units are not "
            "finite; check the model's weights, or set experts.repair = false"
        )

    def gain(self, weights_ZD: Tensor) -> float:
        """How much more weighted error there is with these coefficients than without,
        both around their best bias."""
        mean_Z = self.mean_Z[: len(weights_ZD)]
        size = len(weights_ZD)
        predicted_ZD = self.gram_ZZ[:size, :size] @ weights_ZD
        predicted_ZD -= self.weight * torch.outer(mean_Z, mean_Z @ weights_ZD)
        quadratic = (weights_ZD * predicted_ZD).double().sum()
        linear = (weights_ZD * self.cross_ZD[:size]).double().sum()
        return float(quadratic - 2 * linear)
