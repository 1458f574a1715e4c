"""Next-token loss and perplexity, for dense and expert models alike.

Logits over the vocabulary are made a few rows at a time, never for a whole batch.

Shapes: B windows, S tokens a window, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from samv2.experts.moe_layers import WalkOptions
from samv2.models.expert_model import ExpertModel

ROWS_PER_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Score:
    """Summed negative log-likelihood (nats) of a number of predicted tokens."""

    nll: float
    tokens: int

    def __add__(self, other: Score) -> Score:
        return Score(nll=self.nll + other.nll, tokens=self.tokens + other.tokens)

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); infinite where that overflows or nothing was scored."""
        if self.tokens == 0:
            return math.inf
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def next_token_loss(
    model: ExpertModel | PreTrainedModel,
    tokens_BS: Tensor,
    walk_options: WalkOptions | None = None,
) -> Tensor:
    """Mean next-token cross-entropy in nats, float32 scalar.

    Differentiable in everything below the head; the head itself counts as frozen.

    Args:
        model: expert or dense causal LM.
        tokens_BS: (B, S) int64, S >= 2; every position predicts the next. It is brought
            to the model's device.
        walk_options: choices for the expert graphs.
    """
    tokens_BS = tokens_BS.to(model.device)
    if isinstance(model, ExpertModel):
        hidden_BSD = model.hidden_states(tokens_BS, walk_options)
        head = model.llama.lm_head
    else:
        output = model.model(input_ids=tokens_BS, use_cache=False)
        hidden_BSD, head = output.last_hidden_state, model.lm_head
    rows_ND = hidden_BSD[:, :-1].flatten(0, 1)
    targets_N = tokens_BS[:, 1:].flatten()
    return _FrozenHeadLoss.apply(rows_ND, head.weight, targets_N)


class _FrozenHeadLoss(torch.autograd.Function):
    """Mean cross-entropy of rows @ head', a chunk at a time.

    The head is frozen, so the gradient of the rows, (softmax - onehot) @ head, is made
    on the way forward: logits are neither stored nor computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor
    ) -> Tensor:
        total = rows_ND.new_zeros((), dtype=torch.float32)
        gradients = []
        for rows, targets in zip(
            rows_ND.split(ROWS_PER_CHUNK), targets_N.split(ROWS_PER_CHUNK)
        ):
            log_share = torch.log_softmax((rows @ head_VD.T).float(), dim=1)
            total -= log_share.gather(1, targets.unsqueeze(1)).sum()
            if ctx.needs_input_grad[0]:
                share = log_share.exp_()
                row = torch.arange(len(targets), device=targets.device)
                share[row, targets] -= 1
                gradients.append(share.to(head_VD.dtype) @ head_VD)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients) / len(targets_N))
        return total / len(targets_N)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream.to(gradient_ND.dtype), None, None


@torch.no_grad()
def last_states(model: PreTrainedModel, tokens_BS: Tensor) -> Tensor:
    """A dense model's last hidden states, (B, S, D), behind its final norm."""
    parts = [
        model.model(input_ids=part_BS, use_cache=False)[0]
        for part_BS in tokens_BS.split(4)
    ]
    return torch.cat(parts)


@torch.no_grad()
def score_hidden(hidden_NSD: Tensor, head_VD: Tensor, tokens_NS: Tensor) -> Score:
    """Score windows by their last hidden states.

    Args:
        hidden_NSD: (N, S, D) behind the final norm.
        head_VD: (V, D).
        tokens_NS: (N, S) int64; the first of each window is not predicted.
    """
    rows_ND = hidden_NSD[:, :-1].flatten(0, 1)
    targets_N = tokens_NS[:, 1:].flatten()
    if not len(targets_N):
        return Score(nll=0.0, tokens=0)
    loss = _FrozenHeadLoss.apply(rows_ND, head_VD, targets_N)
    return Score(nll=float(loss) * len(targets_N), tokens=len(targets_N))


@torch.no_grad()
def score_windows(
    model: ExpertModel | PreTrainedModel,
    windows_NS: Tensor,
    *,
    batch_size: int = 4,
    walk_options: WalkOptions | None = None,
) -> Score:
    """Score (N, S) windows of held-out text; the first token of each is not predicted."""
    score = Score(nll=0.0, tokens=0)
    for batch_BS in windows_NS.split(batch_size):
        count = batch_BS[:, 1:].numel()
        loss = next_token_loss(model, batch_BS, walk_options)
        score = score + Score(nll=float(loss) * count, tokens=count)
    return score
