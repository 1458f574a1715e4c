"""One factor on a repaired model's logits: the minimum of a divergence written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.experts.moe_layers import WalkOptions
from samv2.models import logit_scale
from samv2.models.expert_model import ExpertModel
from samv2.models.logit_scale import fit_logit_scale, scaled, split_calibration
from samv2.models.perplexity import last_states, next_token_loss
from tests.helpers import assert_close, convert, randn

HEAD_VD = randn(50, 8, seed=1)
AT_TWO = WalkOptions(experts_per_token=2, use_assembler=False)


def divergence(hidden_BSD: Tensor, dense_BSD: Tensor, scale: float) -> float:
    found = torch.log_softmax(scale * hidden_BSD @ HEAD_VD.T, dim=2)
    wanted = torch.softmax(dense_BSD @ HEAD_VD.T, dim=2)
    return float(-(wanted * found).sum(dim=2).mean())


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("noise", [0.3, 1.5])
def test_no_other_factor_is_better(
    rows: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_scale, "ROWS_AT_ONCE", rows)
    dense_BSD = randn(3, 11, 8, seed=2)
    hidden_BSD = 1.1 * dense_BSD + noise * randn(3, 11, 8, seed=3)
    found = fit_logit_scale(hidden_BSD, dense_BSD, HEAD_VD)
    least = divergence(hidden_BSD, dense_BSD, found)
    grid = [found * factor for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0)]
    assert all(divergence(hidden_BSD, dense_BSD, other) > least for other in grid)
    assert 0.2 < found < 1


@pytest.mark.parametrize(
    "scale, expected", [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5), (0.01, 2.0), (-1, 0.2)]
)
def test_a_scaled_model_is_scaled_back_within_bounds(
    scale: float, expected: float
) -> None:
    dense_BSD = randn(2, 9, 8, seed=0)
    found = fit_logit_scale(scale * dense_BSD, dense_BSD, HEAD_VD)
    assert found == pytest.approx(expected, rel=2e-3)


def test_without_text_or_finite_states_nothing_is_scaled() -> None:
    states_BSD = randn(2, 3, 8, seed=0)
    assert fit_logit_scale(states_BSD[:0], states_BSD[:0], HEAD_VD) == 1
    broken_BSD = states_BSD.clone()
    broken_BSD[0, 0, 0] = torch.inf
    assert fit_logit_scale(broken_BSD, states_BSD, HEAD_VD) == 1
    assert fit_logit_scale(states_BSD, broken_BSD, HEAD_VD) == 1


@pytest.mark.parametrize(
    "count, reserved",
    [(0, []), (1, []), (2, [1]), (16, [8]), (31, [15]), (32, [8, 24]), (96, None)],
)
def test_reserved_text_is_evenly_spaced(count: int, reserved: list[int] | None) -> None:
    tokens_BS = torch.arange(count).unsqueeze(1)
    fitted_BS, found_BS = split_calibration(tokens_BS)
    if reserved is None:
        reserved = [8 + 16 * place for place in range(6)]
    assert found_BS.flatten().tolist() == reserved
    assert sorted([*fitted_BS.flatten().tolist(), *reserved]) == list(range(count))


def test_scaling_by_one_touches_nothing() -> None:
    states = randn(2, 3, seed=0)
    assert scaled(states, 1.0) is states
    assert torch.equal(scaled(states, 0.5), states / 2)


def test_a_repaired_model_gets_its_factors_from_reserved_text(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor, tiny_llama_folder
) -> None:
    model = convert(tiny_llama, tiny_calibration, ["experts.other_k=2"]).model
    scales = dict(zip(model.expert_config.repaired, model.expert_config.logit_scales))
    assert set(scales) == {2, 4} and scales[2] < scales[4] < 1
    assert model.expert_config.logit_scale(8) == 1
    dense = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()
    _, reserved_BS = split_calibration(tiny_calibration)
    model.fit_logit_scales(reserved_BS, last_states(dense, reserved_BS))
    again = dict(zip(model.expert_config.repaired, model.expert_config.logit_scales))
    assert again == pytest.approx(scales, rel=1e-3)


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor) -> ExpertModel:
    return convert(tiny_llama, tiny_calibration, ["experts.other_k=2"]).model


@torch.no_grad()
def test_logits_loss_and_states_are_of_the_scaled_model(
    model: ExpertModel, tiny_batch: Tensor
) -> None:
    scale = model.expert_config.logit_scale(2)
    plain = model.llama(
        input_ids=tiny_batch, use_cache=False, walk_options=AT_TWO
    ).logits
    output = model(tiny_batch, labels=tiny_batch, walk_options=AT_TWO)
    assert_close("logits", output.logits, scale * plain, "fp32")
    expected = next_token_loss(model, tiny_batch, AT_TWO)
    assert_close("loss", output.loss, expected, "fp32")
    states = model.hidden_states(tiny_batch, AT_TWO)
    assert_close("states", states @ model.llama.lm_head.weight.T, output.logits, "fp32")
    unscaled = model(tiny_batch, walk_options=WalkOptions(experts_per_token=8)).logits
    whole = model.llama(
        input_ids=tiny_batch,
        use_cache=False,
        walk_options=WalkOptions(experts_per_token=8),
    ).logits
    assert torch.equal(unscaled, whole)


def test_sampling_is_from_the_scaled_distribution(
    model: ExpertModel, tiny_batch: Tensor
) -> None:
    """The scores that a sample is drawn from are the model's own logits."""
    model.set_experts_per_token(2)
    made = model.generate(
        tiny_batch[:1],
        max_new_tokens=1,
        do_sample=True,
        top_k=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        logits = model(tiny_batch[:1]).logits[:, -1]
    assert_close("scores", made.scores[0], logits, "logits")
