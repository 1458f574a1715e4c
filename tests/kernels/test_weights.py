"""Blocks as an op takes them: NF4 words, nested or not, and on which device."""

from __future__ import annotations

import pytest
import torch

from samv2_kernels import Visits, WordWeights, grouped_experts
from samv2_kernels.nf4 import quantise
from samv2_kernels.nf4_layout import Nf4Words, to_words
from samv2_kernels.nf4_nested import nested_values
from tests.helpers import randn


def words(seed: int, *, nested: bool = False) -> Nf4Words:
    return to_words(quantise(randn(3, 4, 64, seed=seed)), nested=nested)


def test_words_are_listed_codes_first() -> None:
    gate, up, down = (words(seed) for seed in range(3))
    weights = WordWeights(gate=gate, up=up, down=down)
    assert weights.num_experts == 3 and weights.ffn_width == 4
    expected = [part.words_BFW for part in (gate, up, down)]
    expected += [part.absmax_BFA for part in (gate, up, down)]
    assert len(weights.tensors) == 6
    assert all(a is b for a, b in zip(weights.tensors, expected))


def test_nested_words_bring_what_their_magnitudes_stand_for() -> None:
    parts = [words(seed, nested=True) for seed in range(3)]
    gate, up, down = parts
    shared = torch.tensor([0, 1, 2, 0])
    weights = WordWeights(gate=gate, up=up, down=down, base_E=shared)
    assert weights.num_experts == 4
    tensors = weights.tensors
    assert len(tensors) == 13 and torch.equal(tensors[12], nested_values())
    for number, part in enumerate(parts):
        assert part.nested is not None
        assert tensors[3 + number].dtype == torch.uint8
        assert torch.equal(tensors[6 + number], part.nested.second_ES)
        assert torch.equal(tensors[9 + number], part.nested.offset_E)
    mixed = WordWeights(gate=gate, up=up, down=words(2))
    with pytest.raises(ValueError, match="nested alike"):
        mixed.tensors


def test_words_are_refused_on_a_cpu() -> None:
    weights = WordWeights(gate=words(0), up=words(1), down=words(2))
    everyone = torch.ones(5, 3)
    visits = Visits(reached_TE=everyone, chosen_TE=everyone > 0)
    with pytest.raises(ValueError, match="x_TD is on cpu; NF4 words are for GPUs"):
        grouped_experts(
            torch.zeros(5, 64).bfloat16(),
            visits,
            everyone,
            weights,
            experts_per_token=3,
        )
