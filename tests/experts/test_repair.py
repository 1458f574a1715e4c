"""Closed-form repairs against dense least squares in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from samv2.common.errors import ModelError
from samv2.experts import repair as repairing
from samv2.experts.repair import (
    HIGHEST,
    LOWEST,
    START,
    STEP,
    RepairFit,
    RepairStatistics,
)
from tests.helpers import assert_close, randn

TOKENS, ROWS, WIDTH, RANK = 240, 12, 7, 2


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a repair is fitted from."""

    hidden_NM: Tensor
    x_ND: Tensor
    residual_ND: Tensor
    weight_N: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Text:
        return Text(**{name: value[rows] for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.x_ND)


def make_text(seed: int = 0, *, noise: float = 1.0, tokens: int = TOKENS) -> Text:
    """Experts of 3 rows that are visited half the time; inputs that are not centred."""
    base = 100 * seed
    x_ND = randn(tokens, WIDTH, seed=base) + torch.arange(WIDTH) / 2
    visited_NE = randn(tokens, ROWS // 3, seed=base + 1) > 0
    gate_DM, up_DM = randn(2, WIDTH, ROWS, seed=base + 2) / 2
    hidden_NM = silu(x_ND @ gate_DM) * (x_ND @ up_DM)
    hidden_NM = hidden_NM * visited_NE.repeat_interleave(3, dim=1)
    residual_ND = (
        0.2 * hidden_NM @ randn(ROWS, WIDTH, seed=base + 3)
        + 0.3 * x_ND @ randn(WIDTH, WIDTH, seed=base + 4)
        + noise * randn(tokens, WIDTH, seed=base + 5)
        + 0.7
    )
    weight_N = randn(tokens, seed=base + 6).exp()
    return Text(
        hidden_NM=hidden_NM,
        x_ND=x_ND,
        residual_ND=residual_ND,
        weight_N=weight_N / weight_N.mean(),
    )


def statistics_of(*folds: Text) -> RepairStatistics:
    statistics = RepairStatistics(folds[0].hidden_NM.shape[1], WIDTH)
    for fold, part in enumerate(folds):
        statistics.add(
            part.hidden_NM, part.x_ND, part.residual_ND, part.weight_N, fold=fold
        )
    return statistics


def halves(text: Text) -> tuple[Text, Text]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def fit(text: Text, rank: int) -> RepairFit:
    return statistics_of(*halves(text)).solve(rank)


@pytest.fixture
def given_ridges(monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The search may not move, so these are used."""
    for name in ("LOWEST", "LOWEST_ROUNDED"):
        monkeypatch.setattr(repairing, name, math.inf)
    return (0.3, 0.05)


@dataclass(frozen=True, kw_only=True)
class Penalised:
    """The objective in float64, every token of its own."""

    text: Text
    lambda_h: float
    lambda_x: float

    @classmethod
    def of(cls, text: Text, ridges: tuple[float, float]) -> Penalised:
        """Ridges are shares of the mean diagonals of one fold, i.e. half the tokens."""
        means = []
        for values in (text.hidden_NM.double(), text.x_ND.double()):
            weight_N1 = text.weight_N.double().unsqueeze(1)
            centre = (weight_N1 * values).sum(dim=0) / weight_N1.sum()
            spread = (weight_N1 * (values - centre).square()).sum(dim=0)
            means.append(float(spread.mean()) / 2)
        return cls(
            text=text, lambda_h=ridges[0] * means[0], lambda_x=ridges[1] * means[1]
        )

    def __call__(self, change_MD: Tensor, slope_DD: Tensor, bias_D: Tensor) -> float:
        text, change_MD, slope_DD = self.text, change_MD.double(), slope_DD.double()
        rest_ND = text.residual_ND.double() - text.hidden_NM.double() @ change_MD
        rest_ND = rest_ND - text.x_ND.double() @ slope_DD - bias_D.double()
        error = (text.weight_N.double() * rest_ND.square().sum(dim=1)).sum()
        penalty = self.lambda_h * change_MD.square().sum()
        return float(error + penalty + self.lambda_x * slope_DD.square().sum())

    def solve(
        self, features_NZ: Tensor, target_NK: Tensor, penalty_Z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted ridge by augmented least squares: coefficients and bias."""
        root_N1 = self.text.weight_N.double().sqrt().unsqueeze(1)
        ones = torch.ones(len(features_NZ), 1, dtype=torch.double)
        design = torch.cat([ones, features_NZ.double()], dim=1) * root_N1
        ridge = torch.diag(penalty_Z.double().sqrt())
        zeros = ridge.new_zeros(len(ridge), 1)
        solution = torch.linalg.lstsq(
            torch.cat([design, torch.cat([zeros, ridge], dim=1)]),
            torch.cat(
                [
                    target_NK.double() * root_N1,
                    ridge.new_zeros(len(ridge), target_NK.shape[1]),
                ]
            ),
            driver="gelsd",
        ).solution
        return solution[1:], solution[0]

    def full_rank(self, with_x: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The best A, B and b without a bound on B's rank, or with B = 0."""
        text, rows = self.text, self.text.hidden_NM.shape[1]
        penalty_Z = torch.full((rows + WIDTH,), self.lambda_h)
        penalty_Z[rows:] = self.lambda_x
        z_NZ = torch.cat([text.hidden_NM, text.x_ND], dim=1)
        size = rows + WIDTH if with_x else rows
        found, bias_D = self.solve(z_NZ[:, :size], text.residual_ND, penalty_Z[:size])
        slope_DD = found[rows:] if with_x else found.new_zeros(WIDTH, WIDTH)
        return found[:rows], slope_DD, bias_D

    def alternating(self, rank: int, seed: int, steps: int = 40) -> float:
        """The objective that alternating least squares reaches from a random start."""
        text, rows = self.text, self.text.hidden_NM.shape[1]
        out_QD = randn(rank, WIDTH, seed=seed, dtype=torch.double)
        z_NZ = torch.cat([text.hidden_NM, text.x_ND], dim=1).double()
        penalty_Z = torch.full((rows + WIDTH,), self.lambda_h)
        penalty_Z[rows:] = self.lambda_x
        residual_ND = text.residual_ND.double()
        best = math.inf
        for _ in range(steps):
            # V with orthonormal rows: then A, U and b are two plain ridges.
            whole_DD = torch.linalg.qr(out_QD.T, mode="complete")[0]
            in_DQ, rest_DD = whole_DD[:, :rank], whole_DD[:, rank:]
            low, low_bias = self.solve(z_NZ, residual_ND @ in_DQ, penalty_Z)
            high, high_bias = self.solve(
                z_NZ[:, :rows], residual_ND @ rest_DD, penalty_Z[:rows]
            )
            change_MD = low[:rows] @ in_DQ.T + high @ rest_DD.T
            bias_D = in_DQ @ low_bias + rest_DD @ high_bias
            slope_DQ = low[rows:]
            best = min(best, self(change_MD, slope_DQ @ in_DQ.T, bias_D))
            # Then V with U fixed, whose columns are made orthonormal in turn.
            basis_DQ = torch.linalg.qr(slope_DQ)[0]
            low_NZ = torch.cat([z_NZ[:, :rows], z_NZ[:, rows:] @ basis_DQ], dim=1)
            found, _ = self.solve(low_NZ, residual_ND, penalty_Z[: rows + rank])
            out_QD = found[rows:]
        return best


def parts_of(found: RepairFit) -> tuple[Tensor, Tensor, Tensor]:
    return found.change_MD, found.in_QD.T @ found.out_QD, found.bias_D


@pytest.mark.parametrize("rank", [0, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("split", [0.5, 0.2])
def test_the_solution_is_that_of_dense_least_squares(
    rank: int, split: float, given_ridges: tuple[float, float]
) -> None:
    """However the tokens are divided: both halves count once."""
    text = make_text()
    cut = int(split * TOKENS)
    statistics = statistics_of(text[:cut], text[cut:])
    found = statistics.solve(rank, near=given_ridges)
    assert found.ridges == given_ridges
    expected = Penalised.of(text, given_ridges).full_rank(rank > 0)
    names = ("A", "B", "b")
    for name, value, other in zip(names, parts_of(found), expected, strict=True):
        assert_close(name, value, other, "logits")
    assert found.in_QD.shape == found.out_QD.shape == (min(rank, WIDTH), WIDTH)
    assert found.change_MD.dtype == found.bias_D.dtype == torch.float32


@pytest.mark.parametrize("rank", [0, RANK])
def test_the_ridges_that_were_found_are_those_that_were_used(rank: int) -> None:
    text = make_text(1)
    found = fit(text, rank)
    objective = Penalised.of(text, found.ridges)
    if rank:
        best = objective.alternating(rank, seed=5)
    else:
        best = objective(*objective.full_rank(False))
    assert objective(*parts_of(found)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("rank", [1, RANK, 4])
def test_no_other_coefficients_of_the_same_rank_are_better(
    rank: int, given_ridges: tuple[float, float]
) -> None:
    text = make_text(2)
    found = statistics_of(*halves(text)).solve(rank, near=given_ridges)
    objective = Penalised.of(text, given_ridges)
    change_MD, slope_DD, bias_D = parts_of(found)
    assert int(torch.linalg.matrix_rank(slope_DD)) == rank
    value = objective(change_MD, slope_DD, bias_D)
    reached = [objective.alternating(rank, seed) for seed in range(4)]
    assert value <= min(reached) * (1 + 1e-6)
    assert min(reached) <= value * (
        1 + 1e-3
    ), "the search for better ones is a good one"
    full = objective(*objective.full_rank(True))
    assert full * 1.001 < value < objective(*objective.full_rank(False)) / 1.001
    for seed in range(20):
        scale = 10.0 ** -(seed % 3 + 1)
        in_QD = found.in_QD + scale * randn(rank, WIDTH, seed=300 + seed)
        out_QD = found.out_QD + scale * randn(rank, WIDTH, seed=400 + seed)
        other_MD = change_MD + scale * randn(ROWS, WIDTH, seed=500 + seed)
        assert objective(other_MD, in_QD.T @ out_QD, bias_D) > value


def test_a_weight_counts_like_repeated_tokens(
    given_ridges: tuple[float, float],
) -> None:
    text = make_text(3)
    times_N = torch.arange(TOKENS) % 4
    weighted = Text(**(vars(text) | {"weight_N": times_N.float()}))
    repeated = weighted[torch.arange(TOKENS).repeat_interleave(times_N)]
    repeated = Text(**(vars(repeated) | {"weight_N": torch.ones(len(repeated))}))
    found = [
        statistics_of(one[: len(one) // 2], one[len(one) // 2 :]).solve(
            RANK, near=given_ridges
        )
        for one in (weighted, repeated)
    ]
    for name, *both in zip(("A", "B", "b"), *map(parts_of, found), strict=True):
        assert_close(name, *both, "logits")
    # The search weighs too: the same folds, in both forms.
    cut = int(times_N[: TOKENS // 2].sum())
    folds = ((*halves(weighted),), (repeated[:cut], repeated[cut:]))
    lefts = [statistics_of(*pair).solve(RANK).left for pair in folds]
    assert lefts[0] == pytest.approx(lefts[1], rel=1e-4)


def test_planted_coefficients_are_recovered() -> None:
    text = make_text(4, tokens=2000)
    change_MD = randn(ROWS, WIDTH, seed=50)
    slope_DD = randn(WIDTH, RANK, seed=51) @ randn(RANK, WIDTH, seed=52)
    bias_D = randn(WIDTH, seed=53)
    planted_ND = text.hidden_NM @ change_MD + text.x_ND @ slope_DD + bias_D
    found = fit(Text(**(vars(text) | {"residual_ND": planted_ND})), RANK)
    assert found.left < 1e-3 and max(found.ridges) < 0.1
    for value, other in zip(parts_of(found), (change_MD, slope_DD, bias_D)):
        assert float((value - other).norm() / other.norm()) < 0.03


def test_a_constant_residual_is_the_bias() -> None:
    text = make_text(5)
    constant_D = randn(WIDTH, seed=60)
    found = fit(
        Text(**(vars(text) | {"residual_ND": constant_D.expand(TOKENS, -1)})), RANK
    )
    change_MD, slope_DD, bias_D = parts_of(found)
    assert_close("bias", bias_D, constant_D, "logits")
    assert float(change_MD.abs().max()) < 1e-4 and float(slope_DD.abs().max()) < 1e-4
    assert found.left == pytest.approx(0, abs=1e-5)


def validation_error(text: Text, ridges: tuple[float, float]) -> float:
    """Fitted to one half, judged on the other around its own best bias, in float64."""
    first, second = halves(text)
    # Twice the ridge: of(…) halves it, and here one half is all there is.
    objective = Penalised.of(first, (2 * ridges[0], 2 * ridges[1]))
    change_MD, slope_DD, _ = objective.full_rank(True)
    rest_ND = second.residual_ND.double() - second.hidden_NM.double() @ change_MD
    rest_ND = rest_ND - second.x_ND.double() @ slope_DD
    weight_N1 = second.weight_N.double().unsqueeze(1)
    rest_ND = rest_ND - (weight_N1 * rest_ND).sum(dim=0) / weight_N1.sum()
    return float((weight_N1 * rest_ND.square()).sum())


@pytest.mark.parametrize("seed, noise", [(6, 1.0), (7, 3.0), (8, 0.1)])
def test_the_ridges_do_no_worse_on_the_other_half_than_their_neighbours(
    seed: int, noise: float
) -> None:
    text = make_text(seed, noise=noise)
    found = fit(text, RANK)
    error = validation_error(text, found.ridges)
    second = halves(text)[1]
    energy = second.weight_N.unsqueeze(1) * second.residual_ND.square()
    assert found.left == pytest.approx(error / float(energy.sum()), rel=1e-3)
    lambda_h, lambda_x = found.ridges
    assert error < validation_error(text, START) or found.ridges == START
    for factor in (STEP, 1 / STEP):
        for other in ((lambda_h * factor, lambda_x), (lambda_h, lambda_x * factor)):
            if LOWEST <= min(other) and max(other) <= HIGHEST:
                assert error <= validation_error(text, other) * (1 + 1e-3)


def test_a_search_may_begin_elsewhere() -> None:
    text = make_text(6)
    plain = fit(text, RANK)
    lambda_h, lambda_x = plain.ridges
    near = (lambda_h * STEP**3, lambda_x / STEP**3)
    far = statistics_of(*halves(text)).solve(RANK, near=near)
    assert far.left == pytest.approx(plain.left, rel=1e-3)
    stays = statistics_of(*halves(text)).solve(RANK, near=plain.ridges)
    assert stays.ridges == plain.ridges


def test_sums_do_not_depend_on_how_tokens_arrive(
    given_ridges: tuple[float, float],
) -> None:
    text = make_text(9)
    whole = statistics_of(*halves(text)).solve(RANK, near=given_ridges)
    statistics = RepairStatistics(ROWS, WIDTH)
    for fold, half in enumerate(halves(text)):
        for start in range(0, len(half), 50):
            part = half[start : start + 50]
            statistics.add(*vars(part).values(), fold=fold)
    parts = statistics.solve(RANK, near=given_ridges)
    for name, *both in zip(("A", "B", "b"), parts_of(parts), parts_of(whole)):
        assert_close(name, *both, "logits")
    assert parts.left == pytest.approx(whole.left, rel=1e-4)


def test_adding_leaves_the_text_alone() -> None:
    text = make_text()
    kept = {name: value.clone() for name, value in vars(text).items()}
    statistics_of(*halves(text))
    for name, value in vars(text).items():
        assert torch.equal(value, kept[name]), name


def test_the_same_tokens_give_the_same_bits() -> None:
    found = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        found.append(fit(make_text(), RANK))
    assert found[0].ridges == found[1].ridges and found[0].left == found[1].left
    for name in ("change_MD", "in_QD", "out_QD", "bias_D"):
        assert torch.equal(*(getattr(one, name) for one in found)), name


def test_bfloat16_products_lose_little(given_ridges: tuple[float, float]) -> None:
    """Single coefficients move by some per cent, what they were fitted to hardly."""
    half = Text(**{name: value.bfloat16() for name, value in vars(make_text()).items()})
    wide = Text(**{name: value.float() for name, value in vars(half).items()})
    objective = Penalised.of(wide, given_ridges)
    rounded, exact = (
        statistics_of(*halves(one)).solve(RANK, near=given_ridges)
        for one in (half, wide)
    )
    least = objective(*parts_of(exact))
    assert least < objective(*parts_of(rounded)) < least * 1.005
    assert rounded.left == pytest.approx(exact.left, rel=0.02)


@pytest.mark.parametrize("rank", [0, RANK])
def test_experts_that_are_never_visited_are_left_as_they_are(rank: int) -> None:
    text = make_text(10)
    text.hidden_NM[:, 3:6] = 0
    found = fit(text, rank)
    assert not bool(found.change_MD[3:6].any())
    assert bool(found.change_MD[:3].any()) and 0 < found.left < 1
    text.hidden_NM.zero_()
    nothing = fit(text, rank)
    assert not bool(nothing.change_MD.any())
    for value in parts_of(nothing):
        assert bool(value.isfinite().all())


CONSTANTS = {
    "hidden units": ("hidden_NM", slice(None), 3.3),
    "inputs": ("x_ND", slice(None), 7.7),
    "large hidden units": ("hidden_NM", slice(None), 3333.3),
    "a few large hidden units": ("hidden_NM", slice(4, 7), 1000.7),
    "a large input": ("x_ND", slice(2, 3), 1234.5),
}


@pytest.mark.parametrize("which", CONSTANTS)
@pytest.mark.parametrize("rank", [0, RANK])
def test_what_does_not_vary_takes_no_part(which: str, rank: int) -> None:
    """Large constants cancel when sums are centred; rounding must not decide."""
    name, columns, value = CONSTANTS[which]
    text = make_text(11)
    getattr(text, name)[:, columns] = value
    found = fit(text, rank)
    change_MD, slope_DD, bias_D = parts_of(found)
    made_ND = text.hidden_NM @ change_MD + text.x_ND @ slope_DD + bias_D
    before = text.weight_N @ text.residual_ND.square().sum(dim=1)
    after = text.weight_N @ (text.residual_ND - made_ND).square().sum(dim=1)
    assert float(after) < 0.9 * float(before) and 0 < found.left < 1


def test_inputs_that_vary_little_around_a_large_value_can_be_fitted() -> None:
    text = make_text(12)
    text.x_ND.mul_(1e-3)[:, 3] += 1000
    found = fit(text, RANK)
    for value in parts_of(found):
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("folds", [(0, 1), (0,), (1,)])
def test_one_token_is_met_by_the_bias(folds: tuple[int, ...]) -> None:
    text = make_text()[:1]
    statistics = RepairStatistics(ROWS, WIDTH)
    for fold in folds:
        statistics.add(*vars(text).values(), fold=fold)
    found = statistics.solve(RANK)
    change_MD, slope_DD, bias_D = parts_of(found)
    made_ND = text.hidden_NM @ change_MD + text.x_ND @ slope_DD + bias_D
    assert_close("output", made_ND, text.residual_ND, "logits")


def test_more_columns_than_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search looks at a few projections; the fit is of all columns."""
    text = make_text(13, tokens=2000)
    every = fit(text, RANK)
    monkeypatch.setattr(repairing, "JUDGED_COLUMNS", 4)
    few = fit(text, RANK)
    assert few.change_MD.shape == (ROWS, WIDTH)
    assert 0 < few.left < 1 and few.left != every.left
    objective = Penalised.of(text, few.ridges)
    reached = objective.alternating(RANK, seed=0)
    assert objective(*parts_of(few)) <= reached * (1 + 1e-5)


def test_sums_that_are_not_finite_are_refused() -> None:
    text = make_text()
    text.hidden_NM[5, 5] = math.nan
    with pytest.raises(ModelError, match="not finite; .* experts.repair = false"):
        fit(text, RANK)
