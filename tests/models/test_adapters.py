"""Frozen factors, and expert blocks as flat vectors."""

from __future__ import annotations

import pytest
import torch

from samv2.common.errors import ModelError
from samv2.models.adapters import (
    assembler_id,
    expert_parts,
    make_factors,
    read_blocks,
    write_blocks,
)
from samv2.models.expert_model import ExpertModel
from samv2.models.export import export_dense
from tests.helpers import assert_close, randn


def factors(**changes: int):
    values = dict(seed=7, layer=1, model_width=12, rank=3) | changes
    return make_factors(**values, scale=2.0)


def test_factors_are_orthonormal() -> None:
    made = factors()
    identity = torch.eye(3)
    assert_close("A_g", made.gate_RD @ made.gate_RD.T, identity, "fp32")
    assert_close("A_u", made.up_RD @ made.up_RD.T, identity, "fp32")
    assert_close("B_d", made.down_DR.T @ made.down_DR, identity, "fp32")
    assert made.scale == 2.0


def test_factors_depend_on_seed_and_layer_alone() -> None:
    torch.manual_seed(0)
    first = factors()
    torch.manual_seed(1)
    again = factors()
    for name in ("gate_RD", "up_RD", "down_DR"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        for other in (factors(seed=8), factors(layer=2)):
            assert not torch.equal(getattr(first, name), getattr(other, name))
    assert not torch.equal(first.gate_RD, first.up_RD)


@pytest.mark.parametrize("rank", [0, 13])
def test_a_rank_outside_the_width_is_refused(rank: int) -> None:
    with pytest.raises(ModelError, match=rf"adapter.rank is {rank}; .* 1\.\.12"):
        factors(rank=rank)


def test_blocks_round_trip(tiny_expert_model: ExpertModel) -> None:
    model = tiny_expert_model
    layers, experts = len(model.expert_layers), model.expert_config.num_experts
    before = model.read_blocks()
    assert sorted(before) == list(range(layers * experts + 1))
    changed = {key: randn(len(block), seed=key) for key, block in before.items()}
    model.write_blocks(changed)
    after = model.read_blocks()
    for key, block in changed.items():
        assert after[key].dtype == torch.float32
        assert torch.equal(after[key], block)
    model.write_blocks({3: before[3]})
    assert torch.equal(model.read_blocks()[3], before[3])
    assert torch.equal(model.read_blocks()[2], changed[2])


def test_a_block_is_laid_out_as_documented(tiny_expert_model: ExpertModel) -> None:
    layer, expert = tiny_expert_model.expert_layers[1], 5
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed)
    block = tiny_expert_model.read_blocks()[1 * 8 + expert]
    rows, rank, width = 16, 4, 64
    sizes = [rows * rank, rows * rank, rank * rows, width, 1, 1, 8]
    gate, up, down, row, bias, mix, into = block.split(sizes)
    assert torch.equal(gate.view(rows, rank), layer.adapter_gate_EFR[expert])
    assert torch.equal(up.view(rows, rank), layer.adapter_up_EFR[expert])
    assert torch.equal(down.view(rank, rows), layer.adapter_down_ERF[expert])
    assert torch.equal(row, layer.gate_weight_ED[expert])
    assert bias[0] == layer.gate_bias_E[expert] and mix[0] == layer.mix_E[expert]
    assert torch.equal(into, layer.edge_strength_EE[:, expert])
    for part, size in zip(expert_parts(layer, expert), sizes):
        assert part.numel() == size


def test_every_trainable_number_is_in_exactly_one_block(
    tiny_expert_model: ExpertModel,
) -> None:
    model = tiny_expert_model
    total = sum(parameter.numel() for parameter in model.trainable_parameters())
    assert sum(len(block) for block in model.read_blocks().values()) == total
    model.write_blocks(
        {k: torch.full_like(b, k) for k, b in model.read_blocks().items()}
    )
    for parameter in model.trainable_parameters():
        assert bool((parameter == parameter.round()).all())
    assert bool((model.assembler.out.weight == 24).all())


def test_blocks_are_copies(tiny_expert_model: ExpertModel) -> None:
    blocks = tiny_expert_model.read_blocks()
    kept = blocks[0].clone()
    tiny_expert_model.expert_layers[0].adapter_gate_EFR.data.fill_(3.0)
    assert torch.equal(blocks[0], kept)


def test_without_assembler_there_is_no_block_of_it(
    tiny_expert_model: ExpertModel,
) -> None:
    layers = tiny_expert_model.expert_layers
    assert assembler_id(layers) == 24
    assert sorted(read_blocks(layers, None)) == list(range(24))


@pytest.mark.parametrize(
    "blocks, message",
    [
        ({25: torch.zeros(1)}, "block 25 is not one of the model's 3 layers of 8"),
        ({-1: torch.zeros(1)}, "block -1 is not one of"),
        ({2: torch.zeros(7)}, r"block 2 has shape \(7,\), the model needs \(266,\)"),
        ({2: torch.zeros(1, 266)}, r"block 2 has shape \(1, 266\)"),
        ({24: torch.zeros(7)}, "block 24 has shape"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_and_nothing_is_written(
    tiny_expert_model: ExpertModel, blocks: dict[int, torch.Tensor], message: str
) -> None:
    model = tiny_expert_model
    before = model.read_blocks()
    good = {0: torch.ones_like(before[0])}
    with pytest.raises(ModelError, match=message):
        model.write_blocks(good | blocks)
    for key, block in model.read_blocks().items():
        assert torch.equal(block, before[key])


def test_a_block_of_a_missing_assembler_is_refused(
    tiny_expert_model: ExpertModel,
) -> None:
    with pytest.raises(ModelError, match="block 24 is not one of"):
        write_blocks(tiny_expert_model.expert_layers, None, {24: torch.zeros(3)})


def test_averaging_blocks_averages_the_weight_changes(
    tiny_expert_model: ExpertModel,
) -> None:
    """The reason why factors are shared: merged weights are linear in the blocks."""
    model = tiny_expert_model
    start = model.read_blocks()

    def merged(blocks: dict[int, torch.Tensor]) -> torch.Tensor:
        model.write_blocks(blocks)
        return export_dense(model).model.layers[1].mlp.down_proj.weight.detach()

    clients = [
        {k: b + 0.1 * randn(len(b), seed=100 * c + k) for k, b in start.items()}
        for c in range(2)
    ]
    for blocks in clients:
        for key in range(24):
            blocks[key][-9:] = 0.0
    mean = {k: (clients[0][k] + clients[1][k]) / 2 for k in start}
    expected = (merged(clients[0]) + merged(clients[1])) / 2
    assert_close("mean", merged(mean), expected, "fp32")
