"""Parts of a model for clients with budgets: chosen, run, trained and merged."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samv2.common.errors import ConfigError, FederationError, FrameError, ModelError
from samv2.common.telemetry import read_metrics
from samv2.experts.moe_layers import WalkOptions
from samv2.experts.sub_graph import SubGraph
from samv2.federated.client_round import load_runtime
from samv2.federated.memory import estimate_memory
from samv2.federated.parts import Parts, describe_part, plan_parts
from samv2.federated.server_app import run_embedded
from samv2.federated.subgraph import (
    ClientBudget,
    Planner,
    believed_budget,
    budget_of,
    gate_mass,
    keep_heaviest,
    whole_manifest,
)
from samv2.federated.usage import pack_usage, zero_counts
from samv2.federated.validate import validate_reply
from samv2.models.save import load_expert_model
from samv2.models.sub_model import load_sub_model
from samv2.updates.packing import Manifest, pack
from tests.federated.runs import (
    EXPERTS,
    LAYERS,
    assert_same_bits,
    checkpoint_tensors,
    interrupt,
    quiet,
    small_settings,
    toy_manifest,
    toy_reply,
    toy_settings,
    toy_state,
    toy_update,
)

TOKENS = torch.arange(3, 131).view(2, 64)


def every(size: int, layers: int, k: int, micro: int = 0) -> SubGraph:
    """The first experts of each layer of eight."""
    return SubGraph(
        kept=(tuple(range(size)),) * layers,
        num_experts=8,
        experts_per_token=k,
        micro_batch=micro,
    )


def planner_for(folder: Path, **changes: object) -> Planner:
    """A planner of the tiny model, at K = 4 with batches of four windows of 64."""
    model, _ = load_expert_model(folder)
    values: dict[str, object] = {
        "config": model.expert_config,
        "dense": model.config,
        "mass_LE": gate_mass(model, TOKENS),
        "experts_per_token": 4,
        "batch_size": 4,
        "sequence_length": 64,
        "weight_bytes": 4,
    }
    return Planner(**(values | changes))


def test_all_experts_are_the_whole_model_to_the_bit(expert_folder: Path) -> None:
    whole, _ = load_expert_model(expert_folder)
    layers = len(whole.expert_layers)
    part, graph = load_sub_model(expert_folder, every(8, layers, 4))
    assert torch.equal(graph.edge_mask_LEE, whole.graph.edge_mask_LEE)
    with torch.no_grad():
        assert torch.equal(part.hidden_states(TOKENS), whole.hidden_states(TOKENS))
    blocks = part.read_blocks()
    assert all(torch.equal(blocks[k], v) for k, v in whole.read_blocks().items())


@pytest.mark.parametrize("k", [3, 4])
def test_a_part_is_what_the_formula_says(expert_folder: Path, k: int) -> None:
    """K = 4 has a repair, K = 3 the surrogates of all that is not visited."""
    whole, _ = load_expert_model(expert_folder)
    layers = len(whole.expert_layers)
    assert whole.expert_config.repaired == (4,)
    kept = (0, 2, 3, 5, 6)
    chosen = SubGraph(kept=(kept,) * layers, num_experts=8, experts_per_token=k)
    part, _ = load_sub_model(expert_folder, chosen)
    x_TD = torch.randn(40, whole.config.hidden_size)
    for index, layer in enumerate(part.expert_layers):
        reference = whole.expert_layers[index]
        reference.edge_mask_EE.copy_(torch.eye(8, dtype=torch.bool))
        layer.edge_mask_EE.copy_(torch.eye(5, dtype=torch.bool))
        with torch.no_grad():
            found, _ = layer(x_TD.unsqueeze(0), WalkOptions(use_assembler=False))
            scores_TE = reference.scores(x_TD)
            blocks = reference.blocks(k, x_TD.dtype)
            wanted = torch.zeros_like(x_TD)
            for token, x_D in enumerate(x_TD):
                routed = sorted(kept[1:], key=lambda e: -float(scores_TE[token, e]))
                visited = {0, *routed[: k - 1]}
                for expert in visited:
                    gate = blocks.gate_EFD[expert] @ x_D
                    up = blocks.up_EFD[expert] @ x_D
                    hidden = torch.nn.functional.silu(gate) * up
                    wanted[token] += hidden @ blocks.down_EFD[expert]
                if k == 3:
                    stand_ins = reference.surrogates
                    low = stand_ins.shared_QD @ x_D
                    for expert in set(range(8)) - visited:
                        wanted[token] += low @ stand_ins.out_EQD[expert]
                        wanted[token] += stand_ins.bias_ED[expert]
            if k == 4:
                wanted += reference.stand_in(x_TD, k)
        torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)


def test_what_is_no_part_of_the_model_is_refused(expert_folder: Path) -> None:
    whole, _ = load_expert_model(expert_folder)
    layers = len(whole.expert_layers)
    with pytest.raises(ModelError, match="has 2 of 8|has .* of 8"):
        load_sub_model(expert_folder, every(4, layers + 1, 4))
    headless = SubGraph(kept=((1, 2, 3),) * layers, num_experts=8, experts_per_token=2)
    with pytest.raises(ModelError, match="leaves out one of the 1 shared"):
        load_sub_model(expert_folder, headless)


def test_the_manifest_is_the_wholes(expert_folder: Path) -> None:
    whole, _ = load_expert_model(expert_folder)
    part, _ = load_sub_model(expert_folder, every(3, len(whole.expert_layers), 2))
    manifest = whole_manifest(expert_folder, part)
    assert manifest.fingerprint == Manifest.of(whole.read_blocks()).fingerprint


def test_the_heaviest_experts_are_kept_and_ties_go_to_the_lower() -> None:
    mass = torch.tensor([[0.0, 0.2, 0.5, 0.2, 0.1], [0.3, 0.1, 0.1, 0.1, 0.4]])
    assert keep_heaviest(mass, 3, 1) == ((0, 1, 2), (0, 1, 4))
    assert keep_heaviest(mass, 2, 0) == ((1, 2), (0, 4))


def test_the_greedy_choice_is_the_knapsacks_optimum(expert_folder: Path) -> None:
    planner = planner_for(expert_folder)
    layers = len(planner.mass_LE)
    sizes = {
        experts: planner.memory(every(experts, layers, min(4, experts), 1)).total
        for experts in range(1, 9)
    }
    for limit in (2, 4, 7):
        budget = ClientBudget(memory_bytes=sizes[limit] + 1)
        part = planner.plan(budget)
        assert part is not None and part.size == limit
        best = 0.0
        for size in range(1, 9):
            if sizes[size] > budget.memory_bytes:
                continue
            mass = 0.0
            for mass_E in planner.mass_LE:
                choices = itertools.combinations(range(1, 8), size - 1)
                mass += max(float(mass_E[[0, *c]].sum()) for c in choices)
            best = max(best, mass)
        kept = sum(
            float(row[list(ids)].sum()) for row, ids in zip(planner.mass_LE, part.kept)
        )
        assert kept == pytest.approx(best)


def test_smaller_passes_come_before_fewer_experts(expert_folder: Path) -> None:
    planner = planner_for(expert_folder)
    layers = len(planner.mass_LE)
    assert planner.plan(ClientBudget()) is None
    assert planner.plan(ClientBudget(memory_bytes=10**12)) is None
    two = planner.memory(every(8, layers, 4, 2)).total
    part = planner.plan(ClientBudget(memory_bytes=two))
    assert part is not None and part.whole and part.micro_batch == 2
    with pytest.raises(ConfigError, match="budget is 1,000 bytes, but the smallest"):
        planner.plan(ClientBudget(memory_bytes=1000))


def test_flops_lower_the_visits(expert_folder: Path) -> None:
    planner = planner_for(expert_folder, experts_per_token=8)
    share = planner.config.flops_fraction(planner.dense, 4)
    part = planner.plan(ClientBudget(flops=share + 0.3))
    assert part is not None and part.whole
    assert part.experts_per_token == 4, "the largest K that has a repair"
    bare = planner_for(
        expert_folder,
        experts_per_token=8,
        config=replace(planner.config, repaired=(), logit_scales=()),
    )
    share = bare.config.flops_fraction(bare.dense, 6)
    part = bare.plan(ClientBudget(flops=share))
    assert part is not None and part.experts_per_token == 6
    with pytest.raises(ConfigError, match="FLOPs budget is 0.01"):
        planner.plan(ClientBudget(flops=0.01))


def test_budgets_come_from_the_node_before_the_settings() -> None:
    settings = small_settings("-", "budgets.memory_bytes=0,5", "budgets.flops=0.5")
    assert budget_of(settings, 0) == ClientBudget(flops=0.5)
    assert budget_of(settings, 3) == ClientBudget(memory_bytes=5, flops=0.5)
    node = {"memory-budget-bytes": 7, "flops-budget": "0.25"}
    assert budget_of(settings, 3, node) == ClientBudget(memory_bytes=7, flops=0.25)
    assert not budget_of(small_settings("-"), 0).limited
    with pytest.raises(ConfigError, match="node config"):
        budget_of(settings, 0, {"flops-budget": "much"})


def test_a_budget_that_was_sent_is_not_believed_blindly() -> None:
    assert believed_budget(5, 0.5) == ClientBudget(memory_bytes=5, flops=0.5)
    for wrong in (-1, 2**60, True, 1.5, "9", None):
        assert believed_budget(wrong, 0.0).memory_bytes == 0
    for wrong in (-1.0, float("nan"), float("inf"), 1, None):
        assert believed_budget(0, wrong).flops == 0


def test_memory_falls_with_everything_that_is_left_out(expert_folder: Path) -> None:
    model, _ = load_expert_model(expert_folder)
    config, dense = model.expert_config, model.config

    def total(experts: int, tokens: int, **changes: object) -> int:
        used = replace(config, **changes)
        return estimate_memory(
            used, dense, experts=experts, experts_per_token=2, tokens=tokens
        ).total

    assert total(8, 256) > total(4, 256) > total(4, 64)
    assert total(8, 256) > total(8, 256, quantise="nf4")
    assert total(8, 256, siblings=4) > total(8, 256)
    parts = estimate_memory(
        config, dense, experts=8, experts_per_token=2, tokens=64
    ).to_dict()
    total_of_parts = sum(value for name, value in parts.items() if name != "total")
    assert abs(parts["total"] - total_of_parts) < 8


def test_a_block_that_the_client_lacks_is_refused() -> None:
    state, manifest, settings = toy_state(), toy_manifest(), toy_settings()
    reply = toy_reply(update=pack(toy_update(ids=(0, 3)), manifest, round=1))
    validate_reply(reply, 0, state, manifest, settings, held={0, 3})
    counts = zero_counts(LAYERS, EXPERTS)
    counts.usage_LEE[0, 0, 3] = 2
    walked = replace(reply, usage=pack_usage(counts, round=1))
    validate_reply(walked, 0, state, manifest, settings, held={0, 3})
    counts.demand_LEE[0, 0, 1] = 1
    walked = replace(reply, usage=pack_usage(counts, round=1))
    with pytest.raises(FrameError, match="edges of experts that the client lacks"):
        validate_reply(walked, 0, state, manifest, settings, held={0, 3})
    with pytest.raises(FrameError) as caught:
        validate_reply(reply, 0, state, manifest, settings, held={0})
    assert caught.value.reason == "not_held"


def test_parts_name_what_is_held(
    expert_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planner = planner_for(expert_folder)
    layers = len(planner.mass_LE)
    small = planner.memory(every(3, layers, 3, 1)).total
    assert planner.plan(ClientBudget(memory_bytes=small)).experts_per_token == 3
    budgets = {0: ClientBudget(), 1: ClientBudget(memory_bytes=small)}
    with caplog.at_level(logging.INFO, logger="samv2"):
        parts, unfit = plan_parts(planner, budgets | {2: budgets[1]})
    assert unfit == {} and parts.part(0) is None and parts.held(0) is None
    part = parts.part(1)
    assert part is not None and part.size == 3
    held = parts.held(1)
    assert held is not None and len(held) == 3 * layers + 1
    assert "2 clients hold 3 of 8 experts a layer, K = 3" in caplog.text
    assert "the whole model: 8 experts" in describe_part(planner, None)
    whole = Parts(of_client={0: every(8, layers, 4, 1)})
    assert whole.held(0) is None


def test_a_client_that_nothing_fits_costs_nobody_else(expert_folder: Path) -> None:
    budgets = {
        0: ClientBudget(),
        1: ClientBudget(memory_bytes=1),
        2: ClientBudget(flops=1e-9),
    }
    parts, unfit = plan_parts(planner_for(expert_folder), budgets)
    assert sorted(unfit) == [1, 2] and parts.of_client == {}
    assert "memory budget is 1 bytes" in unfit[1]


@pytest.mark.parametrize("needed", [1, 2])
def test_a_run_goes_on_without_it_while_there_are_enough(
    expert_folder: Path, tmp_path: Path, needed: int
) -> None:
    settings = small_settings(
        expert_folder,
        "budgets.memory_bytes=0,1",
        "federation.rounds=1",
        f"federation.min_replies={needed}",
    )
    if needed == 2:
        with pytest.raises(FederationError, match="Client 1: .*is 1 bytes"):
            run_embedded(settings, tmp_path / "run", console=quiet())
        return
    run_embedded(settings, tmp_path / "run", console=quiet())
    told = (tmp_path / "run" / "clients.jsonl").read_text()
    assert [row["client"] for row in json.loads(told)["clients"]] == [0]


@pytest.fixture(scope="module")
def mixed_settings(expert_folder: Path) -> list[str]:
    """Two clients, of which the second holds part of the experts."""
    planner = planner_for(expert_folder)
    small = planner.memory(every(5, len(planner.mass_LE), 4, 1)).total
    return [f"budgets.memory_bytes=0,{small}", "train.learning_rate=5e-3"]


def test_a_mixed_federation_merges_and_resumes_to_the_bit(
    expert_folder: Path, mixed_settings: list[str], tmp_path: Path
) -> None:
    settings = small_settings(expert_folder, *mixed_settings)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_embedded(settings, whole, console=quiet())
    experts = 8 * len(load_expert_model(expert_folder)[0].expert_layers)
    merge = json.loads((whole / "merge_round3.json").read_text())
    assert merge["refused"] == [] and set(merge["clients"]) == {"0", "1"}
    by_client = {
        client: {int(k) for k, who in merge["contributors"].items() if client in who}
        for client in (0, 1)
    }
    assert len(by_client[1] - {experts}) == 5 * experts // 8
    assert by_client[0] & by_client[1] > {experts}
    rows = read_metrics(whole)
    first, last = rows[0]["perplexity"], rows[-1]["perplexity"]
    assert sum(last.values()) < sum(first.values())

    interrupt(settings, parted, in_round=3)
    run_embedded(settings, parted, resume=True, console=quiet())
    assert_same_bits(checkpoint_tensors(whole, 3), checkpoint_tensors(parted, 3))


def test_a_runtime_holds_its_part(expert_folder: Path, tmp_path: Path) -> None:
    settings = small_settings(expert_folder)
    whole = load_runtime(expert_folder, tmp_path, tmp_path, settings)
    layers = len(whole.model.expert_layers)
    runtime = load_runtime(
        expert_folder, tmp_path, tmp_path, settings, every(3, layers, 2)
    )
    assert runtime.manifest.fingerprint == whole.manifest.fingerprint
    assert runtime.model.expert_layers[0].gate_EFD.shape[0] == 3
    assert len(runtime.base_blocks) == 3 * layers + 1
