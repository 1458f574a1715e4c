"""Factors along gradients: what they span, that nothing else changes, and saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.common.errors import ConfigError, ModelError
from samv2.experts.moe_layers import WalkOptions
from samv2.models.expert_model import ExpertModel
from samv2.models.gradient_factors import FACTORS, factor_tensors, fit_factors
from samv2.models.perplexity import next_token_loss
from samv2.models.save import expert_fingerprint, load_expert_model, save_expert_model
from samv2.models.trainables import with_trainables
from tests.helpers import assert_close, convert, logits_of, tiny_settings


def whole(llama: LlamaForCausalLM, calibration: Tensor) -> ExpertModel:
    """The tiny model at K = E, one batch of calibration text."""
    overrides = ["experts.experts_per_token=8", "experts.num_shared=0"]
    return convert(llama, calibration, overrides).model


def test_factors_are_the_leading_directions_of_the_dense_gradients(
    tiny_llama: LlamaForCausalLM,
    tiny_llama_folder: Path,
    tiny_calibration: Tensor,
) -> None:
    model = whole(tiny_llama, tiny_calibration)
    fit_factors(model, tiny_calibration[:4])
    dense = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    next_token_loss(dense, tiny_calibration[:4]).backward()
    for layer, decoder in zip(model.expert_layers, dense.model.layers):
        mlp = decoder.mlp
        for factor_RD, grad in (
            (layer.factor_gate_RD, mlp.gate_proj.weight.grad),
            (layer.factor_up_RD, mlp.up_proj.weight.grad),
            (layer.factor_down_DR.T, mlp.down_proj.weight.grad.T),
        ):
            assert_close("rows", factor_RD @ factor_RD.T, torch.eye(4), "fp32")
            strengths = torch.linalg.svdvals(grad.double())
            caught = (grad.double() @ factor_RD.double().T).square().sum()
            assert float(caught / strengths[:4].square().sum()) > 0.999


def test_fitting_changes_no_logit_and_no_parameter(
    tiny_expert_model: ExpertModel, tiny_calibration: Tensor, tiny_batch: Tensor
) -> None:
    model = tiny_expert_model
    before, blocks = logits_of(model, tiny_batch), model.read_blocks()
    asked = {name for name, part in model.named_parameters() if part.requires_grad}
    calls: list[tuple[int, int]] = []
    fit_factors(
        model,
        tiny_calibration,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert torch.equal(logits_of(model, tiny_batch), before)
    after = model.read_blocks()
    assert all(torch.equal(after[key], blocks[key]) for key in blocks)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == asked
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_they_catch_more_of_new_text_than_random_ones(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor, tiny_batch: Tensor
) -> None:
    model = whole(tiny_llama, tiny_calibration)

    def reach() -> float:
        """The squared gradient of all adapter rows on held-out text."""
        model.freeze_base()
        model.zero_grad()
        next_token_loss(model, tiny_batch, WalkOptions(use_assembler=False)).backward()
        parts = ("adapter_gate_EFR", "adapter_up_EFR", "adapter_down_ERF")
        return sum(
            float(getattr(layer, name).grad.square().sum())
            for layer in model.expert_layers
            for name in parts
        )

    random = reach()
    fit_factors(model, tiny_calibration)
    assert reach() > 2 * random


def test_saving_keeps_fitted_factors(
    tiny_expert_model: ExpertModel,
    tiny_calibration: Tensor,
    tiny_tokenizer,
    tmp_path: Path,
) -> None:
    model = tiny_expert_model
    assert factor_tensors(model) == {}
    plain = expert_fingerprint(model)
    fit_factors(model, tiny_calibration)
    assert expert_fingerprint(model) != plain
    assert len(factor_tensors(model)) == 3 * len(FACTORS)
    save_expert_model(model, tiny_tokenizer, tmp_path / "model")
    loaded, _ = load_expert_model(tmp_path / "model")
    assert loaded.expert_config.factors == "gradient"
    assert expert_fingerprint(loaded) == expert_fingerprint(model)
    for left, right in zip(model.expert_layers, loaded.expert_layers):
        for name in FACTORS:
            assert torch.equal(getattr(left, name), getattr(right, name))


def test_other_trainables_keep_fitted_factors(
    tiny_expert_model: ExpertModel, tiny_calibration: Tensor
) -> None:
    fit_factors(tiny_expert_model, tiny_calibration)
    kept = tiny_expert_model.expert_layers[1].factor_up_RD.clone()
    values = dict(adapter_scale=1.0, siblings=2, assembler_width=0, prefix_tokens=8)
    with pytest.raises(ModelError, match="fitted for 4; convert again"):
        with_trainables(tiny_expert_model, adapter_rank=3, **values)
    made = with_trainables(tiny_expert_model, adapter_rank=4, **values)
    assert torch.equal(made.expert_layers[1].factor_up_RD, kept)
    assert made.expert_layers[1].scale == 1.0


def test_four_bit_blocks_are_refused(
    tiny_expert_model: ExpertModel, tiny_calibration: Tensor
) -> None:
    for layer in tiny_expert_model.expert_layers:
        layer.quantise()
    with pytest.raises(ModelError, match="expert blocks are NF4"):
        fit_factors(tiny_expert_model, tiny_calibration)
    with pytest.raises(ConfigError, match="4-bit blocks have no gradient"):
        tiny_settings("adapter.factors=gradient", "experts.quantise=nf4")
