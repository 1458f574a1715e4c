"""The vectorised walk against its definition, and the properties it promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samv2_kernels.reference import (
    Visits,
    Walk,
    choose_topk,
    count_usage,
    reach,
    visit,
    walk,
)
from tests.helpers import assert_close, generator, randn
from tests.kernels.walk_loop import LoopWalk, best_first, loop_usage, loop_walk


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of one walk."""

    scores_TE: Tensor
    masks_MEE: Tensor
    mask_index_T: Tensor | None
    shared_E: Tensor
    experts_per_token: int
    fill: bool

    def walk(self, **changes: Any) -> Walk:
        return walk(**(self.arguments() | changes))

    def visit(self, **changes: Any) -> Visits:
        return visit(**(self.arguments() | changes))

    def arguments(self) -> dict[str, Any]:
        return dict(
            scores_TE=self.scores_TE,
            edge_mask_MEE=self.masks_MEE,
            experts_per_token=self.experts_per_token,
            mask_index_T=self.mask_index_T,
            shared_E=self.shared_E,
            fill=self.fill,
        )

    def mask(self, token: int) -> Tensor:
        index = 0 if self.mask_index_T is None else int(self.mask_index_T[token])
        return self.masks_MEE[index]

    def loop(self) -> list[LoopWalk]:
        shared = set(self.shared_E.nonzero().flatten().tolist())
        return [
            loop_walk(
                scores,
                self.mask(token).tolist(),
                experts_per_token=self.experts_per_token,
                shared=shared,
                fill=self.fill,
            )
            for token, scores in enumerate(self.scores_TE.tolist())
        ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random graphs from closed to complete, scores with and without ties."""
    source = generator(draw(st.integers(0, 2**31)))
    tokens = draw(st.sampled_from((0, 1, 2, 7, 33)))
    experts = draw(st.sampled_from((1, 2, 3, 5, 8, 17)))
    num_shared = draw(st.integers(0, min(3, experts)))
    k = draw(st.integers(max(1, num_shared), experts))
    shared_E = torch.zeros(experts, dtype=torch.bool)
    shared_E[torch.randperm(experts, generator=source)[:num_shared]] = True
    if draw(st.booleans()):
        levels = draw(st.integers(1, 3))
        scores_TE = torch.randint(levels, (tokens, experts), generator=source).float()
    else:
        scores_TE = torch.randn(tokens, experts, generator=source)
    masks = draw(st.integers(1, 3))
    edges, entries = (draw(st.sampled_from((0.0, 0.15, 0.5, 1.0))) for _ in range(2))
    uniform = torch.rand(masks, experts, experts, generator=source)
    masks_MEE = (uniform < edges).triu(1)
    masks_MEE |= torch.diag_embed(uniform.diagonal(dim1=1, dim2=2) < entries)
    sure = torch.randint(experts, (masks,), generator=source)
    masks_MEE[torch.arange(masks), sure, sure] = True
    index_T = None
    if draw(st.booleans()):
        index_T = torch.randint(masks, (tokens,), generator=source)
    return Case(
        scores_TE=scores_TE,
        masks_MEE=masks_MEE,
        mask_index_T=index_T,
        shared_E=shared_E,
        experts_per_token=k,
        fill=draw(st.booleans()),
    )


def visits(walked: Walk, token: int) -> list[tuple[int, int, int]]:
    """(expert, parent slot, depth) of a token's used slots."""
    rows = (walked.expert_ids_TK, walked.parent_slot_TK, walked.depth_TK)
    found = list(zip(*(row[token].tolist() for row in rows)))
    used = sum(expert >= 0 for expert, _, _ in found)
    assert all(visit == (-1, -1, -1) for visit in found[used:])
    return found[:used]


@given(cases())
def test_agrees_with_the_definition(case: Case) -> None:
    walked = case.walk()
    assert walked.expert_ids_TK.shape == (len(case.scores_TE), case.experts_per_token)
    for token, expected in enumerate(case.loop()):
        found = visits(walked, token)
        assert [expert for expert, _, _ in found] == expected.ids
        assert [parent for _, parent, _ in found] == expected.parents
        assert [depth for _, _, depth in found] == expected.depths
        reached = walked.reached_TE[token]
        assert set(reached.tolist()) <= {0.0, 1.0}
        assert set(reached.nonzero().flatten().tolist()) == expected.reached
        chosen = walked.chosen_TE[token]
        assert set(chosen.nonzero().flatten().tolist()) == expected.chosen


@given(cases())
def test_visits_without_their_order_are_those_of_the_walk(case: Case) -> None:
    walked, visited = case.walk(), case.visit()
    assert type(visited) is Visits
    for name in ("reached_TE", "chosen_TE", "visited_TE"):
        assert torch.equal(getattr(visited, name), getattr(walked, name)), name
    for token, expected in enumerate(case.loop()):
        found = visited.visited_TE[token].nonzero().flatten().tolist()
        assert set(found) == expected.reached


@given(cases(), st.sampled_from((None, "entries", "complete")), st.booleans())
def test_visits_have_the_gradients_of_the_sweep(
    case: Case, graph: str | None, learnt: bool
) -> None:
    """Also where every expert may be entered and the sweep is left out."""
    eye = torch.eye(len(case.shared_E), dtype=torch.bool)
    masks_MEE = case.masks_MEE
    if graph is not None:
        masks_MEE = masks_MEE | (eye if graph == "entries" else torch.ones_like(eye))
    routed_TE = case.scores_TE.masked_fill(case.shared_E, -torch.inf)
    wanted = case.experts_per_token - int(case.shared_E.sum())
    weight_TE = randn(*case.scores_TE.shape, seed=1)
    index_T = case.mask_index_T
    results = []
    for how in (walk, visit, None):
        q_TE = choose_topk(routed_TE, wanted).float().requires_grad_()
        edges = masks_MEE.triu().float().requires_grad_(learnt)
        if how is None:
            opened = edges.masked_fill(torch.diag(case.shared_E), 1.0)
            picked = opened[:1] if index_T is None else opened[index_T]
            reached_TE = reach(q_TE.masked_fill(case.shared_E, 1.0), picked)
        else:
            arguments = case.arguments() | {"edge_mask_MEE": edges, "chosen_TE": q_TE}
            reached_TE = how(**arguments).reached_TE
        wanted_grads = (q_TE, edges) if learnt else (q_TE,)
        (reached_TE * weight_TE).sum().backward()
        results.append([value.grad for value in wanted_grads])
    for found in results[:2]:
        for gradient, expected in zip(found, results[2], strict=True):
            assert torch.equal(gradient, expected)


@given(cases())
def test_counts_agree_with_the_definition(case: Case) -> None:
    server_EE = case.masks_MEE[0]
    counted = count_usage(case.walk(), server_EE)
    usage, demand = loop_usage(case.loop(), server_EE.tolist())
    assert torch.equal(counted.usage_EE, usage)
    assert torch.equal(counted.demand_EE, demand)
    assert counted.usage_EE.dtype == counted.demand_EE.dtype == torch.int64


@given(cases())
def test_every_visit_is_a_step_of_the_graph(case: Case) -> None:
    walked = case.walk()
    for token in range(len(case.scores_TE)):
        found = visits(walked, token)
        mask = case.mask(token)
        assert 1 <= len(found) <= case.experts_per_token
        assert len({expert for expert, _, _ in found}) == len(found)
        for slot, (expert, parent, depth) in enumerate(found):
            if parent < 0:
                assert depth == 0 and (mask[expert, expert] or case.shared_E[expert])
            else:
                assert parent < slot and depth == found[parent][2] + 1
                assert found[parent][0] < expert and mask[found[parent][0], expert]
        visited = {expert for expert, _, _ in found}
        assert visited >= set(case.shared_E.nonzero().flatten().tolist())


@given(cases())
def test_complete_graph_visits_the_stable_topk(case: Case) -> None:
    experts = len(case.shared_E)
    everything = torch.ones(1, experts, experts, dtype=torch.bool).triu()
    walked = walk(case.scores_TE, everything, experts_per_token=case.experts_per_token)
    for scores, reached in zip(case.scores_TE.tolist(), walked.visited_TE):
        top = best_first(scores, set(range(experts)))[: case.experts_per_token]
        assert set(reached.nonzero().flatten().tolist()) == set(top)


@given(cases(), st.integers(0, 2**31))
def test_a_token_does_not_depend_on_its_batch(case: Case, seed: int) -> None:
    tokens = len(case.scores_TE)
    index_T = case.mask_index_T
    if index_T is None:
        index_T = torch.zeros(tokens, dtype=torch.long)
    whole = case.walk()
    for order in torch.randperm(tokens, generator=generator(seed)).tensor_split(3):
        part = walk(
            case.scores_TE[order],
            case.masks_MEE,
            experts_per_token=case.experts_per_token,
            mask_index_T=index_T[order],
            shared_E=case.shared_E,
            fill=case.fill,
        )
        for name, value in vars(part).items():
            assert torch.equal(value, getattr(whole, name)[order]), name


@given(cases())
def test_fill_reaches_k_where_the_graph_lets_it(case: Case) -> None:
    everything = torch.ones_like(case.masks_MEE).triu()
    entries_only = everything & torch.eye(len(case.shared_E), dtype=torch.bool)
    for masks in (everything, entries_only):
        walked = walk(
            case.scores_TE, masks, experts_per_token=case.experts_per_token, fill=True
        )
        assert bool((walked.visited_TE.sum(1) == case.experts_per_token).all())


def test_pre_order_goes_deep_before_wide() -> None:
    mask_EE = torch.zeros(5, 5, dtype=torch.bool)
    for src, dst in ((0, 0), (1, 1), (0, 2), (0, 3), (2, 4), (1, 4)):
        mask_EE[src, dst] = True
    scores_TE = torch.tensor([[5.0, 4.0, 1.0, 3.0, 2.0]])
    walked = walk(scores_TE, mask_EE.unsqueeze(0), experts_per_token=5)
    assert walked.expert_ids_TK.tolist() == [[0, 3, 2, 4, 1]]
    assert walked.parent_slot_TK.tolist() == [[-1, 0, 0, 2, -1]]
    assert walked.depth_TK.tolist() == [[0, 1, 1, 2, 0]]


def test_a_set_that_cannot_be_entered_falls_back_to_the_best_entry() -> None:
    mask_EE = torch.zeros(4, 4, dtype=torch.bool)
    mask_EE[0, 0] = mask_EE[1, 1] = mask_EE[2, 3] = True
    scores_TE = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    walked = walk(scores_TE, mask_EE.unsqueeze(0), experts_per_token=2)
    assert walked.expert_ids_TK.tolist() == [[1, -1]]
    assert walked.reached_TE.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert walked.chosen_TE.tolist() == [[False, False, True, True]]


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from((1, 2, 3, 6)))
def test_reach_has_the_gradient_of_its_formula(seed: int, experts: int) -> None:
    """At 0/1 values, where the sweep is used, and between them."""
    source = generator(seed)
    q_TE = torch.rand(3, experts, generator=source, dtype=torch.double)
    mask = torch.rand(3, experts, experts, generator=source, dtype=torch.double).triu()
    for values in ((q_TE, mask), (q_TE.round(), mask.round())):
        inputs = tuple(value.clone().requires_grad_() for value in values)
        assert torch.autograd.gradcheck(reach, inputs)


@pytest.mark.parametrize("shared", [0, 2])
def test_scores_and_edges_get_the_gradient_of_finite_differences(shared: int) -> None:
    """Through ``walk``, with straight-through q and edges, against the bare sweep."""
    experts, k = 6, 4
    scores_TE = randn(9, experts, seed=1, dtype=torch.double)
    mask_EE = (randn(experts, experts, seed=2) > 0).triu().double()
    mask_EE[2, 2] = 1
    shared_E = torch.arange(experts) < shared
    weight_TE = randn(9, experts, seed=3, dtype=torch.double)
    routed = scores_TE.masked_fill(shared_E, -torch.inf)
    q_TE = choose_topk(routed, k - shared).double().requires_grad_()
    edges = mask_EE.unsqueeze(0).requires_grad_()
    walked = walk(
        scores_TE, edges, experts_per_token=k, shared_E=shared_E, chosen_TE=q_TE
    )
    found = torch.autograd.grad((walked.reached_TE * weight_TE).sum(), (q_TE, edges))

    def total(q_TE: Tensor, edges: Tensor) -> Tensor:
        q_TE = torch.where(shared_E, 1.0, q_TE)
        opened = torch.where(torch.diag(shared_E), 1.0, edges)
        return (reach(q_TE, opened) * weight_TE).sum()

    point = (q_TE.detach(), edges.detach())
    for name, index, gradient in (("q", 0, found[0]), ("edges", 1, found[1])):
        expected = torch.zeros_like(gradient)
        for place in range(gradient.numel()):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [value.clone() for value in point]
                moved[index].view(-1)[place] += step
                sides.append(float(total(*moved)))
            expected.view(-1)[place] = (sides[0] - sides[1]) / 2e-5
        assert_close(
            name, gradient, expected.triu() if index else expected, "finite_difference"
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


@pytest.mark.parametrize("k", [-1, 4])
def test_choose_topk_refuses_a_k_outside_the_experts(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k is {k}, it must lie in 0\.\.3"):
        choose_topk(torch.zeros(2, 3), k)


def test_choose_topk_breaks_ties_by_the_lower_index() -> None:
    scores_TE = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert choose_topk(scores_TE, 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]
