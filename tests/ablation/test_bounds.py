"""Each bound holds for a run, and is found broken in a run that was tampered with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from samv2.ablation.bounds import CHECKS, OK, check_bounds
from samv2.ablation.multiply_adds import (
    counted_fraction,
    traced_visits,
    trained_visits,
)
from samv2.ablation.run_files import RunFiles
from samv2.federated.server_app import run_embedded
from samv2.models.quantised_blocks import quantise_model
from samv2.models.save import load_expert_model, save_expert_model
from samv2.updates.packing import Manifest, inspect, pack, unpack
from tests.federated.runs import quiet, small_settings


@pytest.fixture
def doctored(kept_run: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(kept_run, tmp_path / "run"))


def broken(root: Path, name: str) -> str:
    """What one check says; all others must hold."""
    found = check_bounds(root)
    others = {key: text for key, text in found.items() if key != name and text != OK}
    assert not others
    return found[name]


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_config(root: Path, old: str, new: str) -> None:
    path = root / "config.toml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def edit_metrics(root: Path, **changes: Any) -> None:
    path = root / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_keeps_all_of_them(kept_run: Path) -> None:
    assert check_bounds(kept_run) == dict.fromkeys(CHECKS, OK)
    assert sum(len(merge["edits"]) for merge in RunFiles(root=kept_run).merges.values())


def test_masks_below_the_diagonal_are_found(doctored: Path) -> None:
    masks = np.load(doctored / "mask_debug.npy")
    masks[1, 0, 5, 2] = True
    np.save(doctored / "mask_debug.npy", masks)
    assert "mask_debug.npy has 1 edges below" in broken(doctored, "check_masks")
    np.save(doctored / "mask_debug.npy", np.triu(masks).astype(np.float32))
    assert "float32, not bool" in broken(doctored, "check_masks")


@pytest.mark.parametrize("where", ["checkpoints/round_0001", "clients/client_0001"])
def test_masks_are_read_where_they_are_stored(doctored: Path, where: str) -> None:
    path = sorted((doctored / where).glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("edge_mask_LEE"))
    tensors[name][2, 7, 0] = True
    save_file(tensors, path)
    found = check_bounds(doctored)
    assert f"{name} of {where}" in found["check_masks"]


def test_a_run_without_a_checkpoint(doctored: Path) -> None:
    shutil.rmtree(doctored / "checkpoints")
    assert "no checkpoint" in broken(doctored, "check_masks")


def test_more_edits_than_allowed_are_found(doctored: Path) -> None:
    edit_config(doctored, "rho_max = 4", "rho_max = 3")
    assert "has 4 edits, rho_max is 3" in broken(doctored, "check_edits")


def test_edits_that_are_not_reported_are_found(doctored: Path) -> None:
    edit_metrics(doctored, edits=1)
    assert "reports 1 edits and made" in broken(doctored, "check_edits")


def test_a_graph_that_no_edit_explains_is_found(doctored: Path) -> None:
    path = doctored / "checkpoints" / "round_0002" / "state.safetensors"
    tensors = load_file(path)
    mask_LEE = tensors["graph.edge_mask_LEE"]
    mask_LEE[0, 0, 7] = ~mask_LEE[0, 0, 7]
    save_file(tensors, path)
    found = broken(doctored, "check_edits")
    assert "round_0002 has 1 edges that no edit explains" in found


def test_a_round_without_its_merge_is_found(doctored: Path) -> None:
    edit_config(doctored, "rounds = 2", "rounds = 3")
    found = check_bounds(doctored)
    assert "merge_round3.json is missing" in found["check_edits"]
    assert "KeyError" in found["check_reported_bytes"]


def test_more_experts_than_allowed_are_found(doctored: Path) -> None:
    edit_config(doctored, "send_experts = 0", "send_experts = 2")
    found = broken(doctored, "check_sent_experts")
    assert "experts of layer 0 in round 1, send_experts is 2" in found


def test_a_block_that_rounded_to_zeros_is_not_reported(doctored: Path) -> None:
    path = doctored / "frames" / "round_0001_client_0000.bin"
    info = inspect(path.read_bytes())
    manifest = Manifest.of(
        load_expert_model(RunFiles(root=doctored).model)[0].read_blocks()
    )
    update = unpack(path.read_bytes(), manifest, round=1)
    first = min(update)
    update[first] = torch.full_like(update[first], 1e-9)
    path.write_bytes(pack(update, manifest, round=1, codec="f16"))
    assert len(inspect(path.read_bytes()).tensors) == len(info.tensors)
    found = check_bounds(doctored)["check_sent_experts"]
    assert f"reports {len(update)} blocks of client 0" in found
    assert f"its frame changes {len(update) - 1}" in found


def test_a_run_that_sends_few_experts_keeps_the_bound(
    expert_folder: Path, tmp_path: Path
) -> None:
    settings = small_settings(
        expert_folder,
        "federation.rounds=1",
        "federation.send_experts=2",
        "federation.keep_frames=true",
    )
    run_embedded(settings, tmp_path, console=quiet())
    assert check_bounds(tmp_path) == dict.fromkeys(CHECKS, OK)


def test_updates_beyond_the_budget_are_found(doctored: Path) -> None:
    edit_config(doctored, "update_budget_bytes = 16384", "update_budget_bytes = 8192")
    found = broken(doctored, "check_update_bytes")
    assert "bytes in round 1, update_budget_bytes is 8192" in found


@pytest.mark.parametrize(
    ("file", "key", "word"),
    [
        ("metrics.jsonl", "bytes_up", "reports bytes_up"),
        ("metrics.jsonl", "bytes_up_per_client", "reports bytes_up_per_client"),
        ("summary.json", "bytes_up_per_client_round", "summary.json reports"),
        ("merge_round2.json", "bytes_up", "round 2 reports"),
    ],
)
def test_bytes_that_were_not_sent_are_found(
    doctored: Path, file: str, key: str, word: str
) -> None:
    if file == "metrics.jsonl":
        row = json.loads((doctored / file).read_text().splitlines()[0])
        edit_metrics(doctored, **{key: row[key] - 1})
    else:

        def fewer(value: Any) -> None:
            target = value if key in value else value["clients"]["1"]
            target[key] -= 1

        edit_json(doctored / file, fewer)
    assert word in broken(doctored, "check_reported_bytes")


def test_token_counts_that_drift_asks_for_are_counted(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    settings = small_settings(
        tiny_llama_folder,
        "adapter.siblings=3",
        "assembler.width=0",
        "edits.rho_max=0",
        "federation.rounds=2",
        "federation.keep_frames=true",
        "data.drift=2:0=math",
        "drift.detect=true",
        "drift.distance=0.2",
    )
    run_embedded(settings, tmp_path, console=quiet())
    assert check_bounds(tmp_path) == dict.fromkeys(CHECKS, OK)
    (later,) = (tmp_path / "frames").glob("round_*.counts.bin")
    assert later.name == "round_0001_client_0000.counts.bin"
    assert len(list((tmp_path / "frames").glob("client_*.counts.bin"))) == 2
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    edit_metrics(tmp_path, bytes_up=row["bytes_up"] - later.stat().st_size)
    found = broken(tmp_path, "check_reported_bytes")
    assert "round 1 reports bytes_up" in found


def test_frames_that_are_missing_foreign_or_of_another_round(doctored: Path) -> None:
    frames = doctored / "frames"
    shutil.copy(
        frames / "round_0001_client_0000.bin", frames / "round_0002_client_0000.bin"
    )
    shutil.move(
        frames / "round_0001_client_0001.bin", frames / "round_0001_client_0007.bin"
    )
    found = check_bounds(doctored)["check_reported_bytes"]
    assert "client 1 in round 1 was not kept" in found
    assert "client 7 in round 1 was kept, none was merged" in found
    assert "client 0 in round 2 is of round 1" in found
    (frames / "round_0001_client_0000.usage.bin").unlink()
    assert "usage.bin" in check_bounds(doctored)["check_reported_bytes"]


@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_flops_that_were_not_counted_are_found(doctored: Path, factor: float) -> None:
    def change(summary: Any) -> None:
        summary["ffn_flops_fraction"] *= factor

    edit_json(doctored / "summary.json", change)
    assert "the experts that fired take" in broken(doctored, "check_reported_flops")


def test_a_trace_with_more_visits_is_found(doctored: Path) -> None:
    def change(trace: Any) -> None:
        trace[0]["layers"][1]["fired"]["3"] += 1

    edit_json(doctored / "expert_call_trace.json", change)
    assert "experts that fired take" in broken(doctored, "check_reported_flops")


def test_training_with_more_visits_is_found(doctored: Path) -> None:
    def change(merge: Any) -> None:
        tokens = sum(one["tokens"] for one in merge["clients"].values())
        merge["usage_per_layer"][2] = 4 * tokens + 1

    edit_json(doctored / "merge_round2.json", change)
    found = broken(doctored, "check_reported_flops")
    assert "experts of layer 2 in round 2, the reported cost is of 4" in found


def test_multiply_adds_by_hand(kept_run: Path) -> None:
    files = RunFiles(root=kept_run)
    assert traced_visits(files) == [4.0, 4.0, 4.0]
    # D = 64, M = 128, E = 8, K = 4: gate, half the FFN, a stand-in of rank 4.
    expected = (8 * 64 + 3 * 64 * 64 + 2 * 4 * 64) / (3 * 128 * 64)
    assert counted_fraction(files, [4.0] * 3) == pytest.approx(expected, rel=1e-12)
    walked = trained_visits(files)
    assert set(walked) == {1, 2}
    assert all(1 <= visits <= 4 for row in walked.values() for visits in row)


@pytest.mark.parametrize(
    ("k", "rank", "expected"),
    [
        (4, 4, 8 * 64 + 3 * 64 * 64 + 4 * 64 * (1 + 4)),
        (2, 4, 8 * 64 + 3 * 32 * 64 + 4 * 64 * (1 + 3)),
        (8, 4, 8 * 64 + 3 * 128 * 64),
    ],
)
def test_surrogates_and_four_bits_by_hand(
    tiny_llama_folder: Path,
    kept_run: Path,
    tmp_path: Path,
    k: int,
    rank: int,
    expected: int,
) -> None:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.federated.runs import SMALL
    from tests.helpers import convert, stdlib_text

    model, tokenizer = load_expert_model(RunFiles(root=kept_run).model)
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()
    text = tokenizer(stdlib_text()[:20_000], return_tensors="pt").input_ids
    overrides = [*SMALL, "experts.repair=false", f"experts.surrogate_rank={rank}"]
    made = convert(llama, text[0, : 16 * 64].view(16, 64), overrides).model
    quantise_model(made)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    save_expert_model(made, tokenizer, tmp_path / "model")
    files = RunFiles(root=tmp_path)
    files.__dict__["model"] = tmp_path / "model"
    files.__dict__["settings"] = small_settings(
        tmp_path / "model", f"experts.experts_per_token={k}"
    )
    found = counted_fraction(files, [float(k)] * 3)
    assert found == pytest.approx(expected / (3 * 128 * 64), rel=1e-12)
    assert found == pytest.approx(made.flops_fraction(k), rel=1e-12)
