"""The expert op and the public function over it, against the reference in float64."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from samv2_kernels import (
    ExpertWeights,
    Nf4Weights,
    Visits,
    Walk,
    grouped_experts,
    reference,
    sort_visits,
    visit,
    visited_ids,
    walk,
)
from samv2_kernels.cpu.padded import padding_pays
from samv2_kernels.expert_mlp import expert_mlp
from samv2_kernels.nf4 import quantise
from tests.helpers import assert_close, generator, randn
from tests.kernels.test_grouped_mlp import (
    Problem,
    gradients,
    loop_experts,
    make_problem,
    widen,
)

FROZEN = ("gate_EFD", "up_EFD", "down_EFD", "out_EQD")


def freeze(problem: Problem) -> Problem:
    """The same, with nothing that the op takes to be frozen wanting a gradient."""

    def held(group: Any) -> Any:
        names = [name for name in FROZEN if hasattr(group, name)]
        return replace(group, **{n: getattr(group, n).detach() for n in names})

    stand_ins = problem.surrogates
    return replace(
        problem,
        weights=held(problem.weights),
        surrogates=None if stand_ins is None else held(stand_ins),
    )


def compute(problem: Problem, how: Any = grouped_experts, **changes: Any) -> Tensor:
    arguments = dict(edge_strength_EE=problem.edge_strength_EE, **problem.arguments())
    return how(
        problem.x_TD,
        problem.walked,
        problem.combine_TE,
        problem.weights,
        **(arguments | changes),
    )


def assert_matches(problem: Problem, ratio: str = "fp64", **changes: Any) -> None:
    """Values and gradients against the reference in float64 on the same numbers."""
    problem = freeze(problem)
    found_TD = compute(problem, **changes)
    wide = freeze(widen(problem))
    expected_TD = compute(wide, reference.grouped_experts)
    assert found_TD.dtype == problem.x_TD.dtype
    assert_close("y", found_TD, expected_TD, ratio)
    if not found_TD.numel():
        return
    expected = gradients(expected_TD, wide)
    found = gradients(found_TD, problem)
    assert found.keys() == problem.leaves().keys() and "x" in found
    for name, gradient in found.items():
        assert gradient.dtype == problem.leaves()[name].dtype
        assert_close(f"gradient of {name}", gradient, expected[name], ratio)


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ragged_sizes(tokens: int, k: int) -> None:
    assert_matches(make_problem(tokens, 16, k, width=5, model=6))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("surrogates", [False, True])
@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("experts", [1, 16, 64, 65])
def test_any_number_of_experts(
    experts: int, chains: bool, surrogates: bool, adapters: bool
) -> None:
    problem = make_problem(
        13,
        experts,
        min(3, experts),
        adapters=adapters,
        surrogates=surrogates,
        chains=chains,
    )
    assert_matches(problem)


def test_every_expert_of_every_token() -> None:
    """On the complete graph K = E is the whole FFN, and surrogates cancel."""
    problem = make_problem(9, 4, 4, surrogates=False)
    mask_MEE = torch.ones(1, 4, 4, dtype=torch.bool).triu()
    walked = walk(randn(9, 4, seed=1), mask_MEE, experts_per_token=4)
    assert bool(walked.visited_TE.all())
    walked = replace(walked, reached_TE=walked.reached_TE.double().requires_grad_())
    problem = replace(problem, walked=walked)
    assert_matches(problem)
    stood_in = make_problem(9, 4, 4).surrogates
    outcomes = [
        grouped_experts(
            problem.x_TD,
            walked,
            problem.combine_TE,
            problem.weights,
            adapters=problem.adapters,
            surrogates=surrogates,
        )
        for surrogates in (None, stood_in)
    ]
    assert_close("y", outcomes[1], outcomes[0], "fp64")


def test_all_tokens_may_visit_one_expert() -> None:
    scores_TE = torch.zeros(11, 4).index_fill(1, torch.tensor(2), 1.0)
    mask_MEE = torch.ones(1, 4, 4, dtype=torch.bool).triu()
    walked = walk(scores_TE, mask_MEE, experts_per_token=1)
    walked = replace(walked, reached_TE=walked.reached_TE.double().requires_grad_())
    problem = replace(make_problem(11, 4, 1), walked=walked)
    assert sort_visits(walked.expert_ids_TK, 4).offsets.tolist() == [0, 0, 0, 11, 11]
    assert_matches(problem)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loads", [(30, 34, 25, 31), (110, 3, 0, 7), (120, 0, 0, 0)])
def test_even_and_uneven_loads(loads: tuple[int, ...], shared: bool) -> None:
    """On a CPU: one padded batch, expert by expert, and one expert alone."""
    ids_T = torch.repeat_interleave(torch.arange(4), torch.tensor(loads))
    ids_T = ids_T[torch.randperm(120, generator=generator(1))]
    scores_TE = torch.zeros(120, 4).scatter(1, ids_T.unsqueeze(1), 1.0)
    mask_MEE = torch.ones(1, 4, 4, dtype=torch.bool).triu()
    walked = walk(scores_TE, mask_MEE, experts_per_token=1)
    bounds = sort_visits(walked.expert_ids_TK, 4).offsets.tolist()
    assert [stop - start for start, stop in zip(bounds, bounds[1:])] == list(loads)
    assert padding_pays(bounds, 15) == (loads[1] != 3)
    walked = replace(walked, reached_TE=walked.reached_TE.double().requires_grad_())
    problem = replace(make_problem(120, 4, 1), walked=walked)
    if shared:
        base_E = torch.tensor([3, 0, 0, 2])
        problem = replace(problem, weights=replace(problem.weights, base_E=base_E))
    assert_matches(problem)


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize(
    "dtype, ratio", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]
)
def test_lower_precision_stays_near_float64(
    dtype: torch.dtype, ratio: str, chains: bool
) -> None:
    problem = make_problem(29, 6, 3, width=16, model=32, dtype=dtype, chains=chains)
    assert_matches(calmed(problem), ratio)


def calmed(problem: Problem) -> Problem:
    """Smaller blocks and factors, so that chains do not run away."""

    def smaller(group: Any) -> Any:
        names = [field.name for field in fields(group)]
        parts = {name: getattr(group, name) for name in names}
        return replace(
            group,
            **{
                name: (0.3 * part.detach()).requires_grad_()
                for name, part in parts.items()
                if isinstance(part, Tensor)
            },
        )

    assert problem.adapters is not None
    return replace(
        problem,
        weights=smaller(problem.weights),
        adapters=smaller(problem.adapters),
    )


def test_visits_without_order_are_walks_without_chains() -> None:
    problem = make_problem(17, 5, 3)
    visits = Visits(
        reached_TE=problem.walked.reached_TE, chosen_TE=problem.walked.chosen_TE
    )
    flat = replace(problem, walked=visits)
    found_TD = compute(freeze(flat), experts_per_token=3)
    assert_close("y", found_TD, loop_experts(problem), "fp64")
    trained_TD = compute(flat, experts_per_token=3)
    assert_close("y by the reference", trained_TD, loop_experts(problem), "fp64")


def test_trained_blocks_run_by_the_reference() -> None:
    """Their gradients arrive, and are the loop's."""
    problem = make_problem(13, 5, 3)
    expected_TD = loop_experts(problem)
    found, expected = (
        gradients(y_TD, problem) for y_TD in (compute(problem), expected_TD)
    )
    assert set(FROZEN) <= found.keys()
    for name in FROZEN:
        assert bool(expected[name].any())
        assert_close(f"gradient of {name}", found[name], expected[name], "fp64")


def shared_blocks(problem: Problem) -> tuple[Problem, Problem]:
    """Experts 3 and 4 on the blocks of 0 and 1; and the same with copies."""
    base_E = torch.tensor([0, 1, 2, 0, 1])
    weights = problem.weights
    blocks = [
        part.detach()[:3]
        for part in (weights.gate_EFD, weights.up_EFD, weights.down_EFD)
    ]
    shared = ExpertWeights(
        gate_EFD=blocks[0], up_EFD=blocks[1], down_EFD=blocks[2], base_E=base_E
    )
    copies = shared.per_expert
    assert copies.base_E is None and len(copies.gate_EFD) == 5
    return replace(problem, weights=shared), replace(problem, weights=copies)


@pytest.mark.parametrize("chains", [False, True])
def test_experts_may_share_blocks(chains: bool) -> None:
    shared, copies = shared_blocks(freeze(make_problem(23, 5, 3, chains=chains)))
    expected_TD = loop_experts(copies)
    expected = gradients(expected_TD, copies)
    results = [compute(shared), compute(shared, reference.grouped_experts)]
    if not chains:
        results.append(
            reference.masked_dense_experts(
                shared.x_TD,
                shared.walked.reached_TE,
                shared.combine_TE,
                shared.weights,
                **shared.arguments(),
            )
        )
    for found_TD in results:
        assert_close("y", found_TD, expected_TD, "fp64")
        for name, gradient in gradients(found_TD, shared).items():
            assert_close(f"gradient of {name}", gradient, expected[name], "fp64")


def packed(problem: Problem) -> tuple[Problem, Nf4Weights]:
    """The problem over what its blocks are in NF4, and those."""
    weights = problem.weights
    nf4 = Nf4Weights(
        gate=quantise(weights.gate_EFD.detach()),
        up=quantise(weights.up_EFD.detach()),
        down=quantise(weights.down_EFD.detach()),
        base_E=weights.base_E,
    )
    return replace(problem, weights=nf4.unpack(problem.x_TD.dtype)), nf4


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("model", [64, 67])
@pytest.mark.parametrize(
    "dtype, ratio", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]
)
def test_nf4_is_what_its_codes_stand_for(
    dtype: torch.dtype, ratio: str, model: int, chains: bool
) -> None:
    """Widths of 43 rows: the last block of 64 weights of an expert is cut."""
    problem = make_problem(21, 5, 2, width=43, model=model, dtype=dtype, chains=chains)
    plain, nf4 = packed(calmed(problem))
    assert_matches(replace(plain, weights=plain.weights), ratio)
    found = compute(freeze(plain))
    packed_TD = compute(replace(freeze(plain), weights=nf4))
    assert_close("y", packed_TD, found, ratio)
    expected = gradients(found, plain_leaves := freeze(plain))
    for name, gradient in gradients(packed_TD, plain_leaves).items():
        assert_close(f"gradient of {name}", gradient, expected[name], ratio)


def test_nf4_experts_may_share_blocks() -> None:
    problem = freeze(make_problem(21, 5, 2, width=8, model=32, dtype=torch.float32))
    shared, _ = shared_blocks(problem)
    plain, nf4 = packed(shared)
    found_TD = compute(replace(plain, weights=nf4))
    by_reference_TD = compute(replace(plain, weights=nf4), reference.grouped_experts)
    assert_close("y", found_TD, compute(plain), "fp32")
    assert_close("y by the reference", by_reference_TD, compute(plain), "fp32")


@pytest.mark.parametrize("chains", [False, True])
def test_gradcheck(chains: bool) -> None:
    problem = freeze(make_problem(5, 3, 2, width=2, model=3, chains=chains))
    assert torch.autograd.gradcheck(
        lambda *_: compute(problem), tuple(problem.leaves().values())
    )


def op_arguments(
    *, adapters: bool, surrogates: bool, nf4: bool = False, save: bool = True
) -> tuple[Any, ...]:
    """Arguments of the op for 7 tokens, 3 experts of 4 rows and 2 slots."""

    def leaf(*shape: int, seed: int) -> Tensor:
        return randn(*shape, seed=seed, dtype=torch.float32).requires_grad_()

    ids_TK = torch.tensor([[0, 2], [2, -1], [2, 0], [0, -1], [2, 0], [0, 2], [0, -1]])
    order = sort_visits(ids_TK, 3)
    blocks = [randn(3, 4, 8, seed=seed) for seed in range(3)]
    if nf4:
        parts = [quantise(block) for block in blocks]
        blocks = [p.codes_EH for p in parts] + [p.absmax_EN for p in parts]
    rank = [leaf(7, 2, seed=5), leaf(7, 2, seed=6), leaf(3, 4, 2, seed=7)]
    rank += [leaf(3, 4, 2, seed=8), leaf(3, 2, 4, seed=9)]
    stand_ins = [leaf(7, 2, seed=10), randn(3, 2, 8, seed=11), leaf(7, 2, seed=12)]
    return (
        leaf(7, 8, seed=3),
        leaf(7, 2, seed=4),
        order.order_N,
        order.offsets,
        blocks,
        4,
        torch.tensor([0, 1, 0]),
        *(rank if adapters else [None] * 5),
        *(stand_ins if surrogates else [None] * 3),
        save,
    )


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("adapters, surrogates", [(False, False), (True, True)])
def test_opcheck(adapters: bool, surrogates: bool, nf4: bool) -> None:
    arguments = op_arguments(adapters=adapters, surrogates=surrogates, nf4=nf4)
    torch.library.opcheck(expert_mlp, arguments)


def test_backward_passes_need_what_they_read() -> None:
    y_TD, *_ = expert_mlp(*op_arguments(adapters=False, surrogates=False, save=False))
    with pytest.raises(ValueError, match="save=False; its backward needs save=True"):
        y_TD.sum().backward()


def test_nothing_is_kept_where_nobody_asks_for_gradients() -> None:
    arguments = op_arguments(adapters=True, surrogates=True, save=False)
    *_, gate_NF, up_NF = expert_mlp(*arguments)
    assert gate_NF.shape == up_NF.shape == (0, 4)
    found = expert_mlp(*arguments[:-1], True)
    assert torch.equal(found[0], expert_mlp(*arguments)[0])
    assert found[2].shape == (14, 4)


@pytest.mark.parametrize("chains", [False, True])
def test_compiles_as_one_graph(chains: bool) -> None:
    problem = freeze(make_problem(9, 4, 2, dtype=torch.float32, chains=chains))
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    found_TD, expected_TD = compiled(problem), compute(problem)
    assert torch.equal(found_TD, expected_TD)
    expected = gradients(expected_TD, problem)
    for name, gradient in gradients(found_TD, problem).items():
        assert_close(f"gradient of {name}", gradient, expected[name], "fp32")


def test_routing_and_experts_compile_as_one_graph() -> None:
    problem = freeze(make_problem(9, 4, 2, dtype=torch.float32))
    scores_TE = randn(9, 4, seed=20)
    mask_MEE = torch.ones(1, 4, 4, dtype=torch.bool).triu()

    def layer(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        visits = visit(scores_TE, mask_MEE, experts_per_token=2)
        order = sort_visits(visited_ids(visits.visited_TE, 2), 4)
        routed = replace(problem, x_TD=x_TD, walked=visits)
        return compute(routed, experts_per_token=2), order.offsets

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (found_TD, offsets), (expected_TD, _) = compiled(problem.x_TD), layer(problem.x_TD)
    assert int(offsets[-1]) == 18
    assert torch.equal(found_TD, expected_TD)
    (found,), (expected,) = (
        torch.autograd.grad(y_TD.square().sum(), problem.x_TD)
        for y_TD in (found_TD, expected_TD)
    )
    assert_close("gradient of x", found, expected, "fp32")


def test_batches_may_be_split_and_tokens_permuted() -> None:
    problem = freeze(make_problem(33, 6, 3, width=8, model=16))
    whole_TD = compute(problem)

    def some(index: Tensor) -> Tensor:
        walked = problem.walked
        names = ("expert_ids_TK", "parent_slot_TK", "depth_TK")
        names += ("reached_TE", "chosen_TE")
        part = Walk(**{name: getattr(walked, name)[index] for name in names})
        return compute(
            replace(
                problem,
                x_TD=problem.x_TD[index],
                combine_TE=problem.combine_TE[index],
                walked=part,
            )
        )

    tokens = torch.arange(33)
    halves_TD = torch.cat([some(tokens[:20]), some(tokens[20:])])
    assert_close("halves", halves_TD, whole_TD, "fp64")
    order_T = torch.randperm(33, generator=generator(0))
    assert_close("permuted", some(order_T), whole_TD[order_T], "fp64")


def test_the_same_bits_on_every_run() -> None:
    problem = freeze(make_problem(33, 6, 3, width=8, model=16, dtype=torch.float32))
    assert torch.equal(compute(problem), compute(problem))
    one, two = (gradients(compute(problem), problem) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_not_selected_is_not_read() -> None:
    """NaN in blocks, adapters and surrogates of an unvisited expert, and its weights."""
    problem = freeze(make_problem(19, 5, 2))
    visited_TE = problem.walked.visited_TE.clone()
    visited_TE[:, 3] = False
    rows_T = visited_TE.any(dim=1)
    ids_TK = visited_ids(visited_TE, 2)
    reached_TE = visited_TE.double().requires_grad_()
    walked = replace(
        problem.walked,
        expert_ids_TK=ids_TK,
        parent_slot_TK=torch.full_like(ids_TK, -1),
        depth_TK=torch.where(ids_TK >= 0, 0, -1),
        reached_TE=reached_TE,
    )
    clean = replace(problem, walked=walked, surrogates=None)
    nan = float("nan")
    combine_TE = clean.combine_TE.detach().masked_fill(~visited_TE, nan)
    adapters = clean.adapters
    assert adapters is not None and bool(rows_T.any())

    def poison(part: Tensor) -> Tensor:
        return part.detach().index_fill(0, torch.tensor(3), nan)

    poisoned = replace(
        clean,
        combine_TE=combine_TE.requires_grad_(),
        weights=ExpertWeights(
            gate_EFD=poison(clean.weights.gate_EFD),
            up_EFD=poison(clean.weights.up_EFD),
            down_EFD=poison(clean.weights.down_EFD),
        ),
        adapters=replace(
            adapters,
            gate_EFR=poison(adapters.gate_EFR).requires_grad_(),
            up_EFR=poison(adapters.up_EFR).requires_grad_(),
            down_ERF=poison(adapters.down_ERF).requires_grad_(),
        ),
    )
    found_TD, expected_TD = compute(poisoned), compute(clean)
    assert torch.equal(found_TD, expected_TD)
    expected = gradients(expected_TD, clean)
    for name, gradient in gradients(found_TD, poisoned).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"combine_TE": torch.zeros(8, 4)},
            r"combine_TE has shape \(8, 4\); it must be \(9, 4\)",
        ),
        (
            {"combine_TE": torch.zeros(9, 3)},
            r"reached_TE has shape \(9, 4\); it must be \(9, 3\)",
        ),
        ({"x_TD": torch.zeros(9, 5).half()}, "dtype torch.float16; it must be"),
        (
            {"x_TD": torch.zeros(9, 5)},
            "x_TD is torch.float32; these weights need torch.float64",
        ),
        ({"x_TD": torch.zeros(9, 6).double()}, r"they must be \(4, 3, 6\)"),
        ({"x_TD": torch.zeros(9, 1, 5).double()}, r"shape \(9, 1, 5\)"),
        ({"edge_strength_EE": torch.zeros(3, 4)}, r"it must be \(4, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    problem = freeze(make_problem(9, 4, 2))
    with pytest.raises(ValueError, match=message):
        compute(replace(problem, **changes))


def test_all_faults_are_named_at_once() -> None:
    problem = freeze(make_problem(9, 4, 2))
    assert problem.adapters is not None and problem.surrogates is not None
    wrong = replace(
        problem,
        adapters=replace(problem.adapters, up_EFR=torch.zeros(4, 2, 3)),
        surrogates=replace(problem.surrogates, bias_ED=torch.zeros(4, 6)),
    )
    message = r"up_EFR has shape \(4, 2, 3\).*; bias_ED has shape \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        compute(wrong)


def test_visits_need_their_number_and_have_no_chains() -> None:
    problem = freeze(make_problem(9, 4, 2, chains=True))
    visits = Visits(
        reached_TE=problem.walked.reached_TE, chosen_TE=problem.walked.chosen_TE
    )
    flat = replace(problem, walked=visits)
    with pytest.raises(ValueError, match="needs the order of the visits"):
        compute(flat, experts_per_token=2)
    with pytest.raises(ValueError, match=r"experts_per_token is None; .* in 1..4"):
        compute(replace(flat, edge_strength_EE=None))


def test_blocks_for_fewer_experts_need_to_be_assigned() -> None:
    shared, _ = shared_blocks(freeze(make_problem(9, 5, 2)))
    lost = replace(shared, weights=replace(shared.weights, base_E=None))
    with pytest.raises(ValueError, match="3 blocks for 5 experts; base_E must say"):
        compute(lost)
    _, nf4 = packed(replace(lost, x_TD=lost.x_TD.float()))
    with pytest.raises(
        ValueError, match="x_TD is torch.float64; these weights need torch.bfloat16 or"
    ):
        compute(replace(shared, weights=nf4))
