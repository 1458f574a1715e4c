"""The expert model: causality, caches, padding, graphs, parameters, costs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from samv2.common.errors import ModelError
from samv2.experts.graph import Edit, ExpertGraph, apply_edits
from samv2.experts.moe_layers import WalkOptions
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.expert_model import ExpertCache, ExpertModel
from samv2_kernels import Walk
from tests.helpers import assert_close, convert, generator, randn

ADAPTERS = ("adapter_gate_EFR", "adapter_up_EFR", "adapter_down_ERF")
EVERY = WalkOptions(experts_per_token=8, use_assembler=False)
PREFIX = 8


def stir(model: ExpertModel) -> ExpertModel:
    """Adapters, gates and an assembler that are far from their start."""
    for seed, parameter in enumerate(model.trainable_parameters()):
        scale = 0.1 * float(parameter.detach().std()) if parameter.any() else 0.05
        parameter.data += scale * randn(*parameter.shape, seed=seed)
    assembler = model.assembler
    assembler.out.weight.data = 3.0 * randn(*assembler.out.weight.shape, seed=98)
    assembler.out.bias.data = randn(*assembler.out.bias.shape, seed=99) - 0.5
    return model


@pytest.fixture
def stirred(tiny_expert_model: ExpertModel) -> ExpertModel:
    """The tiny expert model, far from its start."""
    return stir(tiny_expert_model)


@pytest.fixture
def ids(tiny_batch: Tensor) -> Tensor:
    """(2, 24) tokens: three prefixes long."""
    return tiny_batch[:2, :24]


@torch.no_grad()
def logits_of(model: ExpertModel, ids: Tensor, **kwargs: object) -> Tensor:
    return model(ids, **kwargs).logits


def test_the_stirred_assembler_matters(stirred: ExpertModel, ids: Tensor) -> None:
    """Or the causality tests below would hold of a model without one."""
    closed = []

    def record(_: int, walked: Walk) -> None:
        closed.append(float((walked.chosen_TE & ~walked.visited_TE).float().mean()))

    with_it = logits_of(stirred, ids, walk_options=WalkOptions(recorder=record))
    assert len(closed) == 3 and min(closed) > 0.02
    without = logits_of(stirred, ids, walk_options=WalkOptions(use_assembler=False))
    assert torch.equal(with_it[:, :PREFIX], without[:, :PREFIX])
    assert float((with_it - without)[:, PREFIX:].abs().max()) > 0.1


@pytest.mark.parametrize("token", [0, 3, PREFIX - 1, PREFIX, PREFIX + 1, 15, 23])
def test_changing_a_token_changes_no_logit_before_it(
    stirred: ExpertModel, ids: Tensor, token: int
) -> None:
    changed = ids.clone()
    changed[:, token] = (changed[:, token] + 101) % 512
    before, after = logits_of(stirred, ids), logits_of(stirred, changed)
    assert torch.equal(before[:, :token], after[:, :token])
    assert float((before - after)[:, token].abs().max()) > 0.1


def test_a_sequence_does_not_depend_on_its_batch(
    stirred: ExpertModel, ids: Tensor
) -> None:
    whole = logits_of(stirred, ids)
    for row in range(2):
        alone = logits_of(stirred, ids[row : row + 1])
        assert_close("logits", alone, whole[row : row + 1], "logits")


@pytest.mark.parametrize(
    "cuts", [(24,), (1, 24), (5, 6, 20, 24), (8, 24), (7, 9, 24), tuple(range(1, 25))]
)
def test_cached_decoding_is_the_full_forward(
    stirred: ExpertModel, ids: Tensor, cuts: tuple[int, ...]
) -> None:
    cache, start, pieces = ExpertCache(config=stirred.config), 0, []
    for stop in cuts:
        part = ids[:, start:stop]
        pieces.append(logits_of(stirred, part, cache=cache, use_cache=True))
        start = stop
    assert_close("logits", torch.cat(pieces, 1), logits_of(stirred, ids), "logits")


def test_generation_is_greedy_decoding(stirred: ExpertModel, ids: Tensor) -> None:
    prompt = ids[:1, :6]
    found = stirred.generate(
        prompt, max_new_tokens=9, do_sample=False, eos_token_id=None
    )
    expected = prompt
    for _ in range(9):
        following = logits_of(stirred, expected)[:, -1:].argmax(dim=2)
        expected = torch.cat([expected, following], dim=1)
    assert found.tolist() == expected.tolist()


def test_a_cache_without_contexts_is_refused(stirred: ExpertModel, ids: Tensor) -> None:
    cache = DynamicCache(config=stirred.config)
    stirred(ids[:, :9], cache=cache, use_cache=True)
    with pytest.raises(ModelError, match=r"cache=ExpertCache\(\)"):
        stirred(ids[:, 9:], cache=cache, use_cache=True)
    options = WalkOptions(use_assembler=False)
    stirred(ids[:, 9:], cache=cache, use_cache=True, walk_options=options)


def test_beams_are_refused(stirred: ExpertModel, ids: Tensor) -> None:
    with pytest.raises(ModelError, match="num_beams is 2; use 1"):
        stirred.generate(ids, num_beams=2)


@pytest.mark.parametrize("length", [5, PREFIX, 17])
def test_right_padding_does_not_change_earlier_logits(
    stirred: ExpertModel, ids: Tensor, length: int
) -> None:
    mask = torch.ones_like(ids)
    mask[0, length:] = 0
    padded = ids.clone()
    padded[0, length:] = 0
    found = logits_of(stirred, padded, attention_mask=mask)
    alone = logits_of(stirred, ids[:1, :length])
    assert_close("padded", found[:1, :length], alone, "logits")
    assert_close("other", found[1:], logits_of(stirred, ids)[1:], "logits")


def test_left_padding_is_refused(stirred: ExpertModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with pytest.raises(ModelError, match="padded on the left.*padding_side = 'right'"):
        stirred(ids, attention_mask=mask)
    with pytest.raises(ModelError, match="padded on the left"):
        stirred.generate(ids, attention_mask=mask)


def test_left_padding_is_fine_without_assembler(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor, ids: Tensor
) -> None:
    model = convert(tiny_llama, tiny_calibration, ["assembler.width=0"]).model
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    assert bool(logits_of(model, ids, attention_mask=mask)[1, 2:].isfinite().all())


def test_k_equal_to_e_is_the_dense_model(
    tiny_expert_model: ExpertModel, tiny_llama_folder, ids: Tensor
) -> None:
    dense = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        expected = dense(ids).logits
    found = logits_of(
        tiny_expert_model, ids, walk_options=WalkOptions(experts_per_token=8)
    )
    assert_close("logits", found, expected, "logits")


def test_hidden_states_are_those_behind_the_logits(
    stirred: ExpertModel, ids: Tensor
) -> None:
    with torch.no_grad():
        found = stirred.llama.lm_head(stirred.hidden_states(ids))
        assert_close("logits", found, logits_of(stirred, ids), "fp32")
        every = stirred.llama.lm_head(stirred.hidden_states(ids, EVERY))
    assert_close("K = E", every, logits_of(stirred, ids, walk_options=EVERY), "fp32")


def test_the_loss_is_that_of_the_next_token(stirred: ExpertModel, ids: Tensor) -> None:
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        loss = stirred(ids, labels=labels).loss
    logits = logits_of(stirred, ids)[:, 3:-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 4:].flatten()
    )
    assert_close("loss", loss, expected, "fp32")


def test_training_lowers_the_loss_and_moves_only_trainables(
    tiny_expert_model: ExpertModel, tiny_tokens: Tensor
) -> None:
    """A few steps on one batch, with noisy masks."""
    model = tiny_expert_model
    trainable = {id(parameter) for parameter in model.trainable_parameters()}
    frozen = {n: p for n, p in model.named_parameters() if id(p) not in trainable}
    assert all(not parameter.requires_grad for parameter in frozen.values())
    assert all(parameter.requires_grad for parameter in model.trainable_parameters())
    assert "llama.model.embed_tokens.weight" in frozen
    assert not any("adapter" in n or "assembler" in n or "gate_w" in n for n in frozen)
    kept = {n: p.clone() for n, p in frozen.items()}
    kept |= {n: b.clone() for n, b in model.named_buffers()}
    batch, noise = tiny_tokens[-512:].view(8, 64), generator(0)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        options = WalkOptions(generator=noise)
        loss = model(batch, labels=batch, walk_options=options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in kept.items():
        assert torch.equal(now[name], value), name


def test_every_trainable_tensor_gets_a_gradient(
    stirred: ExpertModel, ids: Tensor
) -> None:
    options = WalkOptions(generator=generator(0))
    stirred(ids, labels=ids, walk_options=options).loss.backward()
    for name, parameter in stirred.named_parameters():
        if name.endswith("edge_strength_EE"):
            assert parameter.grad is None, "edges carry no data without chains"
        elif parameter.requires_grad:
            assert parameter.grad is not None and bool(parameter.grad.any()), name
            assert bool(parameter.grad.isfinite().all()), name
        else:
            assert parameter.grad is None, name


def test_a_new_graph_is_walked(tiny_expert_model: ExpertModel, ids: Tensor) -> None:
    model = tiny_expert_model
    before = logits_of(model, ids)
    edits = [Edit(layer=1, src=e, dst=e, kind="prune") for e in range(4, 8)]
    graph = apply_edits(model.graph, edits, version=1)
    model.set_graph(graph)
    assert torch.equal(model.graph.edge_mask_LEE, graph.edge_mask_LEE)
    assert not torch.equal(logits_of(model, ids), before)
    walks: dict[int, Walk] = {}
    options = WalkOptions(recorder=walks.__setitem__)
    logits_of(model, ids, walk_options=options)
    entries = walks[1].expert_ids_TK[walks[1].depth_TK == 0]
    assert sorted(walks) == [0, 1, 2] and int(entries.max()) < 4


def test_a_graph_of_another_shape_is_refused(tiny_expert_model: ExpertModel) -> None:
    graph = ExpertGraph(
        edge_mask_LEE=torch.eye(4, dtype=torch.bool).repeat(3, 1, 1),
        order_LE=torch.arange(4).repeat(3, 1),
    )
    with pytest.raises(
        ModelError, match=r"shape \(3, 4, 4\), the model needs \(3, 8, 8\)"
    ):
        tiny_expert_model.set_graph(graph)


def test_k_can_be_changed_for_the_whole_model(tiny_expert_model: ExpertModel) -> None:
    model = tiny_expert_model
    full = model.flops_fraction()
    model.set_experts_per_token(2)
    assert model.expert_config.experts_per_token == 2
    assert [layer.experts_per_token for layer in model.expert_layers] == [2, 2, 2]
    assert model.flops_fraction() < full == model.flops_fraction(4)
    with pytest.raises(ModelError, match="experts_per_token is 0"):
        model.set_experts_per_token(0)
    assert model.expert_config.experts_per_token == 2


def test_flops_are_counted_by_hand(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    """Two of three layers converted; D 64, M 128, E 8, K 2, Q 4."""
    model = convert(tiny_llama, tiny_calibration, ["experts.layers=1-"]).model
    dense = 3 * 64 * 128
    converted = 8 * 64 + 2 * 3 * 16 * 64 + 4 * 64 * (1 + 3)
    expected = (dense + 2 * converted) / (3 * dense)
    assert model.flops_fraction(2) == pytest.approx(expected)
    repaired = 8 * 64 + 4 * 3 * 16 * 64 + 2 * 4 * 64
    expected = (dense + 2 * repaired) / (3 * dense)
    assert model.flops_fraction() == pytest.approx(expected)
    every = 8 * 64 + dense
    assert model.flops_fraction(8) == pytest.approx((dense + 2 * every) / (3 * dense))


def test_flops_count_each_layers_own_visits() -> None:
    """D 64, M 128, E 8, Q 4: a gate of 512, experts of 3072, a repair of 512."""
    config = ExpertModelConfig(
        layers=(1, 2, 5),
        num_experts=8,
        experts_per_token=4,
        num_shared=1,
        surrogate_rank=3,
        repaired=(2, 4),
        repair_rank=4,
        visits=((1, 2, 3), (2, 8, 1)),
    )
    assert config.layer_visits(1) == {2: 2, 4: 8}
    dense = 3 * 64 * 128

    def found(position: int, k: int) -> float:
        return dense * config.layer_flops(position, k, model_width=64, rows=128)

    assert found(0, 4) == pytest.approx(512 + 2 * 3072 + 512)
    assert found(1, 4) == pytest.approx(
        512 + 8 * 3072
    ), "nothing is left to stand in for"
    assert found(2, 2) == pytest.approx(512 + 3 * 3072 + 512)
    assert found(2, 3) == pytest.approx(512 + 3 * 3072 + 3 * 64 * (1 + 4))
    assert found(2, 8) == pytest.approx(512 + 8 * 3072)


def test_visits_are_those_of_the_layer_and_seen_by_recorders(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor, ids: Tensor
) -> None:
    overrides = ["experts.other_k=2,6", "experts.allocate=true"]
    model = convert(tiny_llama, tiny_calibration, overrides).model
    config = model.expert_config
    assert any(len(set(row)) > 1 for row in config.visits)
    for k, row in (
        *zip(config.repaired, config.visits),
        (3, (3, 3, 3)),
        (8, (8, 8, 8)),
    ):
        walks: dict[int, Walk] = {}
        options = WalkOptions(experts_per_token=k, recorder=walks.__setitem__)
        logits_of(model, ids, walk_options=options)
        for layer, visits in enumerate(row):
            assert bool((walks[layer].visited_TE.sum(dim=1) == visits).all())


def test_repaired_models_train_and_stay_causal(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor, ids: Tensor
) -> None:
    overrides = ["experts.other_k=2", "experts.allocate=true"]
    model = stir(convert(tiny_llama, tiny_calibration, overrides).model)
    for k in (2, 4):
        options = WalkOptions(experts_per_token=k, generator=generator(0))
        model.zero_grad()
        model(ids, labels=ids, walk_options=options).loss.backward()
        for layer in model.expert_layers:
            # A layer of its shared expert alone, or of all experts, routes nothing.
            routes = 1 < layer.visits_at(k) < 8
            for name, parameter in layer.named_parameters():
                if "assembler" in name or name == "edge_strength_EE":
                    continue
                needed = routes or name in ADAPTERS
                assert bool(parameter.grad.any()) or not needed, (k, name)
            assert not any(buffer.requires_grad for buffer in layer.buffers())
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 101) % 512
    before, after = logits_of(model, ids), logits_of(model, changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert float((before - after)[:, 12].abs().max()) > 0.1


def test_the_config_round_trips_through_json() -> None:
    config = ExpertModelConfig(
        layers=(1, 2), num_experts=8, experts_per_token=4, num_shared=1, chains=True
    )
    assert ExpertModelConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelError, match=r"unknown keys \['colour'\]"):
        ExpertModelConfig.from_json(config.to_json() | {"colour": 1})
    repaired = replace(config, repaired=(2, 4), visits=((1, 3), (5, 3)), repair_rank=9)
    assert ExpertModelConfig.from_json(repaired.to_json()) == repaired
    assert json.loads(json.dumps(repaired.to_json())) == repaired.to_json()
    for visits in ([[1, 3]], [[1, 3], [5]], [[1, 3], [5, 3], [1, 1]]):
        with pytest.raises(ModelError, match=r"has visits for .* needs \[2, 2\]"):
            ExpertModelConfig.from_json(repaired.to_json() | {"visits": visits})
    scaled = replace(repaired, logit_scales=(0.5, 0.9))
    assert ExpertModelConfig.from_json(scaled.to_json()) == scaled
    assert (scaled.logit_scale(4), scaled.logit_scale(8)) == (0.9, 1.0)
    for scales in ([0.5], [0.5, 0.0], [0.5, -1.0], [0.5, math.inf], [0.5, "1"]):
        with pytest.raises(ModelError, match=r"logit_scales .* each of the K \[2, 4\]"):
            ExpertModelConfig.from_json(scaled.to_json() | {"logit_scales": scales})
    for key in ("layers", "num_experts", "repaired", "visits"):
        values = config.to_json()
        del values[key]
        with pytest.raises(ModelError, match=f"incomplete.*{key}"):
            ExpertModelConfig.from_json(values)
