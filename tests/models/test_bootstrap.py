"""Dense model to expert graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.common.errors import ModelError
from samv2.experts.moe_layers import ExpertGraphMLP, WalkOptions
from samv2.models.bootstrap import bootstrap, check_convertible, parse_layers
from samv2.models.expert_model import ExpertDecoderLayer, ExpertModel
from tests.helpers import (
    assert_close,
    convert,
    random_llama,
    stdlib_text,
    tiny_settings,
)


@torch.no_grad()
def loss_of(
    model: ExpertModel | LlamaForCausalLM, ids: Tensor, **kwargs: object
) -> float:
    return model(ids, labels=ids, **kwargs).loss.item()


def test_the_tiny_model_has_learnt_something(
    tiny_llama: LlamaForCausalLM, tiny_batch: Tensor, tiny_tokenizer
) -> None:
    """Uniform guessing costs log 512 = 6.24 nats; without FFNs it is worse again."""
    loss = loss_of(tiny_llama, tiny_batch)
    assert loss < 4.6
    text = stdlib_text()[:300]
    assert tiny_tokenizer.decode(tiny_tokenizer(text).input_ids) == text
    for layer in tiny_llama.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert loss_of(tiny_llama, tiny_batch) > loss + 0.3


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("1-", (1, 2, 3, 4, 5)),
        ("0", (0,)),
        ("1-2,5", (1, 2, 5)),
        (" 4 , 2-3 ", (2, 3, 4)),
        ("1-3,2-4", (1, 2, 3, 4)),
        ("5-5", (5,)),
    ],
)
def test_layer_specs_are_read(spec: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(spec, 6) == expected


@pytest.mark.parametrize("spec", ["", "1,", "-3", "a", "1--2", "1-2-3", "1.5", "all,1"])
def test_layer_specs_of_another_form_are_refused(spec: str) -> None:
    with pytest.raises(ModelError, match="write 'all' or ranges"):
        parse_layers(spec, 6)


@pytest.mark.parametrize("spec", ["6", "2-6", "6-", "4-3"])
def test_layers_that_are_not_there_are_refused(spec: str) -> None:
    with pytest.raises(ModelError, match=f"names '{spec}', .* 0..5"):
        parse_layers(spec, 6)


@pytest.mark.parametrize(
    "override, message",
    [
        ("experts.num_experts=24", "num_experts is 24, .* 128 rows .* use 16 or 32"),
        ("adapter.rank=65", "adapter.rank is 65; it cannot exceed .* 64"),
        ("experts.surrogate_rank=65", "surrogate_rank is 65; it cannot exceed"),
        ("experts.layers=7", "names '7'"),
    ],
)
def test_what_cannot_be_converted_is_refused_first(override: str, message: str) -> None:
    llama = random_llama()
    with pytest.raises(ModelError, match=message):
        check_convertible(llama.config, tiny_settings(override))
    with pytest.raises(ModelError, match=message):
        convert(llama, torch.zeros(0, 0, dtype=torch.long), [override])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experts.layers=1-"],
        ["experts.num_shared=0", "experts.feature=gate", "experts.gate=avg_k"],
        [
            "experts.num_experts=1",
            "experts.experts_per_token=1",
            "experts.num_shared=0",
        ],
        ["experts.surrogate_rank=0", "experts.chains=true"],
        ["experts.feature=gate_up_down", "assembler.width=0"],
    ],
)
def test_conversion_is_lossless_at_k_equal_to_e(
    tiny_llama: LlamaForCausalLM,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
    overrides: list[str],
) -> None:
    with torch.no_grad():
        expected = tiny_llama(tiny_batch).logits
    model = convert(tiny_llama, tiny_calibration, overrides).model
    options = WalkOptions(experts_per_token=model.expert_config.num_experts)
    with torch.no_grad():
        found = model(tiny_batch, walk_options=options).logits
    assert_close("logits", found, expected, "logits")


def test_the_same_seed_gives_the_same_bits(
    tiny_llama_folder: Path, tiny_calibration: Tensor
) -> None:
    made = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
        made.append(convert(llama, tiny_calibration))
    first, second = (found.model.state_dict() for found in made)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert made[0].layer_errors == made[1].layer_errors


def test_what_was_found_on_the_way_is_reported(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    seen: list[tuple[int, int]] = []
    found = bootstrap(
        tiny_llama,
        tiny_calibration,
        tiny_settings("experts.layers=1"),
        fingerprint="abc",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert found.model.expert_config.base_fingerprint == "abc"
    assert [stats.sizes for stats in found.cluster_stats] == [(16,) * 7]
    assert len(found.layer_errors) == 1 and 0 < found.layer_errors[0] < 0.5
    decoder = found.model.llama.model.layers
    assert [isinstance(layer, ExpertDecoderLayer) for layer in decoder] == [
        False,
        True,
        False,
    ]
    assert not found.model.training


def test_calibration_beats_dropping_experts(
    tiny_llama_folder: Path, tiny_calibration: Tensor, tiny_tokens: Tensor
) -> None:
    """At K = 1 of 8: stand-ins and the fitted gate against neither."""
    heldout, losses = tiny_tokens[-6400:].view(100, 64), []
    for overrides in (["experts.gate=avg_k", "experts.surrogate_rank=0"], []):
        llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
        model = convert(llama, tiny_calibration, overrides).model
        model.set_experts_per_token(1)
        losses.append(loss_of(model, heldout))
    assert losses[1] < losses[0] - 0.03


def test_softmax_models_have_no_stand_ins(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    model = convert(tiny_llama, tiny_calibration, ["experts.combine=softmax"]).model
    assert model.expert_config.surrogate_rank == 0
    assert all(layer.surrogates is None for layer in model.expert_layers)


def test_the_graph_starts_with_all_entries_and_chains_of_routed_experts(
    tiny_expert_model: ExpertModel,
) -> None:
    """An edge from a shared expert would make its destination reachable for good."""
    graph = tiny_expert_model.graph
    assert bool(graph.edge_mask_LEE.diagonal(dim1=1, dim2=2).all())
    predecessors = graph.edge_mask_LEE.triu(1).sum(dim=1)
    assert int(predecessors.max()) == 2 and int(predecessors.sum()) >= 15
    assert not bool(graph.edge_mask_LEE[:, 0, 1:].any())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_calibration_sees_what_the_model_sees(
    tiny_llama_folder: Path,
    tiny_calibration: Tensor,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At K = E the stream is the dense model's: causal attention, right positions."""
    llama = LlamaForCausalLM.from_pretrained(
        tiny_llama_folder, attn_implementation=attention
    )
    inputs: dict[int, Tensor] = {}
    for index, layer in enumerate(llama.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, index=index: inputs.__setitem__(index, args[0])
        )
    with torch.no_grad():
        llama(tiny_calibration)
    expected = [inputs[index].flatten(0, 1) for index in range(3)]
    seen: dict[int, list[Tensor]] = {}
    forward = ExpertGraphMLP.forward

    def spy(self: ExpertGraphMLP, x_BSD: Tensor, *args: object):
        seen.setdefault(self.layer, []).append(x_BSD.flatten(0, 1))
        return forward(self, x_BSD, *args)

    monkeypatch.setattr(ExpertGraphMLP, "forward", spy)
    convert(llama, tiny_calibration, ["experts.experts_per_token=8"])
    for index in range(3):
        assert_close(
            f"layer {index}", torch.cat(seen[index]), expected[index], "logits"
        )
