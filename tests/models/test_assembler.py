"""The assembler's masks: shape, values, limits, noise and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2.models.assembler import LOGIT_LIMIT, OPEN_LOGIT, Assembler
from tests.helpers import assert_close, generator, randn

WIDTH, LAYERS, EXPERTS, EDGES = 6, 3, 5, 15
COMPLETE = torch.ones(EXPERTS, EXPERTS, dtype=torch.bool).triu()


def make_assembler(seed: int = 0, experts: int = EXPERTS) -> Assembler:
    return Assembler(
        model_width=WIDTH,
        num_layers=LAYERS,
        num_experts=experts,
        hidden_width=4,
        seed=seed,
    )


def scramble(assembler: Assembler, scale: float, seed: int = 0) -> Assembler:
    for index, parameter in enumerate(assembler.parameters()):
        parameter.data = scale * randn(*parameter.shape, seed=seed + index)
    return assembler


@st.composite
def server_masks(draw: st.DrawFn, experts: int = EXPERTS) -> Tensor:
    """Upper triangular with at least one entry."""
    source = generator(draw(st.integers(0, 2**31)))
    mask_EE = (torch.rand(experts, experts, generator=source) < 0.5).triu()
    entry = draw(st.integers(0, experts - 1))
    mask_EE[entry, entry] = True
    return mask_EE


@given(
    server_masks(),
    st.integers(0, 2**31),
    st.sampled_from((0.0, 1e-30, 1.0, 50.0, 1e6, 1e20, 1e38)),
    st.sampled_from((0.0, 1.0, 1e4, 1e25)),
    st.sampled_from((0.01, 0.5, 1.0)),
    st.booleans(),
)
def test_masks_are_sub_graphs_with_an_entry_for_any_parameters(
    server_EE: Tensor,
    seed: int,
    scale: float,
    context: float,
    temperature: float,
    noisy: bool,
) -> None:
    assembler = scramble(make_assembler(), scale, seed)
    mask_BEE = assembler(
        context * randn(4, WIDTH, seed=seed),
        1,
        server_EE,
        temperature=temperature,
        generator=generator(seed) if noisy else None,
    )
    assert mask_BEE.shape == (4, EXPERTS, EXPERTS) and mask_BEE.dtype == torch.float32
    assert set(mask_BEE.flatten().tolist()) <= {0.0, 1.0}
    assert torch.equal(mask_BEE, mask_BEE.triu())
    assert not bool((mask_BEE.bool() & ~server_EE).any())
    assert bool(mask_BEE.diagonal(dim1=1, dim2=2).any(dim=1).all())


def test_the_start_is_fully_open() -> None:
    assembler = make_assembler()
    context_BD = 100 * randn(7, WIDTH, seed=0)
    for layer in range(LAYERS):
        assert bool((assembler.logits(context_BD, layer) == OPEN_LOGIT).all())
        mask_BEE = assembler(context_BD, layer, COMPLETE)
        assert torch.equal(mask_BEE, COMPLETE.float().expand(7, -1, -1))


def test_one_context_gives_one_mask() -> None:
    assembler = scramble(make_assembler(), 2.0)
    context_BD = randn(3, WIDTH, seed=1)
    batch_BEE = assembler(context_BD, 0, COMPLETE)
    for context_D, mask_EE in zip(context_BD, batch_BEE):
        single_EE = assembler(context_D, 0, COMPLETE)
        assert single_EE.shape == (EXPERTS, EXPERTS)
        assert torch.equal(single_EE, mask_EE)


def test_masks_depend_on_the_context_and_the_layer() -> None:
    assembler = scramble(make_assembler(), 2.0)
    masks = assembler(randn(8, WIDTH, seed=1), 0, COMPLETE)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1
    assert not torch.equal(masks, assembler(randn(8, WIDTH, seed=1), 1, COMPLETE))


def test_evaluation_thresholds_the_logits_in_row_order() -> None:
    assembler = scramble(make_assembler(), 2.0)
    context_BD = randn(2, WIDTH, seed=1)
    logits_BP = assembler.logits(context_BD, 2)
    mask_BEE = assembler(context_BD, 2, COMPLETE)
    rows, columns = torch.triu_indices(EXPERTS, EXPERTS)
    assert len(rows) == EDGES
    opened = mask_BEE.diagonal(dim1=1, dim2=2).any(dim=1)
    assert bool(opened.all())
    assert torch.equal(mask_BEE[:, rows, columns], (logits_BP > 0).float())


def test_a_closed_mask_keeps_the_server_entry_of_highest_logit() -> None:
    assembler = make_assembler()
    logit_EE = -torch.ones(EXPERTS, EXPERTS)
    logit_EE[1, 1], logit_EE[3, 3] = -0.1, -0.5
    rows, columns = torch.triu_indices(EXPERTS, EXPERTS)
    assembler.out.bias.data = logit_EE[rows, columns]
    mask_EE = assembler(randn(WIDTH, seed=0), 0, COMPLETE)
    assert mask_EE.nonzero().tolist() == [[1, 1]]
    server_EE = COMPLETE.clone()
    server_EE[1, 1] = False
    mask_EE = assembler(randn(WIDTH, seed=0), 0, server_EE)
    assert mask_EE.nonzero().tolist() == [[3, 3]]


def test_noise_comes_from_the_generator_and_opens_edges_at_their_odds() -> None:
    assembler = make_assembler()
    assembler.out.bias.data.fill_(1.0)
    context_BD = torch.ones(4000, WIDTH)
    masks = assembler(context_BD, 0, COMPLETE, generator=generator(3))
    again = assembler(context_BD, 0, COMPLETE, generator=generator(3))
    assert torch.equal(masks, again)
    share = float(masks[:, 0, 1:].detach().mean())
    assert share == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.02)


def test_the_gradient_is_that_of_the_soft_mask_on_server_edges() -> None:
    assembler = make_assembler()
    rows, columns = torch.triu_indices(EXPERTS, EXPERTS)
    assembler.out.bias.data = 2 * randn(EDGES, seed=2)
    server_EE = COMPLETE.clone()
    server_EE[0, 3] = server_EE[2, 2] = False
    probe_EE = randn(EXPERTS, EXPERTS, seed=3)
    mask_EE = assembler(randn(WIDTH, seed=0), 0, server_EE, temperature=0.5)
    (gradient,) = torch.autograd.grad((mask_EE * probe_EE).sum(), assembler.out.bias)
    soft_P = torch.sigmoid(assembler.out.bias.detach() / 0.5)
    slope_P = soft_P * (1 - soft_P) / 0.5
    slope_P = slope_P * (assembler.out.bias.detach().abs() < LOGIT_LIMIT)
    expected = slope_P * probe_EE[rows, columns] * server_EE[rows, columns]
    assert_close("bias", gradient, expected, "fp32")


def test_all_parameters_get_gradients() -> None:
    assembler = scramble(make_assembler(), 0.5)
    mask_BEE = assembler(randn(3, WIDTH, seed=0), 1, COMPLETE, generator=generator(0))
    (mask_BEE * randn(3, EXPERTS, EXPERTS, seed=1)).sum().backward()
    for name, parameter in assembler.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_the_start_depends_on_the_seed_alone() -> None:
    weights = [make_assembler(seed).hidden.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_one_expert_is_always_entered() -> None:
    assembler = scramble(make_assembler(experts=1), 5.0)
    mask = assembler(randn(3, WIDTH, seed=0), 0, torch.ones(1, 1, dtype=torch.bool))
    assert mask.tolist() == [[[1.0]]] * 3
