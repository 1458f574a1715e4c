"""The light gradient stage: an expert graph learns from the dense model it was made of.

It starts from the closed form. Trained are, for every repaired K, the repairs (down
projections, linear stand-ins, biases) and, common to all K, the gates; K = E visits all
experts with untouched weights and stays lossless. The loss is
KL(dense || converted) of the next-token distributions (Hinton et al. 2015) on the
calibration text; K takes turns from step to step. AdamW with warm-up and cosine decay;
weights are trained in float32 and rounded back at the end. It is judged by the
sequences that the repairs did not see either (`reserved_rows`): if the loss on them did
not fall, everything is put back as it was.

Shapes: B sequences, S positions, N rows, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from samv2.common.errors import ModelError
from samv2.common.settings import DistillSettings
from samv2.experts.moe_layers import ExpertGraphMLP, WalkOptions
from samv2.experts.repair import Repair, repair_name
from samv2.models.expert_model import ExpertModel
from samv2.models.logit_scale import reserved_rows
from samv2.models.perplexity import ROWS_PER_CHUNK, last_states

GATE_SHARE = 4.0
"""Relative to their size, gates learn so much faster than repairs. Their size depends on
what they were fitted to: logarithms of norms have far smaller gates than norms."""
WARM_UP, LAST_RATE = 0.05, 0.05
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What the gradient stage did."""

    losses: tuple[tuple[int, float], ...]
    """(K, KL in nats a token) of every step, before its update."""
    before: dict[int, float]
    """By K: KL on the sequences that were kept from training."""
    after: dict[int, float]
    """The same afterwards."""
    kept: bool
    """Whether the training was kept: its mean KL is lower than before."""


def distill(
    model: ExpertModel,
    teacher: PreTrainedModel,
    calibration_BS: Tensor,
    settings: DistillSettings,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Distilled:
    """Train repairs and gates in place.

    Args:
        model: with at least one repaired K; its trained gates are float32, its repairs
            are rounded back to their dtype.
        teacher: the dense model, same tokens.
        calibration_BS: (B, S) int64, shuffled anew every pass.
        settings: steps, sequences a step and learning rate.
        seed: of the order of the text.
        progress: called with steps done and steps in all.

    Raises:
        ModelError: the model has no repair to train.
    """
    ks = model.expert_config.repaired
    if not ks:
        raise ModelError(
            "the gradient stage trains repairs, and the model has none; bootstrap with "
            "experts.repair = true and a K below E"
        )
    reserved_B = reserved_rows(len(calibration_BS))
    judged, learnt = reserved_B.nonzero().squeeze(1), (~reserved_B).nonzero().squeeze(1)
    if len(calibration_BS) < 2:
        raise ModelError(
            "the gradient stage got one calibration sequence; it needs at least two, one "
            "of them to judge by: raise experts.calibration_tokens"
        )

    wanted_BSD = last_states(teacher, calibration_BS)
    lesson = _Lesson(model, teacher.lm_head.weight, calibration_BS, wanted_BSD)

    def judge() -> dict[int, float]:
        with torch.no_grad():
            return {k: float(lesson.loss(judged, k)) for k in ks}

    before, saved = judge(), _copy(model)
    losses = _train(lesson, learnt, settings, seed, progress)
    after = judge()
    kept = sum(after.values()) < sum(before.values())
    if not kept:
        _put_back(model, saved)
    return Distilled(losses=losses, before=before, after=after, kept=kept)


@dataclass(frozen=True)
class _Lesson:
    """The text, and what the dense model makes of it."""

    model: ExpertModel
    head_VD: Tensor
    tokens_BS: Tensor
    wanted_BSD: Tensor

    def loss(self, rows: Tensor, k: int) -> Tensor:
        """Mean KL(dense || converted at K) over all positions of some sequences, nats."""
        options = WalkOptions(experts_per_token=k, use_assembler=False)
        found_BSD = self.model.hidden_states(self.tokens_BS[rows], options)
        return _HeadDivergence.apply(
            found_BSD.flatten(0, 1),
            self.wanted_BSD[rows].flatten(0, 1),
            self.model.llama.lm_head.weight,
            self.head_VD,
        )


def _train(
    lesson: _Lesson,
    rows: Tensor,
    settings: DistillSettings,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[tuple[int, float], ...]:
    """The steps on some sequences; (K, loss) of each."""
    ks, losses = lesson.model.expert_config.repaired, []
    with _trainable(lesson.model) as groups:
        optimizer = torch.optim.AdamW(
            [
                {"params": groups["repairs"], "share": 1.0},
                {"params": groups["gates"], "share": GATE_SHARE * _ratio(groups)},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        parameters = groups["repairs"] + groups["gates"]
        batches = _batches(rows, settings.batch_size, seed)
        for step in range(settings.steps):
            k = ks[step % len(ks)]
            rate = settings.learning_rate * _schedule(step, settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            loss = lesson.loss(next(batches), k)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append((k, float(loss.detach())))
            progress(step + 1, settings.steps)
    return tuple(losses)


class _HeadDivergence(torch.autograd.Function):
    """Mean KL of two sets of rows through their heads, a chunk at a time.

    The heads are frozen, so the gradient of the rows is made on the way forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        wanted_ND: Tensor,
        head_VD: Tensor,
        wanted_head_VD: Tensor,
    ) -> Tensor:
        total = rows_ND.new_zeros((), dtype=torch.float32)
        gradients = []
        parts = zip(rows_ND.split(ROWS_PER_CHUNK), wanted_ND.split(ROWS_PER_CHUNK))
        for rows, wanted in parts:
            target = torch.log_softmax((wanted @ wanted_head_VD.T).float(), dim=1)
            found = torch.log_softmax((rows @ head_VD.T).float(), dim=1)
            share = target.exp()
            total += (share * (target - found)).sum()
            if ctx.needs_input_grad[0]:
                gap = found.exp_().sub_(share)
                gradients.append(gap.to(head_VD.dtype) @ head_VD)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients) / len(rows_ND))
        return total / len(rows_ND)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream.to(gradient_ND.dtype), None, None, None


def _ratio(groups: dict[str, list[nn.Parameter]]) -> float:
    """Root mean square of the gates' weights over that of the down projections."""

    def size(parameters: list[nn.Parameter], dimensions: int) -> float:
        chosen = [p.detach() for p in parameters if p.dim() == dimensions]
        total = sum(float(p.double().square().sum()) for p in chosen)
        return math.sqrt(total / max(1, sum(p.numel() for p in chosen)))

    # (E, D) gate weights beside (E,) biases; (E, F, D) down projections.
    return size(groups["gates"], 2) / max(size(groups["repairs"], 3), 1e-12)


def _schedule(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def _batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(seed)
    while True:
        order = rows[torch.randperm(len(rows), generator=source)]
        yield from order.split(size)


@contextmanager
def _trainable(model: ExpertModel) -> Iterator[dict[str, list[nn.Parameter]]]:
    """Repairs as float32 parameters, and nothing else that is trained but the gates."""
    wanted = {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    }
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = model.expert_layers
    dtypes: dict[tuple[int, str], torch.dtype] = {}
    repairs: list[nn.Parameter] = []
    for place, layer in enumerate(layers):
        for name in _repair_names(layer):
            stored = getattr(layer, name)
            dtypes[place, name] = stored.dtype
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(stored.float().clone()))
            repairs.append(getattr(layer, name))
    gates = [
        one for layer in layers for one in (layer.gate_weight_ED, layer.gate_bias_E)
    ]
    for parameter in gates:
        parameter.requires_grad_(True)
    try:
        yield {"repairs": repairs, "gates": gates}
    finally:
        for (place, name), dtype in dtypes.items():
            trained = getattr(layers[place], name).detach().to(dtype)
            delattr(layers[place], name)
            layers[place].register_buffer(name, trained)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def _repair_names(layer: ExpertGraphMLP) -> list[str]:
    return [
        repair_name(k, part.name) for k in layer.repaired for part in fields(Repair)
    ]


def _copy(model: ExpertModel) -> list[dict[str, Tensor]]:
    """What training changes."""
    names = ("gate_weight_ED", "gate_bias_E")
    return [
        {
            name: getattr(layer, name).detach().clone()
            for name in (*names, *_repair_names(layer))
        }
        for layer in model.expert_layers
    ]


@torch.no_grad()
def _put_back(model: ExpertModel, saved: list[dict[str, Tensor]]) -> None:
    for layer, tensors in zip(model.expert_layers, saved, strict=True):
        for name, tensor in tensors.items():
            getattr(layer, name).copy_(tensor)
