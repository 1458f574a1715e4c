"""Siblings in a model: blocks, shares at every token, caches, saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from samv2.common.errors import ModelError
from samv2.experts.moe_layers import WalkOptions
from samv2.experts.sibling_gate import NEVER
from samv2.models.adapters import assembler_id, block_layers, gate_id
from samv2.models.expert_model import ExpertCache, ExpertModel
from samv2.models.save import load_expert_model, save_expert_model
from tests.helpers import assert_close, convert, logits_of, randn, stir

SIBLINGS = 3


@pytest.fixture(params=["", "assembler.width=0"])
def model(
    request: pytest.FixtureRequest,
    tiny_llama: LlamaForCausalLM,
    tiny_calibration: Tensor,
) -> ExpertModel:
    """The tiny expert model with three siblings, each its own, and a gate that tells."""
    overrides = [f"adapter.siblings={SIBLINGS}", *filter(None, [request.param])]
    made = stir(convert(tiny_llama, tiny_calibration, overrides).model)
    made.sibling_gate.ratio_NG.data.copy_(
        0.3 * randn(*made.sibling_gate.ratio_NG.shape, seed=5)
    )
    return made


@pytest.fixture
def ids(tiny_batch: Tensor) -> Tensor:
    """(2, 24) tokens."""
    return tiny_batch[:2, :24]


def test_shares_matter(model: ExpertModel, ids: Tensor) -> None:
    """Or what follows would hold of a model that ignores them."""
    found = logits_of(model, ids)
    for sibling in range(SIBLINGS):
        alone = logits_of(model, ids, walk_options=WalkOptions(siblings=(sibling,)))
        assert not torch.allclose(found, alone, atol=1e-3)


def test_a_new_model_does_what_one_without_siblings_does(
    tiny_llama_folder: Path, tiny_calibration: Tensor, ids: Tensor
) -> None:
    found = []
    for siblings in (1, SIBLINGS):
        llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()
        made = convert(llama, tiny_calibration, [f"adapter.siblings={siblings}"])
        found.append(logits_of(made.model, ids))
    assert torch.equal(*found)


def test_no_later_token_changes_a_logit(model: ExpertModel, ids: Tensor) -> None:
    changed = ids.clone()
    changed[:, 15:] = 3
    before, after = logits_of(model, ids), logits_of(model, changed)
    assert_close("logits", after[:, :15], before[:, :15], "logits")


def test_a_sure_gate_is_that_sibling_alone(model: ExpertModel, ids: Tensor) -> None:
    model.sibling_gate.prior_G.data.copy_(torch.tensor([NEVER, 0, NEVER]))
    alone = logits_of(model, ids, walk_options=WalkOptions(siblings=(1,)))
    assert_close("logits", logits_of(model, ids), alone, "logits")


def test_uniform_shares_are_the_mean_of_the_rows(
    model: ExpertModel, ids: Tensor
) -> None:
    """Which is what averaging over all clients would have given."""
    model.sibling_gate.ratio_NG.data.zero_()
    found = logits_of(model, ids)
    for layer in model.expert_layers:
        for name, dim in (
            ("adapter_gate_EFR", 2),
            ("adapter_up_EFR", 2),
            ("adapter_down_ERF", 1),
        ):
            rows = getattr(layer, name).data
            mean = rows.unflatten(dim, (SIBLINGS, -1)).mean(dim)
            rows.copy_(torch.cat([mean] * SIBLINGS, dim=dim))
    alone = logits_of(model, ids, walk_options=WalkOptions(siblings=(2,)))
    assert_close("logits", found, alone, "logits")


def test_some_siblings_share_among_themselves(model: ExpertModel, ids: Tensor) -> None:
    model.sibling_gate.prior_G.data.copy_(torch.tensor([0, NEVER, 0]))
    expected = logits_of(model, ids)
    model.sibling_gate.prior_G.data.zero_()
    found = logits_of(model, ids, walk_options=WalkOptions(siblings=(0, 2)))
    assert_close("logits", found, expected, "logits")


def test_a_cache_carries_the_evidence(model: ExpertModel, ids: Tensor) -> None:
    cache, parts = ExpertCache(config=model.config), []
    for part in ids.split([9, 1, 14], dim=1):
        parts.append(logits_of(model, part, cache=cache, use_cache=True))
    assert_close("logits", torch.cat(parts, 1), logits_of(model, ids), "logits")


def test_generation_is_the_model_token_by_token(
    model: ExpertModel, ids: Tensor
) -> None:
    prompt = ids[:, :7]
    found = model.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)
    expected = prompt
    for _ in range(9):
        following = logits_of(model, expected)[:, -1:].argmax(dim=2)
        expected = torch.cat([expected, following], dim=1)
    assert found.tolist() == expected.tolist()


def test_what_hides_tokens_from_the_gate_is_refused(
    model: ExpertModel, ids: Tensor
) -> None:
    embedded = model.llama.model.embed_tokens(ids)
    with pytest.raises(ModelError, match="pass input_ids, not inputs_embeds"):
        model.llama(inputs_embeds=embedded)
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], cache=cache, use_cache=True)
    with pytest.raises(ModelError, match=r"cache=ExpertCache\(\)"):
        model(
            ids[:, 9:],
            cache=cache,
            use_cache=True,
            walk_options=WalkOptions(use_assembler=False),
        )
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with pytest.raises(ModelError, match="padded on the left"):
        model(ids, attention_mask=mask)


def test_blocks_round_trip_and_are_one_sibling_each(model: ExpertModel) -> None:
    layers = model.expert_layers
    experts = len(layers) * 8
    before = model.read_blocks()
    others = {gate_id(layers)} | (set() if model.assembler is None else {experts})
    expected = set(range(SIBLINGS * experts + 2)) - {experts} | others
    assert set(before) == expected
    assert gate_id(layers) == SIBLINGS * experts + 1
    changed = {key: randn(len(block), seed=key) for key, block in before.items()}
    model.write_blocks(changed)
    after = model.read_blocks()
    assert all(torch.equal(after[key], changed[key]) for key in changed)
    one = 2 * experts + 1 + 8 + 5  # sibling 2, layer 1, expert 5
    rows = layers[1].adapter_gate_EFR[5, :, 8:12]
    assert torch.equal(after[one][: rows.numel()].view(rows.shape), rows)
    assert len(after[one]) == 3 * rows.numel() < len(after[8 + 5])


def test_every_expert_block_has_its_layer(model: ExpertModel) -> None:
    layers = model.expert_layers
    assembler, found = block_layers(len(layers), 8, 3)
    assert assembler == assembler_id(layers)
    assert found.keys() == set(model.read_blocks()) - {
        assembler_id(layers),
        gate_id(layers),
    }
    assert [found[key] for key in (0, 8, 23, 25, 33, 72)] == [0, 1, 2, 0, 1, 2]


def test_a_block_of_another_model_is_refused(model: ExpertModel) -> None:
    with pytest.raises(ModelError, match="3 layers of 8 experts with 3 siblings"):
        model.write_blocks({99: torch.zeros(3)})


def test_training_one_sibling_leaves_the_others(
    model: ExpertModel, ids: Tensor
) -> None:
    model.freeze_base()
    model(ids, labels=ids, walk_options=WalkOptions(siblings=(1,))).loss.backward()
    for layer in model.expert_layers:
        grad = layer.adapter_up_EFR.grad
        assert bool(grad[:, :, 4:8].any())
        assert not bool(grad[:, :, :4].any()) and not bool(grad[:, :, 8:].any())


def test_active_siblings_are_those_with_a_share(
    model: ExpertModel, ids: Tensor
) -> None:
    gate = model.sibling_gate
    gate.ratio_NG.data.zero_()
    assert model.active_siblings(ids) == (0, 1, 2)
    gate.prior_G.data.copy_(torch.tensor([0.0, -1.0, -9.0]))
    assert model.active_siblings(ids) == (0, 1)
    assert model.active_siblings(ids, least=0.9) == (0,)


def test_a_model_without_siblings_has_one(tiny_expert_model: ExpertModel) -> None:
    assert tiny_expert_model.sibling_gate is None
    assert tiny_expert_model.active_siblings(torch.zeros(1, 4).long()) == (0,)


def test_saving_keeps_siblings_and_gate(
    model: ExpertModel, ids: Tensor, tiny_tokenizer, tmp_path: Path
) -> None:
    save_expert_model(model, tiny_tokenizer, tmp_path / "model")
    loaded, _ = load_expert_model(tmp_path / "model")
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert loaded.expert_config.siblings == SIBLINGS
    assert not any(part.requires_grad for part in loaded.sibling_gate.parameters())
