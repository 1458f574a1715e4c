"""One layer's survey and repair, against plain sums over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import LlamaForCausalLM

from samv2.experts.calibration import RIDGE
from samv2.experts.moe_layers import ExpertGraphMLP, WalkOptions
from samv2.experts.repair import Repair, RepairFit, RepairStatistics
from samv2.models import convert_layer
from samv2.models.bootstrap import initial_config
from samv2.models.convert_layer import (
    Surveyed,
    build_layer,
    fit_repair,
    split_experts,
    survey_layer,
)
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.text_stream import LlamaLayers, TextStream
from tests.helpers import assert_close, randn, tiny_settings

EXPERTS, LAYER = 8, 1
SETTINGS = tiny_settings("experts.other_k=2")


@pytest.fixture
def config() -> ExpertModelConfig:
    return initial_config((LAYER,), SETTINGS)


@pytest.fixture
def middle(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> Iterator[tuple[torch.nn.Module, Tensor, Tensor]]:
    """The trained model's layer 1: its FFN, inputs and the stream around it."""
    source = LlamaLayers(tiny_llama)
    with torch.no_grad():
        stream = TextStream(source.embed(tiny_calibration), source.attention_inputs(64))
        for index in range(LAYER):
            layer = source.layer(index)
            stream.advance(*stream.attend(layer, index), layer.mlp)
        x_BSD, after_BSD = stream.attend(source.layer(LAYER), LAYER)
        yield source.layer(LAYER).mlp, x_BSD, after_BSD


Middle = tuple[torch.nn.Module, Tensor, Tensor]


def surveyed_of(middle: Middle, config: ExpertModelConfig) -> Surveyed:
    mlp, x_BSD, after_BSD = middle
    return survey_layer(
        0, mlp, x_BSD.flatten(0, 1), after_BSD.flatten(0, 1), config, SETTINGS
    )


def layer_of(
    middle: Middle, config: ExpertModelConfig, visits: dict[int, int] | None = None
) -> ExpertGraphMLP:
    surveyed = surveyed_of(middle, config)
    return build_layer(0, middle[0], surveyed, visits or {}, config)


@torch.no_grad()
def output_of(layer: ExpertGraphMLP, x_BSD: Tensor, k: int) -> Tensor:
    return layer(x_BSD, WalkOptions(experts_per_token=k, use_assembler=False))[0]


def test_experts_own_the_rows_of_the_order() -> None:
    gate_MD, up_MD, down_DM = (
        randn(6, 3, seed=0),
        randn(6, 3, seed=1),
        randn(3, 6, seed=2),
    )
    order_M = torch.tensor([4, 0, 3, 1, 5, 2])
    weights = split_experts(gate_MD, up_MD, down_DM, order_M, 3)
    for expert in range(3):
        for row in range(2):
            owned = int(order_M[2 * expert + row])
            assert torch.equal(weights.gate_EFD[expert, row], gate_MD[owned])
            assert torch.equal(weights.up_EFD[expert, row], up_MD[owned])
            assert torch.equal(weights.down_EFD[expert, row], down_DM[:, owned])
    assert all(part.is_contiguous() for part in weights.tensors)


def test_the_built_layer_is_the_dense_one_with_all_experts(
    middle: Middle, config: ExpertModelConfig
) -> None:
    mlp, x_BSD, _ = middle
    layer = layer_of(middle, config, {4: 5, 2: 1})
    assert_close("y", output_of(layer, x_BSD, EXPERTS), mlp(x_BSD), "fp32")
    assert layer.visits == {4: 5, 2: 1} and layer.repaired == ()
    assert sorted(surveyed_of(middle, config).order_M.tolist()) == list(range(128))


def test_the_curve_is_what_linear_stand_ins_leave_of_the_lost_experts(
    middle: Middle, config: ExpertModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 over all outputs; random projections see their energy up to noise."""
    monkeypatch.setattr(convert_layer, "PROJECTIONS", 4096)
    mlp, x_BSD, after_BSD = middle
    curve = surveyed_of(middle, config).curve
    layer = layer_of(middle, config)
    assert curve.visits == (1, 2, 3, 4, 5, 6, 7, 8)
    assert curve.errors[-1] == 0 and min(curve.errors) == 0
    assert sorted(curve.errors, reverse=True) == list(curve.errors)
    x_ND = x_BSD.flatten(0, 1)
    dense_ND = mlp(x_ND)
    weight_N1 = (after_BSD.flatten(0, 1) + dense_ND).double().norm(dim=1).pow(-2)
    level = float(weight_N1.mean())
    weight_N1 = (weight_N1 / level).unsqueeze(1)
    centred_ND = x_ND.double() - (weight_N1 * x_ND).mean(dim=0)
    penalty = RIDGE * float((weight_N1 * centred_ND.square()).sum()) / x_ND.shape[1]
    hidden_NM = silu(x_ND @ layer.gate_EFD.flatten(0, 1).T)
    hidden_NM = hidden_NM * (x_ND @ layer.up_EFD.flatten(0, 1).T)
    for k in (1, 4, 7):
        absent_NE = ~layer.visited(x_ND, k)
        lost_NM = hidden_NM * absent_NE.repeat_interleave(16, dim=1)
        lost_ND = (lost_NM @ layer.down_EFD.flatten(0, 1)).double()
        lost_ND = lost_ND - (weight_N1 * lost_ND).mean(dim=0)
        design = torch.cat(
            [centred_ND * weight_N1.sqrt(), penalty**0.5 * torch.eye(64).double()]
        )
        target = torch.cat([lost_ND * weight_N1.sqrt(), torch.zeros(64, 64).double()])
        solution = torch.linalg.lstsq(design, target, driver="gelsd").solution
        left = float((target - design @ solution).square().sum())
        assert curve.at(k) == pytest.approx(left / len(x_ND) * level, rel=0.05)


def test_fewer_projections_see_about_the_same(
    middle: Middle, config: ExpertModelConfig
) -> None:
    found = surveyed_of(middle, config).curve
    again = surveyed_of(middle, replace(config, seed=1)).curve
    for k in (1, 4):
        assert found.at(k) == pytest.approx(again.at(k), rel=0.4)


def fitted(
    layer: ExpertGraphMLP, k: int, *streams: Tensor, rank: int
) -> tuple[Repair, RepairFit]:
    fit, _ = fit_repair(layer, k, *streams, rank=rank)
    return layer.repair(k), fit


@pytest.mark.parametrize("k", [2, 4])
def test_a_repair_is_fitted_to_the_dense_stream(
    middle: Middle, config: ExpertModelConfig, k: int
) -> None:
    """From sums over all tokens at once; every second sequence judges the penalties."""
    mlp, x_BSD, after_BSD = middle
    layer = layer_of(middle, config)
    # As if layers before had lost something: other inputs, and more to be repaired.
    dense_BSD = after_BSD + mlp(x_BSD)
    x_BSD = x_BSD + 0.1 * randn(*x_BSD.shape, seed=1)
    after_BSD = after_BSD + 0.1 * randn(*x_BSD.shape, seed=2)
    repair, fit = fitted(layer, k, x_BSD, after_BSD, dense_BSD, rank=4)
    statistics = RepairStatistics(128, 64)
    for fold in (0, 1):
        x_ND = x_BSD[fold::2].flatten(0, 1)
        hidden_NM = silu(x_ND @ layer.gate_EFD.flatten(0, 1).T)
        hidden_NM = hidden_NM * (x_ND @ layer.up_EFD.flatten(0, 1).T)
        visited_NE = layer.visited(x_ND, k)
        assert bool((visited_NE.sum(dim=1) == k).all())
        for expert in range(EXPERTS):
            rows = slice(16 * expert, 16 * expert + 16)
            hidden_NM[:, rows] *= visited_NE[:, expert : expert + 1]
        made_ND = after_BSD[fold::2].flatten(0, 1)
        made_ND = made_ND + hidden_NM @ layer.down_EFD.flatten(0, 1)
        residual_ND = dense_BSD[fold::2].flatten(0, 1) - made_ND
        size_N = dense_BSD[fold::2].flatten(0, 1).norm(dim=1)
        weight_N = 1 / (size_N * residual_ND.norm(dim=1))
        statistics.add(hidden_NM, x_ND, residual_ND, weight_N, fold=fold)
    expected = statistics.solve(4)
    assert fit.ridges == expected.ridges
    assert fit.left == pytest.approx(expected.left, rel=1e-3)
    change_MD = (repair.down_EFD - layer.down_EFD).flatten(0, 1)
    assert_close("D", change_MD, expected.change_MD, "logits")
    slope_DD = repair.in_QD.T @ repair.out_QD
    assert_close("B", slope_DD, expected.in_QD.T @ expected.out_QD, "logits")
    assert_close("b", repair.bias_D, expected.bias_D, "logits")


@pytest.mark.parametrize("k", [2, 4, 7])
def test_the_stream_goes_through_the_repaired_layer(
    middle: Middle, config: ExpertModelConfig, k: int
) -> None:
    """Sequences that were not fitted to as well."""
    mlp, x_BSD, after_BSD = middle
    layer = layer_of(middle, config)
    dense_BSD = after_BSD + mlp(x_BSD)
    _, stream_BSD = fit_repair(layer, k, x_BSD, after_BSD, dense_BSD[:12], rank=4)
    expected_BSD = after_BSD + output_of(layer, x_BSD, k)
    assert_close("stream", stream_BSD, expected_BSD, "logits")
    other = layer_of(middle, config)
    fit_repair(other, k, x_BSD[:12], after_BSD[:12], dense_BSD[:12], rank=4)
    assert torch.equal(layer.repair(k).down_EFD, other.repair(k).down_EFD)


@pytest.mark.parametrize("k", [2, 4])
def test_a_repaired_layer_is_closer_to_the_dense_stream(
    middle: Middle, config: ExpertModelConfig, k: int
) -> None:
    """On sequences that it was not fitted to, by the share that the fit promises."""
    mlp, x_BSD, after_BSD = middle
    layer = layer_of(middle, config)
    dense_BSD = after_BSD + mlp(x_BSD)

    def gap() -> Tensor:
        return (after_BSD + output_of(layer, x_BSD, k) - dense_BSD)[12:].norm(dim=2)

    def error(gap_BS: Tensor) -> float:
        weight_BS = 1 / (dense_BSD[12:].norm(dim=2) * bare_BS)
        return float((weight_BS * gap_BS.square()).mean())

    with_surrogates_BS = gap()
    layer.surrogate_shared_QD = None
    bare_BS = gap()
    before, bare = error(with_surrogates_BS), error(bare_BS)
    _, fit = fitted(layer, k, x_BSD[:12], after_BSD[:12], dense_BSD[:12], rank=4)
    after = error(gap())
    assert after < before < bare
    assert after / bare == pytest.approx(fit.left, rel=0.3)


def test_a_layer_that_visits_all_experts_gets_no_stand_in(
    middle: Middle, config: ExpertModelConfig
) -> None:
    mlp, x_BSD, after_BSD = middle
    layer = layer_of(middle, config, {4: EXPERTS})
    dense_BSD = after_BSD + mlp(x_BSD)
    repair, _ = fitted(layer, 4, x_BSD, after_BSD, dense_BSD, rank=4)
    assert repair.in_QD.shape == repair.out_QD.shape == (0, 64)
    # Nothing is lost, so nothing is changed.
    assert_close("D", repair.down_EFD, layer.down_EFD, "logits")
    assert_close("y", output_of(layer, x_BSD, 4), mlp(x_BSD), "logits")


def test_one_sequence_is_fitted_and_judged_by_itself(
    middle: Middle, config: ExpertModelConfig
) -> None:
    mlp, x_BSD, after_BSD = (
        part[:1] if isinstance(part, Tensor) else part for part in middle
    )
    layer = layer_of(middle, config)
    dense_BSD = after_BSD + mlp(x_BSD)
    before = output_of(layer, x_BSD, 4)
    repair, fit = fitted(layer, 4, x_BSD, after_BSD, dense_BSD, rank=2)
    assert all(bool(value.isfinite().all()) for value in vars(repair).values())
    target_BSD = mlp(x_BSD)
    after = float((output_of(layer, x_BSD, 4) - target_BSD).norm())
    assert after < 0.5 * float((before - target_BSD).norm()) and 0 <= fit.left < 0.5


def test_bfloat16_layers_get_bfloat16_repairs(
    middle: Middle, config: ExpertModelConfig
) -> None:
    mlp, x_BSD, after_BSD = middle
    dense_BSD = after_BSD + mlp(x_BSD)
    exact, _ = fitted(layer_of(middle, config), 4, x_BSD, after_BSD, dense_BSD, rank=4)
    half = layer_of(middle, config)
    for name in ("gate_EFD", "up_EFD", "down_EFD"):
        setattr(half, name, getattr(half, name).bfloat16())
    streams = (part.bfloat16() for part in (x_BSD, after_BSD, dense_BSD))
    repair, _ = fitted(half, 4, *streams, rank=4)
    for name in ("down_EFD", "in_QD", "out_QD"):
        assert getattr(repair, name).dtype == torch.bfloat16, name
    assert repair.bias_D.dtype == torch.float32
    change = (repair.down_EFD.float() - exact.down_EFD).norm() / exact.down_EFD.norm()
    assert float(change) < 0.1


@pytest.mark.parametrize("sequences", [2, 3, 16, 63, 64, 200, 1000])
def test_halves_are_even_and_keep_neighbours_together(sequences: int) -> None:
    first, second = (rows.tolist() for rows in convert_layer._folds(sequences))
    assert sorted(first + second) == list(range(sequences))
    run = max(1, sequences // 32)
    assert abs(len(first) - len(second)) <= run
    switches = sum((row in first) != (row + 1 in first) for row in range(sequences - 1))
    assert switches <= 65
    assert convert_layer._folds(1)[0].tolist() == convert_layer._folds(1)[1].tolist()
