"""Local training on the tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samv2.common.callbacks import (
    EarlyStopping,
    LossHistory,
    StepReport,
    TrainerCallback,
)
from samv2.common.errors import DataError, FederationError
from samv2.common.settings import TrainSettings
from samv2.federated.local_step import LocalResult, local_step
from samv2.models.adapters import assembler_id
from samv2.models.expert_model import ExpertModel

SETTINGS = TrainSettings(
    local_steps=3, batch_size=2, sequence_length=32, learning_rate=5e-3
)


def train(
    model: ExpertModel, stream: Tensor, *, seed: int = 3, **changes: object
) -> LocalResult:
    """A few local steps."""
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    return local_step(model, stream, settings, seed=seed, temperature=1.0)


def test_loss_falls_on_text_that_repeats(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    stream = tiny_tokens[:48]
    found = train(tiny_expert_model, stream, local_steps=25, learning_rate=2e-2)
    assert found.last_loss < 0.8 * found.first_loss
    assert found.mean_loss < found.first_loss


def test_only_the_blocks_change(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    model = tiny_expert_model
    trainable = {id(parameter) for parameter in model.trainable_parameters()}
    base = {
        name: tensor.clone()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in trainable
    }
    before = model.read_blocks()
    train(model, tiny_tokens[:500])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    changed = [
        k for k, v in model.read_blocks().items() if not torch.equal(v, before[k])
    ]
    assert len(changed) > len(before) / 2
    assert not model.training


def parts_changed(model: ExpertModel, stream: Tensor, **flags: bool) -> set[str]:
    """Which kinds of parameters a training changes."""
    kinds = ("gate_weight_ED", "gate_bias_E", "mix_E", "edge_strength_EE")

    def values() -> dict[str, Tensor]:
        found = {
            kind: torch.cat([getattr(e, kind).flatten() for e in model.expert_layers])
            for kind in (*kinds, "adapter_gate_EFR", "adapter_down_ERF")
        }
        found["assembler"] = model.read_blocks()[assembler_id(model.expert_layers)]
        return {kind: tensor.detach().clone() for kind, tensor in found.items()}

    before = values()
    train(model, stream, **flags)
    return {kind for kind, v in values().items() if not torch.equal(v, before[kind])}


ADAPTERS = {"adapter_gate_EFR", "adapter_down_ERF"}


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ({}, {"gate_weight_ED", "gate_bias_E", "assembler"}),
        ({"train_gate": False}, {"assembler"}),
        ({"train_assembler": False}, {"gate_weight_ED", "gate_bias_E"}),
        (
            {"train_mix": True, "train_gate": False, "train_assembler": False},
            {"mix_E"},
        ),
    ],
)
def test_flags_choose_what_is_trained(
    tiny_expert_model: ExpertModel,
    tiny_tokens: Tensor,
    flags: dict[str, bool],
    kinds: set[str],
) -> None:
    found = parts_changed(tiny_expert_model, tiny_tokens[:500], **flags)
    assert found == ADAPTERS | kinds


def test_a_seed_repeats_and_another_does_not(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    start = tiny_expert_model.read_blocks()
    found = []
    for seed in (3, 3, 4):
        tiny_expert_model.write_blocks(start)
        result = train(tiny_expert_model, tiny_tokens[:2000], seed=seed)
        found.append((result, tiny_expert_model.read_blocks()))
    (first, one), (again, two), (other, three) = found
    assert first.mean_loss == again.mean_loss != other.mean_loss
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(first.counts.usage_LEE, again.counts.usage_LEE)
    assert not all(torch.equal(one[key], three[key]) for key in one)


def test_the_global_generator_is_not_used(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    before = torch.random.get_rng_state()
    train(tiny_expert_model, tiny_tokens[:500])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_result_counts_windows_tokens_and_visits(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    found = train(tiny_expert_model, tiny_tokens[:500])
    assert (found.examples, found.tokens) == (6, 6 * 32)
    visits_L = found.counts.usage_LEE.sum(dim=(1, 2))
    assert visits_L.min() >= found.tokens and visits_L.max() <= 4 * found.tokens
    assert found.seconds > 0


class StopAt(TrainerCallback):
    """Stops after a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.ended: StepReport | None = None

    def on_step_end(self, report: StepReport) -> bool:
        return report.step == self.step

    def on_train_end(self, last: StepReport | None) -> None:
        self.ended = last


def test_callbacks_see_every_step_and_may_stop(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    history, stop = LossHistory(), StopAt(2)
    found = local_step(
        tiny_expert_model,
        tiny_tokens[:500],
        replace(SETTINGS, local_steps=9),
        seed=0,
        temperature=1.0,
        callbacks=[history, stop, EarlyStopping(100)],
    )
    assert [report.step for report in history.reports] == [1, 2]
    assert stop.ended == history.reports[-1]
    assert (found.examples, found.tokens) == (4, 4 * 32)


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    with pytest.raises(FederationError, match="step .*train.learning_rate"):
        train(tiny_expert_model, tiny_tokens[:500], learning_rate=1e30, local_steps=5)
    assert not tiny_expert_model.training


def test_too_little_text_is_an_error(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    with pytest.raises(DataError, match="fewer than one window"):
        train(tiny_expert_model, tiny_tokens[:31])
    assert not tiny_expert_model.training
