"""The gradient stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.common.errors import ModelError
from samv2.common.settings import DistillSettings
from samv2.experts.moe_layers import WalkOptions
from samv2.models import distillation
from samv2.models.distillation import distill
from samv2.models.distilled_folder import distill_folder
from samv2.models.expert_model import ExpertModel
from samv2.models.logit_scale import split_calibration
from samv2.models.perplexity import score_windows
from samv2.models.save import load_expert_model, save_expert_model
from tests.helpers import assert_close, convert, tiny_settings

KS = ["experts.experts_per_token=2", "experts.other_k=1"]
LEARN = DistillSettings(steps=40, batch_size=4, learning_rate=5e-5)


def make(folder: Path, calibration_BS: Tensor, *overrides: str) -> ExpertModel:
    llama = LlamaForCausalLM.from_pretrained(folder)
    return convert(llama, calibration_BS, [*KS, *overrides]).model


@pytest.fixture
def lesson_BS(tiny_tokens: Tensor) -> Tensor:
    """(64, 64) tokens to learn from; `under_fitted` repairs saw few of them."""
    return tiny_tokens[: 64 * 64].view(64, 64)


@pytest.fixture
def under_fitted(tiny_llama_folder: Path, lesson_BS: Tensor) -> ExpertModel:
    """Repaired on so little text that there is something left to learn."""
    return make(tiny_llama_folder, lesson_BS[::16])


@torch.no_grad()
def logits(model: ExpertModel, tokens_BS: Tensor, k: int) -> Tensor:
    return model(tokens_BS, walk_options=WalkOptions(experts_per_token=k)).logits


@torch.no_grad()
def divergence(model: ExpertModel, teacher: LlamaForCausalLM, ids: Tensor, k: int):
    """KL(dense || converted), the plain way."""
    wanted = torch.log_softmax(teacher(ids).logits.double(), dim=-1)
    found = torch.log_softmax(logits(model, ids, k).double(), dim=-1)
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


def test_what_is_learnt_carries_over_to_other_text(
    under_fitted: ExpertModel,
    tiny_llama: LlamaForCausalLM,
    lesson_BS: Tensor,
    tiny_tokens: Tensor,
) -> None:
    model, other = under_fitted, tiny_tokens[-6400:].view(100, 64)
    before = {k: divergence(model, tiny_llama, other, k) for k in (1, 2)}
    found = distill(model, tiny_llama, lesson_BS, LEARN)
    after = {k: divergence(model, tiny_llama, other, k) for k in (1, 2)}
    assert found.kept
    for k in (1, 2):
        assert after[k] < 0.995 * before[k], k
    assert [k for k, _ in found.losses] == [1, 2] * 20


def test_every_expert_visited_stays_lossless(
    under_fitted: ExpertModel,
    tiny_llama: LlamaForCausalLM,
    lesson_BS: Tensor,
    tiny_batch: Tensor,
) -> None:
    before = logits(under_fitted, tiny_batch, 8)
    assert distill(under_fitted, tiny_llama, lesson_BS, LEARN).kept
    after = logits(under_fitted, tiny_batch, 8)
    assert_close("K = E", after, before, "logits")
    with torch.no_grad():
        assert_close("dense", after, tiny_llama(tiny_batch).logits, "logits")


def test_it_is_judged_by_the_divergence_on_text_that_no_repair_saw(
    under_fitted: ExpertModel, tiny_llama: LlamaForCausalLM, lesson_BS: Tensor
) -> None:
    _, reserved_BS = split_calibration(lesson_BS)
    expected = divergence(under_fitted, tiny_llama, reserved_BS, 2)
    found = distill(
        under_fitted, tiny_llama, lesson_BS, DistillSettings(steps=1, batch_size=2)
    )
    assert found.before[2] == pytest.approx(expected, rel=1e-3)


def test_the_gradient_of_the_divergence_is_right() -> None:
    source = torch.Generator().manual_seed(0)
    rows, wanted = torch.randn(2, 600, 5, generator=source, dtype=torch.double)
    head = torch.randn(9, 5, generator=source, dtype=torch.double)
    rows.requires_grad_(True)
    plain = torch.log_softmax(rows @ head.T, dim=1)
    target = torch.log_softmax(wanted @ head.T, dim=1)
    expected = (target.exp() * (target - plain)).sum() / 600
    found = distillation._HeadDivergence.apply(rows, wanted, head, head)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(3 * found, rows)
    (reference,) = torch.autograd.grad(3 * expected, rows)
    assert_close("gradient", gradient, reference, "fp32")


def test_training_that_does_not_help_is_undone(
    tiny_llama_folder: Path, tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    model = make(tiny_llama_folder, tiny_calibration)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wild = DistillSettings(steps=6, batch_size=2, learning_rate=3.0)
    found = distill(model, tiny_llama, tiny_calibration, wild)
    assert not found.kept and sum(found.after.values()) > sum(found.before.values())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_dtypes_buffers_and_trainable_parameters_are_as_before(
    tiny_llama_folder: Path, tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    model = make(tiny_llama_folder, tiny_calibration)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    distill(model, tiny_llama, tiny_calibration, LEARN)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert {name: value.dtype for name, value in model.state_dict().items()} == dtypes
    assert not any(
        p.grad is not None for p in model.parameters() if not p.requires_grad
    )
    for layer in model.expert_layers:
        assert not bool(layer.adapter_gate_EFR.any())


def test_the_same_seed_learns_the_same_bits(
    tiny_llama_folder: Path, tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    made = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        model = make(tiny_llama_folder, tiny_calibration)
        seen: list[tuple[int, int]] = []
        settings = DistillSettings(steps=3, batch_size=2, learning_rate=1e-4)
        distill(
            model,
            tiny_llama,
            tiny_calibration,
            settings,
            seed=5,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert seen == [(1, 3), (2, 3), (3, 3)]
        made.append(model.state_dict())
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name]), name


def test_a_model_without_repairs_is_refused(
    tiny_llama_folder: Path, tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    model = make(tiny_llama_folder, tiny_calibration, "experts.repair=false")
    with pytest.raises(ModelError, match="has none; bootstrap with"):
        distill(model, tiny_llama, tiny_calibration, LEARN)


def test_a_single_sequence_is_refused(
    tiny_llama_folder: Path, tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    model = make(tiny_llama_folder, tiny_calibration)
    with pytest.raises(ModelError, match="one calibration sequence"):
        distill(model, tiny_llama, tiny_calibration[:1], LEARN)


def test_a_folder_is_replaced_by_what_it_learnt(
    under_fitted: ExpertModel,
    tiny_llama_folder: Path,
    lesson_BS: Tensor,
    tiny_batch: Tensor,
    tmp_path,
    tiny_tokenizer,
) -> None:
    model, folder = under_fitted, tmp_path / "experts"
    save_expert_model(model, tiny_tokenizer, folder)
    settings = tiny_settings("distill.steps=40", "distill.learning_rate=5e-5")
    found, scores = distill_folder(
        folder, tiny_llama_folder, lesson_BS, {"held": tiny_batch}, settings
    )
    assert found.kept and sorted(scores) == [1, 2]
    loaded, _ = load_expert_model(folder)
    options = WalkOptions(experts_per_token=2)
    assert scores[2]["held"].nll == pytest.approx(
        score_windows(loaded, tiny_batch, walk_options=options).nll, rel=1e-5
    )
    assert not torch.equal(logits(loaded, tiny_batch, 2), logits(model, tiny_batch, 2))
