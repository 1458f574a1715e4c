"""The walk kernel, run by the interpreter, against the reference."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from samv2_kernels.audit import audit_specs
from samv2_kernels.gpu import walk as gpu
from samv2_kernels.gpu.walk import WalkTensors, pack_masks_gpu, walk_gpu
from samv2_kernels.reference.walk import find_visits, hard_edges, preorder
from tests.helpers import generator
from tests.kernels.guarded import guarded

RAGGED = (0, 1, 15, 16, 17, 63, 64, 65)
EXPERTS = (1, 16, 64, 65)
MASKS = ("diagonal", "edge", "chain", "full", "random")
TOGETHER = 128
"""Tokens a program: the interpreter's cost is by program."""


def mask_of(kind: str, experts: int, seed: int) -> Tensor:
    """(E, E) bool, with an entry."""
    eye_EE = torch.eye(experts, dtype=torch.bool)
    if kind == "diagonal":
        return eye_EE
    if kind == "full":
        return torch.ones_like(eye_EE).triu()
    mask_EE = torch.zeros_like(eye_EE)
    mask_EE[0, 0] = True
    if kind == "edge":
        mask_EE[0, experts - 1] = True
    elif kind == "chain":
        mask_EE |= eye_EE.roll(1, dims=1).triu(1)
    else:
        uniform_EE = torch.rand(experts, experts, generator=generator(seed))
        mask_EE |= (uniform_EE < 4 / experts).triu(1) | (eye_EE & (uniform_EE < 0.3))
    return mask_EE


def scores_of(tokens: int, experts: int, seed: int, ties: bool = False) -> Tensor:
    """(T, E), with both zeros among the ties."""
    source = generator(seed)
    scores_TE = torch.randn(tokens, experts, generator=source)
    if not ties:
        return scores_TE
    signs_TE = torch.rand(tokens, experts, generator=source).sub(0.5).sign()
    return scores_TE.round().clamp(-1, 1).abs() * signs_TE


def shared_of(experts: int, number: int) -> Tensor:
    """(E,) bool, ``number`` of them spread over the experts."""
    shared_E = torch.zeros(experts, dtype=torch.bool)
    shared_E[torch.linspace(experts - 1, 0, number + 1).long()[:number]] = True
    return shared_E


def reference(scores_TE: Tensor, masks_MEE: Tensor, **options: Any) -> WalkTensors:
    """The twin's answer, in the order of the kernel's."""
    order = options.pop("order", True)
    slots, index_T = options["experts_per_token"], options.setdefault("mask_index_T")
    shared_E = options.setdefault("shared_E")
    options = {"chosen_TE": None, "fill": False} | options
    found = find_visits(scores_TE, masks_MEE, **options)
    if order:
        edges_MEE = hard_edges(masks_MEE, shared_E)
        ordered = preorder(found.visited_TE, scores_TE, edges_MEE, index_T, slots)
    else:
        ordered = (torch.empty((len(scores_TE), 0), dtype=torch.long),) * 3
    return WalkTensors(*ordered, *found[1:])


def check(
    scores_TE: Tensor,
    masks_MEE: Tensor,
    *,
    block_tokens: int | None = TOGETHER,
    poison: int = 1,
    **options: Any,
) -> WalkTensors:
    """Compare with the twin."""
    expected = reference(scores_TE, masks_MEE, **options)
    with guarded(poison):
        found = walk_gpu(scores_TE, masks_MEE, **options, block_tokens=block_tokens)
    for name, actual, value in zip(found._fields, found, expected, strict=True):
        assert actual.dtype == value.dtype, name
        assert torch.equal(actual, value), (name, actual, value)
    return found


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("experts", EXPERTS)
def test_agrees_with_the_reference_on_every_graph(experts: int, kind: str) -> None:
    masks_MEE = mask_of(kind, experts, 0).unsqueeze(0)
    cases = zip((1, 2, 3, 4), (65, 17, 64, 15), (False, True, True, False))
    for k, tokens, fill in cases:
        k = min(k, experts)
        scores_TE = scores_of(tokens, experts, k, ties=k == 3)
        options: dict[str, Any] = dict(experts_per_token=k, fill=fill)
        if k % 2 == 0:
            options["shared_E"] = shared_of(experts, k // 2)
        found = check(scores_TE, masks_MEE, **options)
        assert bool(found.visited_TE.any(dim=1).all())


@pytest.mark.parametrize("tokens", RAGGED)
def test_agrees_with_the_reference_at_ragged_sizes(tokens: int) -> None:
    """With several masks, as a batch of sequences has them, and several programs."""
    masks_MEE = torch.stack([mask_of(kind, 9, 1) for kind in MASKS])
    index_T = torch.randint(len(MASKS), (tokens,), generator=generator(tokens))
    for fill in (False, True):
        options = dict(experts_per_token=4, mask_index_T=index_T, fill=fill)
        shared_E = shared_of(9, 1) if fill else None
        scores_TE = scores_of(tokens, 9, tokens, ties=fill)
        check(scores_TE, masks_MEE, shared_E=shared_E, block_tokens=16, **options)


@pytest.mark.parametrize("experts", [1, 5, 16])
def test_every_expert_may_be_visited(experts: int) -> None:
    for kind in MASKS:
        masks_MEE = mask_of(kind, experts, 2).unsqueeze(0)
        scores_TE = scores_of(17, experts, 3)
        found = check(scores_TE, masks_MEE, experts_per_token=experts)
        assert bool(found.chosen_TE.all())


def test_more_than_two_words_of_experts() -> None:
    """Edges into every word, and a path that crosses all of them."""
    experts = 250
    mask_EE = mask_of("random", experts, 4)
    for source, target in ((0, 63), (63, 64), (64, 127), (127, 128), (128, 249)):
        mask_EE[source, target] = True
    scores_TE = scores_of(3, experts, 5)
    scores_TE[0, [0, 63, 64, 127, 128, 249]] += 10
    for fill in (False, True):
        options = dict(experts_per_token=6, fill=fill)
        found = check(scores_TE, mask_EE.unsqueeze(0), **options)
        assert found.expert_ids_TK[0].tolist() == [0, 63, 64, 127, 128, 249]
        assert found.depth_TK[0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("fill", [False, True])
def test_a_choice_replaces_the_scores_own(fill: bool) -> None:
    masks_MEE = mask_of("random", 16, 6).unsqueeze(0)
    scores_TE = scores_of(17, 16, 7)
    chosen_TE = torch.zeros(17, 16, dtype=torch.bool)
    chosen_TE.scatter_(1, scores_TE.argsort(dim=1)[:, :2], True)
    shared_E = shared_of(16, 1)
    options = dict(experts_per_token=3, chosen_TE=chosen_TE, fill=fill)
    found = check(scores_TE, masks_MEE, shared_E=shared_E, **options)
    assert torch.equal(found.chosen_TE, chosen_TE | shared_E)
    check(scores_TE, masks_MEE, **options)


def test_shared_experts_may_be_all_there_is() -> None:
    masks_MEE = mask_of("edge", 7, 0).unsqueeze(0)
    found = check(
        scores_of(5, 7, 8), masks_MEE, experts_per_token=3, shared_E=shared_of(7, 3)
    )
    assert torch.equal(found.visited_TE, shared_of(7, 3).expand(5, 7))


def test_without_the_order_the_sets_are_the_same() -> None:
    masks_MEE = mask_of("random", 16, 9).unsqueeze(0)
    for fill in (False, True):
        found = check(
            scores_of(17, 16, 9), masks_MEE, experts_per_token=3, fill=fill, order=False
        )
        assert found.expert_ids_TK.shape == (17, 0)


def test_every_element_is_written_and_none_beside() -> None:
    masks_MEE = torch.stack([mask_of(kind, 17, 1) for kind in ("edge", "random")])
    index_T = torch.arange(17) % 2
    for poison in (0, 1):
        for block_tokens in (1, 16):
            check(
                scores_of(17, 17, 10),
                masks_MEE,
                poison=poison,
                block_tokens=block_tokens,
                experts_per_token=3,
                mask_index_T=index_T,
            )


@pytest.mark.parametrize("experts", [5, 65])
def test_a_token_does_not_depend_on_its_batch_or_block(experts: int) -> None:
    masks_MEE = mask_of("random", experts, 11).unsqueeze(0)
    scores_TE = scores_of(13, experts, 11)
    whole = walk_gpu(scores_TE, masks_MEE, experts_per_token=3, block_tokens=16)
    moved_T = torch.randperm(13, generator=generator(0))
    sizes = cycle((8, 2, None))
    for part_T, block_tokens in zip(moved_T.split((9, 3, 1)), sizes):
        part = walk_gpu(
            scores_TE[part_T],
            masks_MEE,
            experts_per_token=3,
            block_tokens=block_tokens,
        )
        for name, found, expected in zip(part._fields, part, whole, strict=True):
            assert torch.equal(found, expected[part_T]), name


def test_a_mask_without_entry_leads_nowhere() -> None:
    """The reference refuses it, which on a device would cost a wait."""
    masks_MEE = torch.ones(1, 4, 4, dtype=torch.bool).triu(1)
    found = walk_gpu(scores_of(3, 4, 0), masks_MEE, experts_per_token=2, fill=True)
    for value in (found.expert_ids_TK, found.parent_slot_TK, found.depth_TK):
        assert value.tolist() == [[-1, -1]] * 3
    assert not bool(found.visited_TE.any()) and not bool(found.swept_TE.any())
    assert found.chosen_TE.sum(dim=1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [1, 63, 64, 65, 130])
def test_packed_rows_hold_the_edges(experts: int, dtype: torch.dtype) -> None:
    masks_MEE = torch.rand(2, experts, experts, generator=generator(experts)) < 0.5
    with guarded(1):
        words_MEW = pack_masks_gpu(masks_MEE.to(dtype))
    assert words_MEW.shape == (2, experts, -(-experts // 64))
    bits_MEW64 = (words_MEW.unsqueeze(3) >> torch.arange(64)) & 1
    unpacked_MEX = bits_MEW64.flatten(2)
    assert torch.equal(unpacked_MEX[:, :, :experts].bool(), masks_MEE.triu())
    assert not bool(unpacked_MEX[:, :, experts:].any())


def test_refuses_more_experts_than_its_keys_hold() -> None:
    with pytest.raises(ValueError, match="257 experts; the kernel takes at most 256"):
        walk_gpu(
            torch.zeros(1, 257),
            torch.ones(1, 257, 257, dtype=torch.bool),
            experts_per_token=1,
        )


def test_compiles_without_spills() -> None:
    rows = audit_specs(gpu.audited("sm_86"), "sm_86", jobs=1)
    for row in rows:
        assert row.spill_bytes == 0 and row.registers < 128, row.config
    names = {row.config.split(" w")[0] for row in rows if row.kernel == "walk"}
    assert {"E 16 K 2", "E 16 K 4", "E 64 K 8", "E 65 K 4", "E 128 K 30"} <= names
