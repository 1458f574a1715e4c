"""The converted layer: routing, combining, surrogates, orders, prefixes, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.experts import moe_layers
from samv2.experts.calibration import Gate
from samv2.experts.costs import ffn_flops_fraction
from samv2.experts.moe_layers import (
    ExpertGraphMLP,
    FrozenFactors,
    PrefixState,
    WalkOptions,
    to_positions,
)
from samv2.experts.repair import Repair
from samv2_kernels import ExpertWeights, Surrogates, Walk, count_usage
from tests.helpers import assert_close, randn

EXPERTS, ROWS, WIDTH, RANK = 6, 4, 8, 2
COMPLETE = torch.ones(EXPERTS, EXPERTS, dtype=torch.bool).triu()


def make_layer(*, surrogates: bool = True, **changes: Any) -> ExpertGraphMLP:
    """A random layer on the complete graph; K = 3, one shared expert."""
    values: dict[str, Any] = dict(
        layer=2,
        weights=ExpertWeights(
            gate_EFD=randn(EXPERTS, ROWS, WIDTH, seed=1),
            up_EFD=randn(EXPERTS, ROWS, WIDTH, seed=2),
            down_EFD=randn(EXPERTS, ROWS, WIDTH, seed=3),
        ),
        gate=Gate(
            weight_ED=randn(EXPERTS, WIDTH, seed=4), bias_E=randn(EXPERTS, seed=5)
        ),
        surrogates=(
            Surrogates(
                shared_QD=randn(RANK, WIDTH, seed=6),
                out_EQD=randn(EXPERTS, RANK, WIDTH, seed=7),
                bias_ED=randn(EXPERTS, WIDTH, seed=8),
            )
            if surrogates
            else None
        ),
        factors=FrozenFactors(
            gate_RD=randn(RANK, WIDTH, seed=9),
            up_RD=randn(RANK, WIDTH, seed=10),
            down_DR=randn(WIDTH, RANK, seed=11),
            scale=0.5,
        ),
        edge_mask_EE=COMPLETE.clone(),
        order_E=torch.arange(EXPERTS),
        num_shared=1,
        experts_per_token=3,
        prefix_tokens=4,
    )
    return ExpertGraphMLP(**(values | changes))


def group(always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group always or never, whatever is faster."""
    monkeypatch.setattr(moe_layers, "grouping_pays", lambda *_: always)


def fill_parameters(layer: ExpertGraphMLP, *names: str) -> None:
    for seed, name in enumerate(names):
        parameter = getattr(layer, name)
        parameter.data = randn(*parameter.shape, seed=20 + seed)


def run(
    layer: ExpertGraphMLP, x_BSD: Tensor, **options: Any
) -> tuple[Tensor, list[Walk]]:
    walks: list[Walk] = []
    choice = WalkOptions(recorder=lambda _, walked: walks.append(walked), **options)
    return layer(x_BSD, choice)[0], walks


def dense_ffn(layer: ExpertGraphMLP, x_BSD: Tensor) -> Tensor:
    gate, up, down = (
        w.flatten(0, 1) for w in (layer.gate_EFD, layer.up_EFD, layer.down_EFD)
    )
    return (F.silu(x_BSD @ gate.T) * (x_BSD @ up.T)) @ down


def every_expert(layer: ExpertGraphMLP, x_TD: Tensor) -> Tensor:
    """(T, E, D): FFN_e(x) of the base experts."""
    gate_TEF = torch.einsum("td,efd->tef", x_TD, layer.gate_EFD)
    up_TEF = torch.einsum("td,efd->tef", x_TD, layer.up_EFD)
    return torch.einsum("tef,efd->ted", F.silu(gate_TEF) * up_TEF, layer.down_EFD)


def scores_of(layer: ExpertGraphMLP, x_TD: Tensor) -> Tensor:
    return x_TD @ layer.gate_weight_ED.T + layer.gate_bias_E


X = randn(2, 7, WIDTH, seed=0)
X_TD = X.flatten(0, 1)


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("num_shared", [0, 1, EXPERTS])
def test_k_equal_to_e_is_the_dense_ffn(num_shared: int, chains: bool) -> None:
    layer = make_layer(num_shared=num_shared, experts_per_token=EXPERTS, chains=chains)
    output, _ = run(layer, X)
    assert_close("y", output, dense_ffn(layer, X), "fp32")


@pytest.mark.parametrize("surrogates", [False, True])
def test_unit_sums_visited_experts_and_stand_ins_of_the_others(
    surrogates: bool,
) -> None:
    layer = make_layer(surrogates=surrogates)
    fill_parameters(layer, "mix_E")
    output, (walked,) = run(layer, X)
    visited_TE = walked.visited_TE
    assert bool((visited_TE.sum(1) == 3).all()) and bool(visited_TE[:, 0].all())
    routed_TE = scores_of(layer, X_TD)[:, 1:]
    share_TE = F.pad(torch.softmax(routed_TE, dim=1), (1, 0))
    weight_TE = (1 + layer.mix_E * share_TE) * visited_TE
    expected = (weight_TE.unsqueeze(2) * every_expert(layer, X_TD)).sum(1)
    if layer.surrogates is not None:
        low_TQ = X_TD @ layer.surrogates.shared_QD.T
        for e in range(EXPERTS):
            stand_in = (
                low_TQ @ layer.surrogates.out_EQD[e] + layer.surrogates.bias_ED[e]
            )
            expected = expected + stand_in * ~visited_TE[:, e : e + 1]
    assert_close("y", output.flatten(0, 1), expected, "fp32")


def test_routed_experts_are_the_best_scores_beside_the_shared_ones() -> None:
    layer = make_layer(num_shared=2, experts_per_token=4)
    _, (walked,) = run(layer, X)
    best = scores_of(layer, X_TD)[:, 2:].topk(2, dim=1).indices + 2
    for visited, top in zip(walked.visited_TE, best.tolist()):
        assert set(visited.nonzero().flatten().tolist()) == {0, 1, *top}


def test_softmax_weighs_the_visited_experts_and_adds_no_stand_ins() -> None:
    layer = make_layer(combine="softmax", num_shared=0)
    output, _ = run(layer, X)
    scores_TE = scores_of(layer, X_TD)
    best = scores_TE.topk(3, dim=1)
    weight_TE = torch.zeros_like(scores_TE).scatter(
        1, best.indices, torch.softmax(best.values, dim=1)
    )
    expected = (weight_TE.unsqueeze(2) * every_expert(layer, X_TD)).sum(1)
    assert_close("y", output.flatten(0, 1), expected, "fp32")


@pytest.mark.parametrize("k", [1, 2, 4])
def test_grouped_and_masked_dense_layers_agree(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in every gradient, on a sparse graph: which one runs is a matter of speed."""
    results = []
    mask = torch.eye(EXPERTS, dtype=torch.bool)
    mask[3, 3], mask[2, 3] = False, True
    for grouped in (False, True):
        group(grouped, monkeypatch)
        layer = make_layer(edge_mask_EE=mask, experts_per_token=k)
        fill_parameters(
            layer, "mix_E", "adapter_gate_EFR", "adapter_up_EFR", "adapter_down_ERF"
        )
        x = X.clone().requires_grad_()
        output, _ = run(layer, x)
        (output * randn(*output.shape, seed=50)).sum().backward()
        found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        results.append(found | {"x": x.grad, "y": output})
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        assert_close(name, results[0][name], results[1][name], "fp32")


def test_k_of_the_options_overrides_the_layers() -> None:
    layer = make_layer()
    for k in (1, 2, EXPERTS):
        _, (walked,) = run(layer, X, experts_per_token=k)
        assert bool((walked.visited_TE.sum(1) == k).all())
    assert layer.experts_per_token == 3


@pytest.mark.parametrize("k", [0, 1, EXPERTS + 1])
def test_a_k_that_cannot_be_walked_is_refused(k: int) -> None:
    message = f"experts_per_token is {k}; with 2 shared experts of 6 .* 2..6"
    with pytest.raises(ModelError, match=message):
        make_layer(num_shared=2, experts_per_token=k)
    layer = make_layer(num_shared=2)
    with pytest.raises(ModelError, match=message):
        run(layer, X, experts_per_token=k)


def test_an_unknown_combine_is_refused() -> None:
    with pytest.raises(ModelError, match="experts.combine is 'mean'; use one of"):
        make_layer(combine="mean")


ORDER = torch.tensor([3, 0, 5, 1, 4, 2])


def test_an_order_changes_no_output_on_the_complete_graph() -> None:
    plain, ordered = make_layer(), make_layer(order_E=ORDER)
    expected, (plain_walk,) = run(plain, X)
    output, (walked,) = run(ordered, X)
    assert_close("y", output, expected, "fp32")
    assert torch.equal(walked.reached_TE, plain_walk.reached_TE)
    assert torch.equal(walked.chosen_TE, plain_walk.chosen_TE)
    for ids, plain_ids in zip(walked.expert_ids_TK, plain_walk.expert_ids_TK):
        assert set(ids.tolist()) == set(plain_ids.tolist())


def test_walks_are_recorded_in_storage_ids_and_counted_in_positions() -> None:
    mask = torch.eye(EXPERTS, dtype=torch.bool)
    mask[3, 3], mask[0, 3] = False, True
    layer = make_layer(edge_mask_EE=mask, order_E=ORDER, num_shared=0)
    _, (walked,) = run(layer, X)
    top = scores_of(layer, X_TD).topk(3, dim=1).indices.tolist()
    for token, best in enumerate(top):
        expected = set(best) - ({1} if 3 not in best else set())
        found = {e for e in walked.expert_ids_TK[token].tolist() if e >= 0}
        assert found == expected, "position 3, expert 1, continues from expert 3 only"
    placed = to_positions(walked, layer.order_E)
    assert torch.equal(placed.reached_TE[:, 3], walked.reached_TE[:, 1])
    counts = count_usage(placed, mask)
    under = sum(1 in best and 3 in best for best in top)
    assert under and int(counts.usage_EE[0, 3]) == under
    assert int(counts.demand_EE[3, 3]) == sum(1 in best for best in top)
    assert int(counts.usage_EE.sum()) == int((walked.expert_ids_TK >= 0).sum())


def test_trainable_parameters_get_gradients_and_nothing_else_does() -> None:
    layer = make_layer(chains=True)
    fill_parameters(layer, "adapter_gate_EFR", "adapter_up_EFR", "adapter_down_ERF")
    output, _ = run(layer, X)
    output.square().sum().backward()
    grads = {n: p.grad for n, p in layer.named_parameters()}
    for name, gradient in grads.items():
        assert gradient is not None and bool(gradient.any()), name
    assert not bool(grads["edge_strength_EE"].tril().any())
    assert float(grads["mix_E"][0]) == 0, "the shared expert is not routed"
    assert all(not buffer.requires_grad for buffer in layer.buffers())


def test_u_has_the_gradient_of_its_formula() -> None:
    layer = make_layer(num_shared=0)
    output, (walked,) = run(layer, X)
    probe = randn(*output.shape, seed=30).flatten(0, 1)
    (gradient,) = torch.autograd.grad((output.flatten(0, 1) * probe).sum(), layer.mix_E)
    share_TE = torch.softmax(scores_of(layer, X_TD), dim=1) * walked.visited_TE
    outputs_TED = every_expert(layer, X_TD)
    expected = (share_TE * torch.einsum("ted,td->te", outputs_TED, probe)).sum(0)
    assert_close("u", gradient, expected, "fp32")


def test_the_gate_learns_which_visits_help() -> None:
    """d y / d g_e = sigmoid'(g_e - threshold) (FFN_e - S_e) of visited experts."""
    layer = make_layer(num_shared=0)
    output, (walked,) = run(layer, X)
    probe = randn(*output.shape, seed=31).flatten(0, 1)
    loss = (output.flatten(0, 1) * probe).sum()
    (gradient,) = torch.autograd.grad(loss, layer.gate_bias_E)
    scores_TE = scores_of(layer, X_TD).detach()
    soft_TE = torch.sigmoid(scores_TE - scores_TE.topk(3, dim=1).values[:, -1:])
    surrogates = layer.surrogates
    assert surrogates is not None
    low_TQ = X_TD @ surrogates.shared_QD.T
    stand_in = torch.einsum("tq,eqd->ted", low_TQ, surrogates.out_EQD)
    gain_TED = every_expert(layer, X_TD) - stand_in - surrogates.bias_ED
    expected_TE = torch.einsum("ted,td->te", gain_TED, probe) * walked.visited_TE
    expected_TE = expected_TE * soft_TE * (1 - soft_TE)
    assert_close("gate", gradient, expected_TE.sum(0), "fp32")


class FakeAssembler:
    """Keeps the server graph and remembers the contexts that it was given."""

    def __init__(self) -> None:
        self.contexts: list[Tensor] = []
        self.bias = torch.zeros(EXPERTS, EXPERTS, requires_grad=True)

    def __call__(
        self, context_BD: Tensor, layer: int, server_mask_EE: Tensor, **_: Any
    ) -> Tensor:
        assert layer == 2
        self.contexts.append(context_BD)
        mask_EE = server_mask_EE.float() + (self.bias - self.bias.detach())
        return mask_EE.expand(len(context_BD), -1, -1)


def test_the_assembler_sees_the_mean_of_the_prefix_alone() -> None:
    assembler = FakeAssembler()
    layer = make_layer(assembler=assembler)
    run(layer, X)
    (context,) = assembler.contexts
    assert_close("context", context, X[:, :4].mean(dim=1), "fp32")
    run(layer, X[:, :4])
    run(layer, X, use_assembler=False)
    assert len(assembler.contexts) == 1, "nothing follows the prefix, or it is off"


def test_the_context_carries_no_gradient() -> None:
    assembler = FakeAssembler()
    run(make_layer(assembler=assembler), X.clone().requires_grad_())
    assert not assembler.contexts[0].requires_grad


def test_masks_hold_from_the_first_position_after_the_prefix() -> None:
    """A mask that only lets expert 5 in, on a layer without shared experts."""

    def only_five(
        context_BD: Tensor, layer: int, server_EE: Tensor, **_: Any
    ) -> Tensor:
        mask_BEE = torch.zeros(len(context_BD), EXPERTS, EXPERTS)
        mask_BEE[:, 5, 5] = 1.0
        return mask_BEE

    layer = make_layer(assembler=only_five, num_shared=0)
    _, (walked,) = run(layer, X)
    visits_BS = walked.visited_TE.sum(dim=1).view(2, 7)
    assert visits_BS[:, :4].tolist() == [[3] * 4] * 2
    assert visits_BS[:, 4:].tolist() == [[1] * 3] * 2
    assert bool(walked.visited_TE.view(2, 7, EXPERTS)[:, 4:, 5].all())


def test_edges_of_the_assembler_get_gradients() -> None:
    assembler = FakeAssembler()
    layer = make_layer(assembler=assembler, num_shared=0)
    output, _ = run(layer, X)
    output.square().sum().backward()
    assert assembler.bias.grad is not None
    assert bool(assembler.bias.grad.diagonal().any())
    assert not bool(assembler.bias.grad.tril(-1).any())


@pytest.mark.parametrize(
    "cuts", [(7,), (3, 7), (4, 5, 7), (5, 7), (1, 2, 3, 4, 5, 6, 7)]
)
def test_chunks_with_their_state_are_the_whole(cuts: tuple[int, ...]) -> None:
    assembler = FakeAssembler()
    layer = make_layer(assembler=assembler)
    whole, state = layer(X)
    pieces, chunk_state, start = [], None, 0
    for stop in cuts:
        piece, chunk_state = layer(X[:, start:stop], prefix=chunk_state)
        pieces.append(piece)
        start = stop
    assert_close("y", torch.cat(pieces, dim=1), whole, "fp32")
    assert isinstance(chunk_state, PrefixState)
    assert (
        (chunk_state.count, chunk_state.offset) == (state.count, state.offset) == (4, 7)
    )
    assert_close("sum", chunk_state.sum_BD, state.sum_BD, "fp32")


def test_an_empty_batch_is_an_empty_output() -> None:
    for chains in (False, True):
        output, _ = run(make_layer(chains=chains), X[:0])
        assert output.shape == (0, 7, WIDTH)


def test_bfloat16_layers_keep_their_dtype() -> None:
    wide = make_layer()
    half = make_layer()
    for name, buffer in half.named_buffers():
        if buffer.is_floating_point():
            setattr(half, name, buffer.bfloat16())
    output, _ = run(half, X.bfloat16(), experts_per_token=EXPERTS)
    assert output.dtype == torch.bfloat16
    expected, _ = run(wide, X, experts_per_token=EXPERTS)
    assert_close("y", output, expected, "bf16")


def test_flops_are_counted_by_hand() -> None:
    """D 10, M 40, E 8, F 5, Q 2: dense 1200; gate 80; an expert 150."""
    sizes = dict(model_width=10, ffn_width=40, num_experts=8, surrogate_rank=2)
    fraction = ffn_flops_fraction(**sizes, experts_per_token=2)
    assert fraction == pytest.approx((80 + 300 + 20 * (1 + 3)) / 1200)
    fraction = ffn_flops_fraction(**sizes, experts_per_token=6)
    assert fraction == pytest.approx((80 + 900 + 20 * (1 + 2)) / 1200)
    fraction = ffn_flops_fraction(**sizes, experts_per_token=8)
    assert fraction == pytest.approx((80 + 1200) / 1200)


def test_a_repair_replaces_the_stand_ins_in_the_flops() -> None:
    """D 10, M 40, E 8, F 5, Q 2: dense 1200; gate 80; an expert 150; a repair 40."""
    sizes = dict(model_width=10, ffn_width=40, num_experts=8, surrogate_rank=3)
    for k, expected in ((2, 80 + 300 + 40), (7, 80 + 1050 + 40), (8, 80 + 1200)):
        fraction = ffn_flops_fraction(**sizes, experts_per_token=k, repair_rank=2)
        assert fraction == pytest.approx(expected / 1200)
    fraction = ffn_flops_fraction(**sizes, experts_per_token=2, repair_rank=0)
    assert fraction == pytest.approx(380 / 1200)


ADAPTERS = ("adapter_gate_EFR", "adapter_up_EFR", "adapter_down_ERF")


def make_repair(seed: int = 70, rank: int = RANK) -> Repair:
    return Repair(
        down_EFD=randn(EXPERTS, ROWS, WIDTH, seed=seed),
        in_QD=randn(rank, WIDTH, seed=seed + 1),
        out_QD=randn(rank, WIDTH, seed=seed + 2),
        bias_D=randn(WIDTH, seed=seed + 3),
    )


def repaired_by_hand(
    layer: ExpertGraphMLP, repair: Repair, x_TD: Tensor, walked: Walk
) -> Tensor:
    """Token by token and visit by visit; adapters, u and chains included."""
    scores_TE = scores_of(layer, x_TD).masked_fill(layer.shared_E, -torch.inf)
    share_TE = torch.softmax(scores_TE, dim=1)
    rows = []
    for token, x_D in enumerate(x_TD):
        y_D = (x_D @ repair.in_QD.T) @ repair.out_QD + repair.bias_D
        made: list[Tensor] = []
        ids = walked.expert_ids_TK[token].tolist()
        parents = walked.parent_slot_TK[token].tolist()
        for expert, parent in zip(ids, parents):
            if expert < 0:
                break
            h_D = x_D
            if layer.chains and parent >= 0:
                strength = layer.edge_strength_EE[ids[parent], expert]
                h_D = h_D + strength * made[parent]
            low = layer.scale * layer.factor_gate_RD @ h_D
            gate_F = layer.gate_EFD[expert] @ h_D + layer.adapter_gate_EFR[expert] @ low
            low = layer.scale * layer.factor_up_RD @ h_D
            up_F = layer.up_EFD[expert] @ h_D + layer.adapter_up_EFR[expert] @ low
            hidden_F = F.silu(gate_F) * up_F
            low = layer.scale * layer.adapter_down_ERF[expert] @ hidden_F
            made.append(hidden_F @ repair.down_EFD[expert] + layer.factor_down_DR @ low)
            weight = 1 + layer.mix_E[expert] * share_TE[token, expert]
            y_D = y_D + weight * made[-1]
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("how", ["masked", "grouped", "chains"])
def test_a_repaired_layer_is_its_formula(
    how: str, rank: int, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way the visits run, and whether or not their order is looked at."""
    group(how == "grouped", monkeypatch)
    layer, repair = make_layer(chains=how == "chains"), make_repair(rank=rank)
    layer.add_repair(3, repair)
    fill_parameters(layer, "mix_E", "edge_strength_EE", *ADAPTERS)
    output, (walked,) = run(layer, X)
    if not recorded:
        output = layer(X)[0]
    expected = repaired_by_hand(layer, repair, X_TD, walked)
    assert_close("y", output.flatten(0, 1), expected, "fp32")


def test_chains_matter_to_a_repaired_layer() -> None:
    """Or the test above would hold of a layer without them."""
    outputs = []
    for chains in (False, True):
        layer = make_layer(chains=chains)
        layer.add_repair(3, make_repair())
        fill_parameters(layer, "edge_strength_EE")
        outputs.append(run(layer, X)[0])
    assert float((outputs[0] - outputs[1]).detach().abs().max()) > 0.1


@pytest.mark.parametrize("chains", [False, True])
def test_a_k_without_a_repair_of_its_own_is_left_alone(chains: bool) -> None:
    plain, repaired = make_layer(chains=chains), make_layer(chains=chains)
    repaired.add_repair(4, make_repair(80))
    repaired.add_repair(3, make_repair())
    assert repaired.repaired == (3, 4) and plain.repaired == ()
    for layer in (plain, repaired):
        fill_parameters(layer, "mix_E", *ADAPTERS)
    for k in (1, 2, 5, EXPERTS):
        expected, found = (
            run(layer, X, experts_per_token=k)[0] for layer in (plain, repaired)
        )
        assert torch.equal(found, expected), k
        assert repaired.repair(k) is None
    for k in (3, 4):
        found = run(repaired, X, experts_per_token=k)[0]
        assert not torch.equal(found, run(plain, X, experts_per_token=k)[0])
        expected = repaired_by_hand(
            repaired,
            make_repair(80 if k == 4 else 70),
            X_TD,
            run(repaired, X, experts_per_token=k)[1][0],
        )
        assert_close(f"K = {k}", found.flatten(0, 1), expected, "fp32")


def test_adapters_add_their_part_to_a_repair() -> None:
    """What they add to the down projection is the same with and without one."""
    parts = []
    for repaired in (False, True):
        outputs = []
        for filled in (False, True):
            layer = make_layer(surrogates=False)
            if repaired:
                layer.add_repair(3, make_repair())
            if filled:
                fill_parameters(layer, "adapter_down_ERF")
            outputs.append(run(layer, X)[0])
        parts.append(outputs[1] - outputs[0])
    assert float(parts[0].detach().abs().max()) > 0.1
    assert_close("adapters", parts[1], parts[0], "fp32")


@pytest.mark.parametrize("how", ["masked", "grouped", "chains"])
def test_gradients_pass_a_repaired_layer(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the formula, from plain loops; the repair itself is frozen."""
    group(how == "grouped", monkeypatch)
    layer, repair = make_layer(chains=how == "chains"), make_repair()
    layer.add_repair(3, repair)
    fill_parameters(layer, "mix_E", "edge_strength_EE", *ADAPTERS)
    probe = randn(2 * 7, WIDTH, seed=90)
    output, (walked,) = run(layer, X)
    (output.flatten(0, 1) * probe).sum().backward()
    found = {n: p.grad for n, p in layer.named_parameters()}
    for name in ("gate_weight_ED", "gate_bias_E", *ADAPTERS):
        assert found[name] is not None and bool(found[name].any()), name
    assert (found["edge_strength_EE"] is not None) == (how == "chains")
    assert all(not buffer.requires_grad for buffer in layer.buffers())
    layer.zero_grad()
    by_hand = repaired_by_hand(layer, repair, X_TD.clone(), walked)
    (by_hand * probe).sum().backward()
    for name in ADAPTERS:
        assert_close(name, found[name], getattr(layer, name).grad, "fp32")


@pytest.mark.parametrize("grouped", [False, True])
def test_the_gate_of_a_repaired_layer_learns_what_a_visit_adds(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d y / d g_e = sigmoid'(g_e - threshold) h_e D_e of visited experts."""
    group(grouped, monkeypatch)
    layer, repair = make_layer(num_shared=0), make_repair()
    layer.add_repair(3, repair)
    probe = randn(2 * 7, WIDTH, seed=90)
    output, (walked,) = run(layer, X)
    loss = (output.flatten(0, 1) * probe).sum()
    (gradient,) = torch.autograd.grad(loss, layer.gate_bias_E)
    scores_TE = scores_of(layer, X_TD).detach()
    soft_TE = torch.sigmoid(scores_TE - scores_TE.topk(3, dim=1).values[:, -1:])
    layer.down_EFD = repair.down_EFD
    gain_TE = torch.einsum("ted,td->te", every_expert(layer, X_TD), probe)
    expected_TE = gain_TE * walked.visited_TE * soft_TE * (1 - soft_TE)
    assert_close("gate", gradient, expected_TE.sum(0), "fp32")


@pytest.mark.parametrize("how", ["masked", "grouped", "chains"])
def test_inputs_of_a_repaired_layer_get_the_gradient_of_its_formula(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scores that do not depend on them, so that visits are the same for all."""
    group(how == "grouped", monkeypatch)
    layer, repair = make_layer(chains=how == "chains"), make_repair()
    layer.add_repair(3, repair)
    fill_parameters(layer, "mix_E", "edge_strength_EE", *ADAPTERS)
    layer.gate_weight_ED.data.zero_()
    probe, x_TD = randn(2 * 7, WIDTH, seed=90), X_TD.clone().requires_grad_()
    output, (walked,) = run(layer, x_TD.view(X.shape))
    (found,) = torch.autograd.grad((output.flatten(0, 1) * probe).sum(), x_TD)
    by_hand = repaired_by_hand(layer, repair, x_TD, walked)
    (expected,) = torch.autograd.grad((by_hand * probe).sum(), x_TD)
    assert_close("x", found, expected, "fp32")


@pytest.mark.parametrize("k", [-1, 0, EXPERTS, EXPERTS + 1])
def test_a_repair_for_a_k_that_loses_nothing_is_refused(k: int) -> None:
    layer = make_layer()
    message = f"a repair for K = {k} of 6 experts was given; only a K in 1..5"
    with pytest.raises(ModelError, match=message):
        layer.add_repair(k, make_repair())
    assert layer.repaired == () and "repair" not in "".join(layer.state_dict())


def test_a_repair_of_a_softmax_layer_is_refused() -> None:
    layer = make_layer(combine="softmax", num_shared=0)
    with pytest.raises(ModelError, match="combine is 'softmax'; repairs .* 'unit'"):
        layer.add_repair(3, make_repair())


def test_a_second_repair_takes_the_place_of_the_first() -> None:
    layer = make_layer()
    layer.add_repair(3, make_repair())
    layer.add_repair(3, make_repair(80))
    assert layer.repaired == (3,)
    found, (walked,) = run(layer, X)
    expected = repaired_by_hand(layer, make_repair(80), X_TD, walked)
    assert_close("y", found.flatten(0, 1), expected, "fp32")


def test_repairs_are_part_of_the_layers_state() -> None:
    layer = make_layer()
    layer.add_repair(3, make_repair())
    names = {name for name in layer.state_dict() if "repair" in name}
    assert names == {
        f"repair_3_{part}" for part in ("down_EFD", "in_QD", "out_QD", "bias_D")
    }
    assert not any("repair" in name for name, _ in layer.named_parameters())


def test_a_layer_may_visit_more_or_fewer_than_k() -> None:
    layer = make_layer(visits={4: 6, 3: 2})
    layer.add_repair(4, make_repair())
    for k, own in ((4, 6), (3, 2), (2, 2), (5, 5)):
        assert layer.visits_at(k) == own
        output, (walked,) = run(layer, X, experts_per_token=k)
        assert walked.expert_ids_TK.shape == (14, own)
        assert bool((walked.visited_TE.sum(dim=1) == own).all())
        assert torch.equal(layer.visited(X_TD, k), walked.visited_TE)
        if k == 4:
            expected = repaired_by_hand(layer, make_repair(), X_TD, walked)
            assert_close("y", output.flatten(0, 1), expected, "fp32")
    plain = make_layer()
    expected = run(plain, X, experts_per_token=2)[0]
    assert torch.equal(run(layer, X)[0], expected), "K = 3 runs as two visits"


@pytest.mark.parametrize("visits", [0, EXPERTS + 1])
def test_visits_that_cannot_be_made_are_refused(visits: int) -> None:
    with pytest.raises(ModelError, match=f"experts_per_token is {visits}; .* 1..6"):
        make_layer(visits={4: visits})


def test_what_inputs_visit_can_be_asked_for() -> None:
    """On the server graph, in storage ids, also where experts are ordered."""
    mask = torch.eye(EXPERTS, dtype=torch.bool)
    mask[3, 3], mask[0, 3] = False, True
    layer = make_layer(edge_mask_EE=mask, order_E=ORDER)
    for k in (1, 2, 4, EXPERTS):
        _, (walked,) = run(layer, X, experts_per_token=k)
        visited_TE = layer.visited(X_TD, k)
        assert visited_TE.dtype == torch.bool
        assert torch.equal(visited_TE, walked.visited_TE)


def test_the_order_of_visits_is_found_only_where_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for name in ("walk", "visit"):
        original = getattr(moe_layers, name)

        def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(moe_layers, name, spy)
    layer = make_layer()
    plain = layer(X)[0]
    recorded = run(layer, X)[0]
    assert torch.equal(plain, recorded)
    make_layer(chains=True)(X)
    group(True, monkeypatch)
    layer(X)
    assert calls == ["visit", "walk", "walk", "visit"]


LLAMA_7B, SMOLLM2, NARROW = (16, 688, 4096), (16, 96, 576), (64, 24, 576)


@pytest.mark.parametrize(
    "tokens, visits, shape, grouped",
    [
        (512, 2, LLAMA_7B, True),
        (512, 8, LLAMA_7B, True),
        (16, 8, LLAMA_7B, True),
        (16, 15, LLAMA_7B, False),
        (1, 2, LLAMA_7B, True),
        (512, 16, LLAMA_7B, False),
        (1024, 2, SMOLLM2, True),
        (1024, 8, SMOLLM2, True),
        (1024, 15, SMOLLM2, False),
        (64, 2, SMOLLM2, True),
        (64, 8, SMOLLM2, False),
        (16, 1, SMOLLM2, False),
        (1024, 16, NARROW, True),
        (1024, 32, NARROW, False),
        (64, 4, NARROW, False),
        (1024, 1, (1, 1536, 576), False),
    ],
)
def test_grouping_pays_where_enough_work_is_left_out(
    tokens: int, visits: int, shape: tuple[int, int, int], grouped: bool
) -> None:
    assert moe_layers.grouping_pays(tokens, visits, shape) == grouped


def test_chains_are_always_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    group(False, monkeypatch)
    assert make_layer(chains=True)._groups(X_TD, 3)
    assert not make_layer()._groups(X_TD, 3)
    group(True, monkeypatch)
    assert make_layer()._groups(X_TD, 3)
