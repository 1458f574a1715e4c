"""Loss and perplexity against cross-entropy written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from samv2.models import perplexity
from samv2.models.expert_model import ExpertModel
from samv2.models.perplexity import Score, next_token_loss, score_windows
from tests.helpers import assert_close


def direct_loss(model: ExpertModel | LlamaForCausalLM, tokens_BS: Tensor) -> Tensor:
    """All logits at once."""
    logits = model(tokens_BS).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())


@pytest.mark.parametrize("rows", [1, 7, 39, 1000])
def test_loss_is_the_cross_entropy_for_any_chunk(
    tiny_llama: LlamaForCausalLM,
    tiny_expert_model: ExpertModel,
    tiny_batch: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    monkeypatch.setattr(perplexity, "ROWS_PER_CHUNK", rows)
    for model in (tiny_llama, tiny_expert_model):
        expected = direct_loss(model, tiny_batch)
        assert_close("loss", next_token_loss(model, tiny_batch), expected, "fp32")


def test_gradient_through_checkpointed_chunks_is_the_direct_one(
    tiny_expert_model: ExpertModel,
    tiny_batch: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perplexity, "ROWS_PER_CHUNK", 17)
    chosen = tiny_expert_model.trainable_parameters()
    grads = []
    for loss in (next_token_loss, direct_loss):
        found = torch.autograd.grad(
            loss(tiny_expert_model, tiny_batch), chosen, allow_unused=True
        )
        grads.append([g for g in found if g is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert any(bool(grad.any()) for grad in grads[0])
    for index, (chunked, direct) in enumerate(zip(*grads)):
        assert_close(f"gradient {index}", chunked, direct, "logits")


def test_score_sums_over_batches_of_any_size(
    tiny_llama: LlamaForCausalLM, tiny_batch: Tensor
) -> None:
    expected = float(direct_loss(tiny_llama, tiny_batch).detach()) * 4 * 39
    for size in (1, 3, 4, 9):
        score = score_windows(tiny_llama, tiny_batch, batch_size=size)
        assert score.tokens == 4 * 39
        assert score.nll == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected / (4 * 39)), rel=1e-5)


def test_scores_add_up() -> None:
    both = Score(nll=2.0, tokens=1) + Score(nll=1.0, tokens=2)
    assert both == Score(nll=3.0, tokens=3)
    assert both.perplexity == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("nll", "tokens"), [(0.0, 0), (1e9, 1), (math.nan, 3), (math.inf, 3)]
)
def test_perplexity_without_a_value_is_infinite(nll: float, tokens: int) -> None:
    assert Score(nll=nll, tokens=tokens).perplexity == math.inf
