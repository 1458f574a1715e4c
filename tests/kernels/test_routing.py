"""The routing ops against the reference: values, gradients, and what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samv2_kernels import reference
from samv2_kernels.reference import choose_topk, reach
from samv2_kernels.reference import sweep as sweep_module
from samv2_kernels.reference.sweep import sweep_backward
from samv2_kernels.routing import visit, visited_ids, walk
from tests.helpers import assert_close, generator, randn
from tests.kernels.test_walk import Case, cases

WALKS = ((walk, reference.walk), (visit, reference.visit))


def straight_through(case: Case) -> Tensor:
    """(T, E) float64 q of the case, a leaf with a gradient."""
    routed_TE = case.scores_TE.masked_fill(case.shared_E, -torch.inf)
    wanted = case.experts_per_token - int(case.shared_E.sum())
    return choose_topk(routed_TE, wanted).double().requires_grad_()


@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    for op, twin in WALKS:
        found, expected = op(**case.arguments()), twin(**case.arguments())
        assert type(found) is type(expected)
        for name, value in vars(expected).items():
            actual = getattr(found, name)
            assert actual.dtype == value.dtype and torch.equal(actual, value), name


@given(cases(), st.booleans(), st.booleans())
def test_has_the_gradients_of_the_reference(
    case: Case, entries: bool, learnt: bool
) -> None:
    """In q and in the edges, whether or not every expert may be entered."""
    masks_MEE = case.masks_MEE
    if entries:
        masks_MEE = masks_MEE | torch.eye(len(case.shared_E), dtype=torch.bool)
    weight_TE = randn(*case.scores_TE.shape, seed=1, dtype=torch.double)
    for op, twin in WALKS:
        gradients = []
        for how in (op, twin):
            q_TE = straight_through(case)
            edges = masks_MEE.double().requires_grad_(learnt)
            changes = dict(scores_TE=case.scores_TE.double(), chosen_TE=q_TE)
            found = how(**case.arguments() | changes | {"edge_mask_MEE": edges})
            (found.reached_TE * weight_TE).sum().backward()
            gradients.append((q_TE.grad, edges.grad))
        assert_close("q", gradients[0][0], gradients[1][0], "fp64")
        if learnt:
            assert_close("edges", gradients[0][1], gradients[1][1], "fp64")
        else:
            assert gradients[0][1] is None


@given(cases())
def test_scores_choices_and_masks_without_gradient_give_none(case: Case) -> None:
    q_TE = straight_through(case)
    assert not walk(**case.arguments()).reached_TE.requires_grad
    with torch.no_grad():
        found = walk(**case.arguments() | {"chosen_TE": q_TE})
    assert not found.reached_TE.requires_grad
    assert torch.equal(found.reached_TE, walk(**case.arguments()).reached_TE)


@given(cases(), st.booleans())
def test_the_closed_form_is_the_gradient_of_the_sweep(case: Case, every: bool) -> None:
    """For any 0/1 values of q, and for the columns that a GPU goes through."""
    tokens, experts = case.scores_TE.shape
    q_TE = (randn(tokens, experts, seed=2) > 0).double().requires_grad_()
    edges = case.masks_MEE.double().requires_grad_()
    index_T = torch.zeros(tokens, dtype=torch.long)
    index_T = index_T if case.mask_index_T is None else case.mask_index_T
    reached_TE = reach(q_TE, edges[index_T])
    grad_TE = randn(tokens, experts, seed=3, dtype=torch.double)
    expected = torch.autograd.grad(reached_TE, (q_TE, edges), grad_TE)
    with pytest.MonkeyPatch.context() as patch:
        if every:
            falling = range(experts - 1, 0, -1)
            patch.setattr(sweep_module, "_columns", lambda closed_TE: falling)
        arguments = (q_TE.detach(), edges.detach(), case.mask_index_T, None)
        found = sweep_backward(grad_TE, *arguments, reached_TE > 0.5, of_edges=True)
        bare = sweep_backward(grad_TE, *arguments, reached_TE > 0.5, of_edges=False)
    assert_close("q", found[0], expected[0], "fp64")
    assert_close("edges", found[1], expected[1], "fp64")
    assert torch.equal(bare[0], found[0])
    assert bare[1].shape == (0, experts, experts)


@given(cases())
def test_visited_ids_rise_and_are_padded_at_the_end(case: Case) -> None:
    visited_TE, k = case.visit().visited_TE, case.experts_per_token
    ids_TK = visited_ids(visited_TE, k)
    assert ids_TK.dtype == torch.int64 and ids_TK.shape == (len(visited_TE), k)
    for visited, ids in zip(visited_TE, ids_TK.tolist()):
        expected = visited.nonzero().flatten().tolist()
        assert ids == expected + [-1] * (k - len(expected))


def test_visited_ids_of_nobody() -> None:
    assert (
        visited_ids(torch.zeros(2, 3, dtype=torch.bool), 2).tolist() == [[-1, -1]] * 2
    )


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_refuses_a_k_outside_the_graph(k: int) -> None:
    everything = torch.ones(1, 5, 5, dtype=torch.bool).triu()
    for how in (walk, visit):
        with pytest.raises(ValueError, match=rf"experts_per_token is {k};.*1\.\.5"):
            how(torch.zeros(2, 5), everything, experts_per_token=k)


def test_refuses_a_k_below_the_shared_experts() -> None:
    everything = torch.ones(1, 5, 5, dtype=torch.bool).triu()
    shared_E = torch.tensor([True, True, True, False, False])
    for how in (walk, visit):
        with pytest.raises(ValueError, match="is 2; with 3 shared experts of 5"):
            how(torch.zeros(2, 5), everything, experts_per_token=2, shared_E=shared_E)


def test_refuses_a_mask_without_entry() -> None:
    masks_MEE = torch.ones(2, 3, 3, dtype=torch.bool).triu()
    masks_MEE[1].fill_diagonal_(False)
    for how in (walk, visit):
        with pytest.raises(ValueError, match="no entry.*at least one diagonal edge"):
            how(torch.zeros(2, 3), masks_MEE, experts_per_token=1)


def layer_arguments(tokens: int = 7) -> dict[str, Any]:
    """Of a layer in training: several masks, a shared expert, closed entries."""
    masks_MEE = torch.rand(2, 6, 6, generator=generator(0)).round().triu()
    masks_MEE[:, 1, 1] = 1
    return dict(
        scores_TE=randn(tokens, 6, seed=0),
        edge_mask_MEE=masks_MEE,
        mask_index_T=torch.arange(tokens) % 2,
        shared_E=torch.arange(6) == 4,
        experts_per_token=3,
    )


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("given_choice", [False, True])
def test_the_walk_passes_opcheck(order: bool, given_choice: bool) -> None:
    values = layer_arguments()
    chosen_TE = values["scores_TE"] > 0.5 if given_choice else None
    tensors = [values[name] for name in list(values)[:4]]
    torch.library.opcheck(
        torch.ops.samv2.walk.default, (*tensors, chosen_TE, 3, True, order)
    )


@pytest.mark.parametrize("optional", [False, True])
def test_the_gradient_passes_opcheck(optional: bool) -> None:
    values = layer_arguments()
    found = reference.visit(**values)
    q_TE = found.chosen_TE.float().requires_grad_()
    edges = values["edge_mask_MEE"].requires_grad_()
    options = (values["mask_index_T"], values["shared_E"]) if optional else (None, None)
    swept_TE = found.visited_TE & found.chosen_TE
    sets = (found.visited_TE, swept_TE)
    torch.library.opcheck(
        torch.ops.samv2.reached.default, (q_TE, edges, *options, *sets)
    )
    for of_edges in (False, True):
        hard = (randn(7, 6, seed=1), q_TE.detach(), edges.detach(), *options, swept_TE)
        torch.library.opcheck(
            torch.ops.samv2.reached_backward.default, (*hard, of_edges)
        )


def test_walk_and_gradient_compile_as_one_graph() -> None:
    shared_E = layer_arguments()["shared_E"]

    def step(scores_TE: Tensor, edges: Tensor, index_T: Tensor) -> tuple[Tensor, ...]:
        hard_TE = choose_topk(scores_TE.masked_fill(shared_E, -torch.inf), 2)
        soft_TE = torch.sigmoid(scores_TE)
        walked = walk(
            scores_TE.detach(),
            edges,
            experts_per_token=3,
            mask_index_T=index_T,
            shared_E=shared_E,
            chosen_TE=hard_TE.float() + (soft_TE - soft_TE.detach()),
        )
        ids_TK = visited_ids(walked.visited_TE, 3)
        return (walked.reached_TE * scores_TE).sum(), walked.expert_ids_TK, ids_TK

    graph = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12):
        values = layer_arguments(tokens)
        results = []
        for how in (graph, step):
            scores_TE = values["scores_TE"].clone().requires_grad_()
            edges = values["edge_mask_MEE"].clone().requires_grad_()
            total, *ids = how(scores_TE, edges, values["mask_index_T"])
            total.backward()
            results.append((*ids, total.detach(), scores_TE.grad, edges.grad))
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


def test_nothing_around_the_kernel_waits_for_the_device() -> None:
    """Tensors without data: whatever asks for a value raises."""
    values = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in layer_arguments().items()
    }
    q_TE = torch.zeros(7, 6, device="meta", requires_grad=True)
    edges = values.pop("edge_mask_MEE").requires_grad_()
    walked = walk(edge_mask_MEE=edges, chosen_TE=q_TE, **values)
    walked.reached_TE.sum().backward()
    swept_TE = walked.visited_TE
    options = (values["mask_index_T"], values["shared_E"])
    found = sweep_backward(
        q_TE, q_TE.detach(), edges.detach(), *options, swept_TE, of_edges=True
    )
    assert [gradient.shape for gradient in found] == [(7, 6), (2, 6, 6)]
    assert visited_ids(swept_TE, 3).shape == (7, 3)
    assert choose_topk(values["scores_TE"], 2).shape == (7, 6)
