"""Dense model to expert graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.common.errors import ModelError
from samv2.experts.allocation import Curve
from samv2.experts.moe_layers import WalkOptions
from samv2.models import bootstrap as bootstrapping
from samv2.models.bootstrap import (
    Bootstrapped,
    bootstrap,
    check_convertible,
    initial_config,
    parse_layers,
    spread,
    with_visits,
)
from samv2.models.convert_layer import Surveyed
from samv2.models.expert_model import ExpertDecoderLayer, ExpertModel
from samv2.models.logit_scale import split_calibration
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
        ["experts.other_k=1,2,3,6", "experts.allocate=true"],
        ["experts.repair=false"],
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


@pytest.mark.parametrize(
    "overrides", [[], ["experts.other_k=2", "experts.allocate=true"]]
)
def test_the_same_seed_gives_the_same_bits(
    tiny_llama_folder: Path, tiny_calibration: Tensor, overrides: list[str]
) -> None:
    made = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
        made.append(convert(llama, tiny_calibration, overrides))
    first, second = (found.model.state_dict() for found in made)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    found = [[replace(row, seconds=0.0) for row in one.layers] for one in made]
    assert found[0] == found[1]
    assert made[0].model.expert_config == made[1].model.expert_config


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
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.model.expert_config.base_fingerprint == "abc"
    assert [stats.sizes for stats in found.cluster_stats] == [(16,) * 7]
    (report,) = found.layers
    assert report.layer == 1 and report.visits == {4: 4}
    assert 0 < report.error[4] < 0.5 and 0 < report.left[4] < 1
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
    """The surveyed stream is the model's: causal attention, right positions."""
    llama = LlamaForCausalLM.from_pretrained(
        tiny_llama_folder, attn_implementation=attention
    )
    inputs: dict[int, Tensor] = {}
    for index, layer in enumerate(llama.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, index=index: inputs.__setitem__(index, args[0])
        )
    with torch.no_grad():
        llama(split_calibration(tiny_calibration)[0])
    expected = [inputs[index].flatten(0, 1) for index in range(3)]
    seen: dict[int, Tensor] = {}
    survey_layer = bootstrapping.survey_layer

    def spy(position: int, mlp: torch.nn.Module, x_ND: Tensor, *args: object):
        seen[position] = x_ND
        return survey_layer(position, mlp, x_ND, *args)

    monkeypatch.setattr(bootstrapping, "survey_layer", spy)
    convert(llama, tiny_calibration)
    for index in range(3):
        assert_close(f"layer {index}", seen[index], expected[index], "logits")


def at(k: int) -> WalkOptions:
    return WalkOptions(experts_per_token=k, use_assembler=False)


@pytest.fixture(scope="module")
def heldout(tiny_tokens: Tensor) -> Tensor:
    """(60, 64) tokens that neither model nor conversion has seen."""
    return tiny_tokens[-60 * 64 :].view(60, 64)


@pytest.fixture(scope="module")
def repaired(tiny_llama_folder: Path, tiny_calibration: Tensor) -> Bootstrapped:
    """Repairs for K = 1, 2, 4 and 6 of 8."""
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    return convert(llama, tiny_calibration, ["experts.other_k=1,2,6"])


def test_repairs_win_back_most_of_what_fewer_visits_lose(
    repaired: Bootstrapped,
    tiny_llama_folder: Path,
    tiny_calibration: Tensor,
    heldout: Tensor,
) -> None:
    """In held-out loss, against surrogates of the same rank."""
    dense = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    lossless = loss_of(dense, heldout)
    plain = convert(dense, tiny_calibration, ["experts.repair=false"]).model
    assert repaired.model.expert_config.repaired == (1, 2, 4, 6)
    assert plain.expert_config.repaired == () and plain.expert_config.repair_rank == 0
    for k in (1, 2, 4, 6):
        unrepaired = loss_of(plain, heldout, walk_options=at(k))
        found = loss_of(repaired.model, heldout, walk_options=at(k))
        assert lossless < found < unrepaired, k
        if k < 6:
            assert found - lossless < 0.7 * (unrepaired - lossless), k


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_k_is_best_served_by_its_own_repair(
    repaired: Bootstrapped, heldout: Tensor, k: int
) -> None:
    model = repaired.model
    own = loss_of(model, heldout, walk_options=at(k))
    stored = [layer.repair(k) for layer in model.expert_layers]
    try:
        for other in {1, 2, 4, 6} - {k}:
            for layer in model.expert_layers:
                borrowed = layer.repair(other)
                assert borrowed is not None
                layer.add_repair(k, borrowed)
            assert loss_of(model, heldout, walk_options=at(k)) > own, other
    finally:
        for layer, repair in zip(model.expert_layers, stored):
            assert repair is not None
            layer.add_repair(k, repair)
    assert loss_of(model, heldout, walk_options=at(k)) == own


def test_a_k_between_two_repairs_has_the_surrogates(repaired: Bootstrapped) -> None:
    for layer in repaired.model.expert_layers:
        assert layer.repair(3) is None and layer.repair(8) is None
        assert layer.surrogates is not None


@torch.no_grad()
def test_reported_errors_are_those_of_the_models_streams(
    repaired: Bootstrapped, tiny_llama_folder: Path, tiny_calibration: Tensor
) -> None:
    """mean ||converted - dense|| / ||dense|| behind every layer, at every K."""
    dense = LlamaForCausalLM.from_pretrained(tiny_llama_folder)

    def streams(model: torch.nn.Module, **options: object) -> list[Tensor]:
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, args, output: seen.append(output))
            for layer in model.model.layers
        ]
        model(split_calibration(tiny_calibration)[0], **options)
        for hook in hooks:
            hook.remove()
        return seen

    expected = streams(dense)
    assert [report.layer for report in repaired.layers] == [0, 1, 2]
    for k in (1, 4, 6):
        found = streams(repaired.model.llama, walk_options=at(k))
        for index, report in enumerate(repaired.layers):
            gap = (found[index] - expected[index]).norm(dim=2)
            error = float((gap / expected[index].norm(dim=2)).mean())
            assert report.error[k] == pytest.approx(error, rel=1e-3)
            assert report.visits == {1: 1, 2: 2, 4: 4, 6: 6}
            assert 0 < report.left[k] < 1 and min(report.ridges[k]) > 0


def test_layers_that_stay_dense_are_untouched(
    tiny_llama_folder: Path, tiny_calibration: Tensor
) -> None:
    dense = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    overrides = ["experts.layers=1", "experts.other_k=2", "experts.allocate=true"]
    model = convert(llama, tiny_calibration, overrides).model
    made = model.llama.state_dict()
    for name, value in dense.state_dict().items():
        if not name.startswith("model.layers.1.mlp."):
            assert torch.equal(made[name], value), name
    kinds = [type(layer) for layer in model.llama.model.layers]
    dense_kind = type(dense.model.layers[0])
    assert kinds == [dense_kind, ExpertDecoderLayer, dense_kind]


@pytest.mark.parametrize("layers", ["all", "1", "0,2"])
def test_allocation_costs_no_more_arithmetic(
    tiny_llama_folder: Path, tiny_calibration: Tensor, layers: str
) -> None:
    overrides = [f"experts.layers={layers}", "experts.other_k=1,2,3,6,7"]
    models = []
    for allocate in ("false", "true"):
        llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
        asked = [*overrides, f"experts.allocate={allocate}"]
        models.append(convert(llama, tiny_calibration, asked).model)
    even, uneven = models
    assert even.expert_config.visits == ()
    config = uneven.expert_config
    assert config.repaired == (1, 2, 3, 4, 6, 7) and len(config.visits) == 6
    for k, row in zip(config.repaired, config.visits, strict=True):
        assert uneven.flops_fraction(k) <= even.flops_fraction(k) + 1e-9
        assert [layer.visits_at(k) for layer in uneven.expert_layers] == list(row)
    assert uneven.flops_fraction(8) == even.flops_fraction(8)
    if layers == "all":
        assert any(len(set(row)) > 1 for row in config.visits)


def surveyed_with(curves: list[Curve]) -> list[Surveyed]:
    nothing = dict.fromkeys(("order_M", "gate", "surrogates", "edge_mask_EE", "stats"))
    return [Surveyed(curve=curve, **nothing) for curve in curves]


def test_allocation_is_never_worse_than_k_everywhere(
    tiny_llama: LlamaForCausalLM,
) -> None:
    """Where all but K = E gains nothing, one layer alone cannot pay for the step."""
    settings = tiny_settings("experts.allocate=true", "experts.layers=1")
    config = initial_config((1,), settings)
    cliff = Curve(visits=(1, 3, 4, 7, 8), errors=(1.0, 0.99, 0.9, 0.8, 0.0))
    found = with_visits(config, surveyed_with([cliff]), tiny_llama.config, settings)
    assert found.visits == ((4,),)


def test_allocation_moves_visits_to_where_they_are_needed(
    tiny_llama: LlamaForCausalLM,
) -> None:
    settings = tiny_settings("experts.allocate=true", "experts.other_k=2,8")
    config = initial_config((0, 1, 2), settings)
    weak = Curve(visits=(1, 2, 4, 8), errors=(0.04, 0.02, 0.01, 0.0))
    strong = Curve(visits=(1, 2, 4, 8), errors=(4.0, 2.0, 1.0, 0.0))
    surveyed = surveyed_with([weak, strong, weak])
    found = with_visits(config, surveyed, tiny_llama.config, settings)
    assert found.repaired == (2, 4)
    for k, row in zip(found.repaired, found.visits, strict=True):
        assert row[1] > k > row[0]
    off = tiny_settings("experts.other_k=2,8")
    assert with_visits(config, surveyed, tiny_llama.config, off) == config


@pytest.mark.parametrize(
    "overrides, repaired, rank",
    [
        ([], (4,), 4),
        (["experts.other_k=8,2,2"], (2, 4), 4),
        (["experts.experts_per_token=8"], (), 0),
        (["experts.experts_per_token=8", "experts.other_k=3"], (3,), 4),
        (["experts.repair=false", "experts.other_k=3"], (), 0),
        (["experts.combine=softmax", "experts.other_k=3"], (), 0),
    ],
)
def test_what_is_repaired_is_what_the_settings_ask_for(
    overrides: list[str], repaired: tuple[int, ...], rank: int
) -> None:
    config = initial_config((0, 1), tiny_settings(*overrides), "abc")
    assert (config.repaired, config.repair_rank) == (repaired, rank)
    assert config.layers == (0, 1) and config.base_fingerprint == "abc"


def test_at_most_the_models_width_is_used_of_a_rank(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    overrides = ["experts.repair_rank=1000", "experts.layers=1"]
    model = convert(tiny_llama, tiny_calibration, overrides).model
    repair = model.expert_layers[0].repair(4)
    assert repair is not None and repair.in_QD.shape == (64, 64)
    converted = 8 * 64 + 4 * 3 * 16 * 64 + 2 * 64 * 64
    dense = 3 * 64 * 128
    expected = (2 * dense + converted) / (3 * dense)
    assert model.flops_fraction() == pytest.approx(expected)


@pytest.mark.parametrize("rows, most", [(1, 1), (5, 9), (10, 3), (100, 7), (8, 8)])
def test_the_survey_reads_evenly_spaced_sequences(rows: int, most: int) -> None:
    whole_BS = torch.arange(rows).unsqueeze(1)
    found = spread(whole_BS, most).flatten().tolist()
    assert len(found) == len(set(found)) == min(rows, most)
    assert found[0] == 0 and (found[-1] == rows - 1 or most == 1)
    gaps = {after - before for before, after in zip(found, found[1:])}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_progress_ends_at_its_total(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    seen: list[tuple[int, int]] = []
    settings = tiny_settings("experts.allocate=true", "experts.other_k=2")
    bootstrap(
        tiny_llama,
        tiny_calibration,
        settings,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 6) for done in range(1, 7)]
