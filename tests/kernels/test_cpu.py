"""The CPU kernels: how much work and memory they take, batches, and NF4 paths."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from samv2_kernels import (
    DecodingWeights,
    ExpertWeights,
    Nf4Weights,
    can_decode,
    cpu,
    for_decoding,
    grouped_experts,
    sort_visits,
    visit,
)
from samv2_kernels.cpu import blocks as cpu_blocks
from samv2_kernels.cpu import nf4 as cpu_nf4
from samv2_kernels.cpu import passes as cpu_passes
from samv2_kernels.cpu.batches import BATCH_VALUES, Sums, runs
from samv2_kernels.cpu.padded import (
    Padded,
    pad_sorted,
    pad_visited,
    padding_pays,
    shares,
)
from samv2_kernels.nf4 import Nf4Experts, dequantise, quantise
from tests.helpers import assert_close, randn
from tests.kernels.test_grouped_mlp import make_problem

ROWS, WIDTH, EXPERTS, SLOTS, TOKENS = 48, 64, 8, 2, 20
COMPLETE = torch.ones(1, EXPERTS, EXPERTS, dtype=torch.bool).triu()


def ids(seed: int = 0) -> Tensor:
    """(T, K) the best experts of random scores."""
    return randn(TOKENS, EXPERTS, seed=seed).topk(SLOTS, dim=1).indices


def arguments(weights: list[Tensor], ids_TK: Tensor) -> list[Any]:
    """Of the op, without adapters and surrogates."""
    order = sort_visits(ids_TK, EXPERTS)
    x_TD = randn(len(ids_TK), WIDTH, seed=1)
    combine_TK = randn(*ids_TK.shape, seed=2)
    common = [x_TD, combine_TK, order.order_N, order.offsets, weights, ROWS]
    return [*common, *([None] * 9)]


def float_blocks() -> list[Tensor]:
    return [randn(EXPERTS, ROWS, WIDTH, seed=seed) for seed in (3, 4, 5)]


def nf4_weights(rows: int = ROWS, width: int = WIDTH) -> Nf4Weights:
    parts = [quantise(randn(EXPERTS, rows, width, seed=seed)) for seed in (3, 4, 5)]
    return Nf4Weights(gate=parts[0], up=parts[1], down=parts[2])


def visited(bounds: Sequence[int]) -> list[int]:
    return [e for e, (a, b) in enumerate(zip(bounds, bounds[1:])) if a < b]


FORMS: dict[str, Callable[[list[int]], list[list[int]]]] = {
    "together": lambda experts: [experts],
    "pairs": lambda experts: [experts[i : i + 2] for i in range(0, len(experts), 2)],
    "apart": lambda experts: [[e] for e in experts],
}
"""How experts share products, whatever pays."""


def force(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(
        cpu_passes, "shares", lambda bounds, *_: FORMS[form](visited(bounds))
    )


def pad(ids_TK: Tensor, form: str) -> Padded:
    order = sort_visits(ids_TK, EXPERTS)
    bounds = order.offsets[:: ids_TK.shape[1]].tolist()
    visit_U = order.order_N[: bounds[-1]].long()
    return pad_sorted(visit_U, bounds, ids_TK.shape, FORMS[form](visited(bounds)))


@pytest.mark.parametrize("form", FORMS)
def test_matmuls_are_those_of_the_visited_rows(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K/E of the dense products forward, and as much again for x backward.

    Padding makes the rows of every expert of a share as many as those of the one with
    most.
    """
    force(monkeypatch, form)
    ids_TK = ids()
    given = arguments(float_blocks(), ids_TK)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
    groups = FORMS[form](counts_E.nonzero().flatten().tolist())
    rows = sum(len(experts) * int(counts_E[experts].max()) for experts in groups)
    assert (rows > ids_TK.numel()) == (form != "apart")
    expected = 2 * rows * 3 * ROWS * WIDTH
    with FlopCounterMode(display=False) as forward:
        y_TD, low_TR, gate_NF, up_NF = cpu.expert_mlp_forward(*given, True)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        cpu.expert_mlp_backward(y_TD, low_TR, *given, gate_NF, up_NF)
    assert backward.get_total_flops() == expected


@pytest.mark.parametrize(
    "bounds, weights, pays",
    [
        ([0, 128, 256, 384], 2**17, True),
        ([0, 128, 256, 384], 2**17 + 1, False),
        ([0, 0, 128, 128, 256], 2**10, True),
        ([0, 1000, 1200, 1300], 2**10, False),
        ([0, 20, 30, 31], 2**10, True),
        ([0, 300], 2**10, True),
        ([0, 0, 0], 2**10, False),
    ],
)
def test_padding_pays_for_narrow_experts_with_even_loads(
    bounds: list[int], weights: int, pays: bool
) -> None:
    assert padding_pays(bounds, weights) == pays
    together = [visited(bounds)]
    assert (shares(bounds, weights, range(len(bounds))) == together) == pays


@pytest.mark.parametrize(
    "rows, blocks, expected",
    [
        ([64, 70, 60, 66], [0, 1, 2, 3], [[0, 1], [2, 3]]),
        ([64, 70, 60], [0, 1, 2], [[0, 1], [2]]),
        ([64, 0, 60, 66], [0, 1, 2, 3], [[0], [2, 3]]),
        ([64, 30, 40, 66], [0, 1, 2, 3], [[0], [1, 2], [3]]),
        ([8, 9, 15, 16], [0, 1, 2, 3], [[0], [1], [2, 3]]),
        ([112, 112, 113, 113], [0, 1, 2, 3], [[0, 1], [2], [3]]),
        ([64, 64, 64, 64], [0, 0, 1, 3], [[0], [1, 2], [3]]),
    ],
)
def test_wide_experts_with_a_few_dozen_rows_go_in_pairs(
    rows: list[int], blocks: list[int], expected: list[list[int]]
) -> None:
    bounds = [0, *accumulate(rows)]
    assert shares(bounds, 2**17 + 1, blocks) == expected


@pytest.mark.parametrize("tokens, experts, k", [(1, 1, 1), (9, 4, 2), (33, 16, 3)])
@pytest.mark.parametrize("shared_blocks", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_all_forms_give_the_same_by_the_op_and_without_it(
    tokens: int,
    experts: int,
    k: int,
    shared_blocks: bool,
    unit: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and all gradients, with unused slots and experts without visits, and with
    weights that are known to be 1."""
    outcomes = []
    for form, direct in product(FORMS, (True, False)):
        problem = make_problem(tokens, experts, k)
        weights = problem.weights
        for part in (weights.gate_EFD, weights.up_EFD, weights.down_EFD):
            part.requires_grad_(False)
        assert problem.surrogates is not None
        problem.surrogates.out_EQD.requires_grad_(False)
        if unit:
            problem = replace(problem, combine_TE=problem.walked.reached_TE)
        if shared_blocks:
            weights = replace(weights, base_E=torch.arange(experts) // 2)
        force(monkeypatch, form)
        monkeypatch.setattr(cpu, "is_plain_eager", lambda _, yes=direct: yes)
        y_TD = grouped_experts(
            problem.x_TD,
            problem.walked,
            problem.combine_TE,
            weights,
            **problem.arguments(),
        )
        leaves = problem.leaves()
        grads = torch.autograd.grad(
            y_TD.square().sum(), list(leaves.values()), allow_unused=True
        )
        outcomes.append({"y": y_TD, **dict(zip(leaves, grads))})
    for name, value in outcomes[0].items():
        for other in outcomes[1:]:
            if value is not None:
                assert_close(name, value, other[name].detach(), "fp64")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slots", [1, 2])
def test_padding_makes_the_shares_even(slots: int, form: str) -> None:
    ids_TK = ids()[:, :slots].clone()
    ids_TK[ids_TK == 2] = -1
    ids_TK[3] = -1
    batch = pad(ids_TK, form)
    seen = sorted(set(ids_TK[ids_TK >= 0].tolist()))
    assert [e for share in batch.shares for e in share.experts] == seen
    assert (batch.padding_n1 is None) == (form == "apart")
    real_n = torch.ones(len(batch), dtype=torch.bool)
    if batch.padding_n1 is not None:
        real_n = ~batch.padding_n1.squeeze(1)
    for share in batch.shares:
        parts = real_n[share.rows].view(len(share.experts), -1)
        expert_Vm = ids_TK.flatten()[batch.visit_n[share.rows]].view_as(parts)
        for expert, part, expert_m in zip(share.experts, parts, expert_Vm):
            assert bool((expert_m[part] == expert).all())
        assert bool(parts.all(1).any()), "one of them needs no padding"
    assert batch.shares[-1].rows.stop == len(batch)
    used = (ids_TK.flatten() >= 0).nonzero().squeeze(1)
    assert torch.equal(batch.visit_n[real_n].sort()[0], used)
    assert torch.equal(batch.token_n, batch.visit_n // slots)
    sorted_U = torch.empty(len(used), 1, dtype=torch.int64)
    batch.to_sorted(batch.visit_n.unsqueeze(1), sorted_U)
    expected = sort_visits(ids_TK, EXPERTS).order_N[: len(used)]
    assert torch.equal(sorted_U.squeeze(1).int(), expected)
    assert torch.equal(batch.from_sorted(sorted_U)[real_n], batch.visit_n[real_n, None])


@pytest.mark.parametrize("form", FORMS)
def test_visits_without_order_are_padded_alike(form: str) -> None:
    visited_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, ids(), True)
    visited_TE[3] = False
    visited_TE[:, 2] = False
    bounds = [0, *accumulate(visited_TE.sum(0).tolist())]
    groups = FORMS[form](visited(bounds))
    expert_U, token_U = visited_TE.T.nonzero(as_tuple=True)
    visit_U = token_U * EXPERTS + expert_U
    found = pad_visited(visited_TE, bounds, groups)
    expected = pad_sorted(visit_U, bounds, visited_TE.shape, groups)
    assert found.shares == expected.shares
    for field in fields(Padded):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert one is other is None or field.name == "shares" or torch.equal(one, other)


@pytest.mark.parametrize("form", ["together", "pairs"])
def test_padding_is_not_summed_and_tokens_without_visits_get_zero(form: str) -> None:
    ids_TK = ids()
    ids_TK[::3, 1] = -1
    ids_TK[3] = -1
    batch = pad(ids_TK, form)
    assert batch.padding_n1 is not None
    real_n = ~batch.padding_n1.squeeze(1)
    rows_nX = randn(len(batch), 3, seed=1)
    sums = Sums(TOKENS, 3, torch.float32)
    batch.add(sums, rows_nX.masked_fill(batch.padding_n1, float("nan")))
    expected = torch.zeros(TOKENS, 3)
    expected.index_add_(0, batch.token_n[real_n], rows_nX[real_n])
    assert_close("sums", sums.complete(), expected, "fp32")
    assert not bool(sums.complete()[3].any())
    assert not bool(
        batch.of_visits(torch.ones(TOKENS, SLOTS), rows_nX.dtype)[~real_n].any()
    )


def test_one_part_of_one_touched_expert_is_unpacked_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[int, ...]] = []
    alive: list[weakref.ref[Tensor]] = []

    def watched(codes: Tensor, absmax: Tensor, shape: Any, dtype: Any) -> Tensor:
        # The caller may still hold the part before this one, as it asks for the next.
        assert sum(ref() is not None for ref in alive) <= 1
        weights = cpu_nf4.unpack(codes, absmax, shape, dtype)
        alive.append(weakref.ref(weights))
        made.append(tuple(weights.shape))
        return weights

    monkeypatch.setattr(cpu_blocks, "unpack", watched)
    ids_TK = ids() % 3  # The other five experts are not visited.
    ids_TK[:, 1] = (ids_TK[:, 0] + 1) % 3
    given = arguments(nf4_weights().tensors, ids_TK)
    y_TD, low_TR, gate_NF, up_NF = cpu.expert_mlp_forward(*given, True)
    assert made == [(ROWS, WIDTH)] * 9, "three parts of three experts"
    cpu.expert_mlp_backward(y_TD, low_TR, *given, gate_NF, up_NF)
    assert made == [(ROWS, WIDTH)] * 18


def test_unused_slots_save_zeros_and_get_no_gradient() -> None:
    ids_TK = ids()
    ids_TK[::3, 1] = -1
    given = arguments(float_blocks(), ids_TK)
    unused = ids_TK < 0
    y_TD, low_TR, gate_NF, up_NF = cpu.expert_mlp_forward(*given, True)
    used = int((~unused).sum())
    assert bool(gate_NF[:used].any(1).all()) and not bool(gate_NF[used:].any())
    assert not bool(up_NF[used:].any())
    found = cpu.expert_mlp_backward(y_TD, low_TR, *given, gate_NF, up_NF)
    assert bool((found[1][~unused] != 0).all())
    assert not bool(found[1][unused].any())


@pytest.mark.parametrize("per_batch", [1, 5, 9, 10**6])
def test_batches_are_whole_experts_in_order(per_batch: int) -> None:
    ids_TK = ids()
    ids_TK[ids_TK == 2] = -1
    order = sort_visits(ids_TK, EXPERTS)
    bounds = order.offsets[::SLOTS].tolist()
    blocks = list(range(EXPERTS))[::-1]
    visit_U = order.order_N[: bounds[-1]].long()
    found = runs(visit_U, bounds, blocks, SLOTS, max(1, BATCH_VALUES // per_batch))
    groups = [group for batch in found for group in batch.groups]
    experts = [group.expert for group in groups]
    assert experts == sorted(set(ids_TK[ids_TK >= 0].tolist())) and 2 not in experts
    assert [group.block for group in groups] == [EXPERTS - 1 - e for e in experts]
    assert all(len(batch) <= per_batch or len(batch.groups) == 1 for batch in found)
    for first, second in zip(found, found[1:]):
        assert len(first) + second.groups[0].rows.stop > per_batch, "it had room"
    for batch in found:
        for group in batch.groups:
            visits = batch.visit_n[group.rows].tolist()
            wanted = (ids_TK.flatten() == group.expert).nonzero().flatten().tolist()
            assert sorted(visits) == wanted
        assert torch.equal(batch.token_n, batch.visit_n // SLOTS)
    rows = torch.cat([batch.visit_n for batch in found])
    assert torch.equal(rows.int(), order.order_N[: len(rows)])


def test_no_visits_are_no_batches() -> None:
    order = sort_visits(torch.full((3, 2), -1), EXPERTS)
    bounds = order.offsets[::2].tolist()
    none_U = order.order_N[:0].long()
    assert runs(none_U, bounds, range(EXPERTS), 2, 8) == []
    assert not padding_pays(bounds, 1)
    assert shares(bounds, 1, range(EXPERTS)) == []


@pytest.mark.parametrize("shape", [(2, 32), (3, 43), (5, 13), (1, 1), (700, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_bitsandbytes", [False, True])
def test_unpacking_gives_the_bits_of_the_format(
    shape: tuple[int, int],
    dtype: torch.dtype,
    by_bitsandbytes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        cpu_nf4, "WORTH_AN_IMPORT", 0 if by_bitsandbytes else 10**9, raising=True
    )
    packed = quantise(randn(2, *shape, seed=6))
    expected = dequantise(packed, dtype)
    for e in range(2):
        found = cpu_nf4.unpack(packed.codes_EH[e], packed.absmax_EN[e], shape, dtype)
        assert found.dtype == dtype and torch.equal(found, expected[e])


def test_without_bitsandbytes_large_experts_unpack_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_nf4, "bitsandbytes", lambda: None)
    monkeypatch.setattr(cpu_nf4, "WORTH_AN_IMPORT", 0)
    packed = quantise(randn(1, 64, 65, seed=6))
    found = cpu_nf4.unpack(
        packed.codes_EH[0], packed.absmax_EN[0], (64, 65), torch.bfloat16
    )
    assert torch.equal(found, dequantise(packed, torch.bfloat16)[0])


def test_every_byte_unpacks_to_its_two_levels() -> None:
    codes = torch.arange(256, dtype=torch.uint8).unsqueeze(0)
    packed = Nf4Experts(
        codes_EH=codes, absmax_EN=torch.arange(1.0, 9.0)[None], shape=(1, 8, 64)
    )
    found = cpu_nf4.unpack(codes[0], packed.absmax_EN[0], (8, 64), torch.float32)
    assert torch.equal(found, dequantise(packed, torch.float32)[0])


def routed(
    weights: ExpertWeights | Nf4Weights | DecodingWeights, x_TD: Tensor
) -> Tensor:
    visits = visit(randn(len(x_TD), EXPERTS, seed=7), COMPLETE, experts_per_token=2)
    return grouped_experts(
        x_TD, visits, visits.reached_TE, weights, experts_per_token=2
    )


needs_decoding = pytest.mark.skipif(
    not can_decode(ROWS, WIDTH), reason="needs bitsandbytes and AVX512-BF16"
)


@needs_decoding
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("shared", [False, True])
def test_decoding_order_computes_the_same(tokens: int, shared: bool) -> None:
    base_E = torch.arange(EXPERTS) // 2 if shared else None
    weights = replace(nf4_weights(), base_E=base_E)
    x_TD = randn(tokens, WIDTH, seed=8, dtype=torch.bfloat16)
    expected = routed(weights.unpack(torch.float32), x_TD.float())
    assert_close("y", routed(for_decoding(weights), x_TD), expected, "bf16")


@needs_decoding
def test_decoding_order_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import (
        QuantState,
        _convert_weight_packed_for_cpu,
    )

    weights = nf4_weights()
    found = for_decoding(weights)
    for e in range(EXPERTS):
        parts = (weights.gate.experts(e, e + 1), weights.up.experts(e, e + 1))
        state = QuantState(
            absmax=torch.cat([part.absmax_EN[0] for part in parts]),
            shape=torch.Size((2 * ROWS, WIDTH)),
            dtype=torch.bfloat16,
            blocksize=64,
            quant_type="nf4",
        )
        codes = torch.cat([part.codes_EH[0] for part in parts])
        expected, state = _convert_weight_packed_for_cpu(codes, state)
        assert torch.equal(found.gate_up_codes[e], expected)
        assert torch.equal(found.gate_up_absmax[e], state.absmax)


@needs_decoding
def test_decoding_order_takes_no_more_codes() -> None:
    weights = nf4_weights()
    found = for_decoding(weights)
    codes = weights.gate.codes_EH.numel() + weights.up.codes_EH.numel()
    assert found.gate_up_codes.numel() == codes
    assert found.down is weights.down


@needs_decoding
def test_decoding_order_is_for_inference() -> None:
    found = for_decoding(nf4_weights())
    x_TD = randn(4, WIDTH, seed=8, dtype=torch.bfloat16).requires_grad_()
    y_TD = routed(found, x_TD)
    with pytest.raises(ValueError, match="no backward: use Nf4Weights"):
        y_TD.sum().backward()
    with pytest.raises(ValueError, match="these weights need torch.bfloat16"):
        routed(found, x_TD.float())


@pytest.mark.parametrize("rows, width", [(24, 64), (16, 96), (8, 64)])
def test_widths_without_a_decoding_order_are_refused(rows: int, width: int) -> None:
    """24 rows and 96 columns do not divide; 8 rows make half a tile."""
    assert not can_decode(rows, width)
    with pytest.raises(ValueError, match=f"{rows} x {width} weights cannot be put in"):
        for_decoding(nf4_weights(rows, width))
