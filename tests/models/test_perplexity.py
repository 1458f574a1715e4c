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
from samv2.models.perplexity import (
    Score,
    last_states,
    next_token_loss,
    score_hidden,
    score_windows,
)
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


@pytest.mark.parametrize("rows", [7, 256])
def test_hidden_states_score_as_their_windows(
    tiny_llama: LlamaForCausalLM,
    tiny_batch: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    monkeypatch.setattr(perplexity, "ROWS_PER_CHUNK", rows)
    with torch.no_grad():
        hidden_NSD = tiny_llama.model(tiny_batch).last_hidden_state
    head_VD = tiny_llama.lm_head.weight
    found = score_hidden(hidden_NSD, head_VD, tiny_batch)
    expected = score_windows(tiny_llama, tiny_batch)
    assert found.tokens == expected.tokens == 4 * 39
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    logits = (hidden_NSD[:, :-1] @ head_VD.T).flatten(0, 1)
    direct = cross_entropy(logits, tiny_batch[:, 1:].flatten(), reduction="sum")
    assert found.nll == pytest.approx(direct.item(), rel=1e-5)
    parts = (
        score_hidden(hidden_NSD[i : i + 1], head_VD, tiny_batch[i : i + 1])
        for i in range(4)
    )
    assert sum((part.nll for part in parts)) == pytest.approx(found.nll, rel=1e-5)
    half = score_hidden(hidden_NSD.bfloat16(), head_VD.bfloat16(), tiny_batch)
    assert half.nll == pytest.approx(found.nll, rel=1e-2)


@pytest.mark.parametrize("windows, length", [(0, 40), (3, 1)])
def test_nothing_to_predict_scores_nothing(windows: int, length: int) -> None:
    hidden_NSD = torch.zeros(windows, length, 8)
    tokens_NS = torch.zeros(windows, length, dtype=torch.long)
    found = score_hidden(hidden_NSD, torch.ones(5, 8), tokens_NS)
    assert found == Score(nll=0.0, tokens=0) and found.perplexity == math.inf


def test_scores_add_up() -> None:
    both = Score(nll=2.0, tokens=1) + Score(nll=1.0, tokens=2)
    assert both == Score(nll=3.0, tokens=3)
    assert both.perplexity == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("nll", "tokens"), [(0.0, 0), (1e9, 1), (math.nan, 3), (math.inf, 3)]
)
def test_perplexity_without_a_value_is_infinite(nll: float, tokens: int) -> None:
    assert Score(nll=nll, tokens=tokens).perplexity == math.inf


def test_last_states_times_the_head_are_the_logits(
    tiny_llama: LlamaForCausalLM, tiny_batch: Tensor
) -> None:
    found = last_states(tiny_llama, tiny_batch) @ tiny_llama.lm_head.weight.T
    with torch.no_grad():
        assert_close("logits", found.detach(), tiny_llama(tiny_batch).logits, "logits")
