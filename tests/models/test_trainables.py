"""One conversion serves every rank and assembler, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.common.errors import ModelError
from samv2.models.save import expert_fingerprint
from samv2.models.trainables import with_trainables
from tests.helpers import convert, logits_of


@pytest.mark.parametrize("width, siblings", [(0, 1), (8, 1), (8, 3)])
def test_it_is_what_a_conversion_makes(
    tiny_llama_folder: object,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
    width: int,
    siblings: int,
) -> None:
    def llama() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()

    overrides = [
        "adapter.rank=2",
        "adapter.scale=3.0",
        f"adapter.siblings={siblings}",
        f"assembler.width={width}",
        "assembler.prefix_tokens=4",
    ]
    expected = convert(llama(), tiny_calibration, overrides).model
    start = convert(llama(), tiny_calibration).model
    made = with_trainables(
        start,
        adapter_rank=2,
        adapter_scale=3.0,
        siblings=siblings,
        assembler_width=width,
        prefix_tokens=4,
    )
    assert made.expert_config == expected.expert_config
    assert expert_fingerprint(made) == expert_fingerprint(expected)
    left, right = made.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(logits_of(made, tiny_batch), logits_of(expected, tiny_batch))
    names = {name for name, item in made.named_parameters() if item.requires_grad}
    assert names == {n for n, item in expected.named_parameters() if item.requires_grad}


def test_a_rank_beyond_the_width_is_refused(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    model = convert(tiny_llama, tiny_calibration, ["experts.layers=1"]).model
    with pytest.raises(ModelError, match="1..64"):
        with_trainables(
            model,
            adapter_rank=65,
            adapter_scale=1.0,
            siblings=1,
            assembler_width=0,
            prefix_tokens=4,
        )
