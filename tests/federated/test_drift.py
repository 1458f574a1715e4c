"""Drift: the two tests, what is done about it, and a run whose client changes its text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samv2.common.errors import CheckpointError
from samv2.common.settings import DriftSettings
from samv2.common.telemetry import read_metrics
from samv2.data.shard_types import (
    ClientShard,
    FederatedIndex,
    FederatedText,
    LaterText,
)
from samv2.data.shards import load_client, save_federated_text
from samv2.experts.block_ids import expert_block, gate_block
from samv2.experts.sibling_gate import (
    BUCKETS,
    NEVER,
    fit_sibling_gate,
    gate_for_kinds,
)
from samv2.federated.checkpoint import latest_checkpoint, load_checkpoint
from samv2.federated.client_round import state_folder, tell_counts
from samv2.federated.client_state import load_counts
from samv2.federated.drift import (
    LossWatch,
    SiblingChange,
    SiblingMemory,
    apply_changes,
    begin,
    describe,
    distance,
    nearest_kind,
    observe,
    respond,
    retire,
)
from samv2.federated.drift_state import from_parts, to_parts
from samv2.federated.run_folder import RunFolder
from samv2.federated.scores import MOVED, domain_names, told_distances
from samv2.federated.server_app import run_embedded
from samv2.federated.siblings import unpack_counts, used_siblings
from tests.federated.runs import (
    assert_same_bits,
    checkpoint_tensors,
    interrupt,
    quiet,
    small_settings,
)

SETTINGS = DriftSettings(detect=True, patience=2)


def text(kind: int) -> Tensor:
    """Counts of a kind of text; two kinds share a tenth of their tokens."""
    counts = torch.zeros(BUCKETS)
    counts[:10] = 10
    counts[100 * kind : 100 * kind + 90] = 10
    return counts


def memory_of(*kinds: int) -> SiblingMemory:
    """Client i has kind ``kinds[i]`` and sibling i."""
    members = {client: client for client in range(len(kinds))}
    return begin({c: text(kind) for c, kind in enumerate(kinds)}, members)


def test_page_hinkley_alarms_at_a_rise_and_not_at_noise_or_a_fall() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.05 * torch.randn(40, generator=generator)).tolist()
    falling = [4 - 0.02 * n + noise[n] for n in range(40)]
    watch = LossWatch()
    for loss in falling:
        watch = watch.after(loss, SETTINGS.tolerance)
        assert watch.statistic < SETTINGS.threshold
    rounds = 0
    while watch.statistic <= SETTINGS.threshold:
        watch, rounds = watch.after(4.3, SETTINGS.tolerance), rounds + 1
    assert rounds <= 2


def test_page_hinkley_is_the_textbooks_while_the_mean_does_not_fade() -> None:
    losses, delta = [1.0, 2.0, 1.5], 0.1
    watch, sums = LossWatch(), [0.0]
    for count, loss in enumerate(losses, start=1):
        watch = watch.after(loss, delta)
        sums.append(sums[-1] + loss - sum(losses[:count]) / count - delta)
    assert watch.statistic == pytest.approx(sums[-1] - min(sums))


def test_the_mean_of_the_losses_fades() -> None:
    watch = LossWatch()
    for loss in [9.0] * 5 + [5.0] * 12:
        watch = watch.after(loss, 0.0)
    assert watch.mean == pytest.approx(5, abs=0.05)


def test_every_client_is_watched_by_itself() -> None:
    memory = memory_of(1, 2)
    memory, alarmed = observe(memory, {0: 3.0, 1: 3.0}, {0: 0.3}, SETTINGS)
    assert alarmed == ()
    memory, alarmed = observe(memory, {1: 5.0}, {}, SETTINGS)
    assert alarmed == (1,)
    _, alarmed = observe(memory, {}, {0: 0.9, 1: 0.1}, SETTINGS)
    assert alarmed == (0,)
    assert memory.watches[0].count == 1 and memory.watches[1].count == 2


def test_the_distance_is_that_of_jensen_and_shannon() -> None:
    assert distance(text(1), 7 * text(1)) == pytest.approx(0, abs=1e-3)
    assert distance(text(1), torch.eye(1, BUCKETS)[0] * 0 + text(1).roll(4000)) == 1
    p, q = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
    middle = torch.tensor([0.5, 0.5])
    nats = sum(float((x / 4 * (x / 4 / middle).log()).sum()) for x in (p, q)) / 2
    assert distance(p, q) == pytest.approx((nats / torch.tensor(2.0).log()) ** 0.5)


def test_a_loss_that_rose_over_the_same_text_changes_nothing() -> None:
    memory, _ = observe(memory_of(1, 2), {0: 1.0}, {}, SETTINGS)
    after, changes = respond(memory, {0: text(1)}, SETTINGS, siblings=3, round=4)
    assert changes == () and after.members == memory.members
    assert after.watches[0] == LossWatch()


def test_known_text_reuses_its_sibling() -> None:
    memory = memory_of(1, 2)
    after, changes = respond(memory, {0: text(2)}, SETTINGS, siblings=3, round=4)
    assert [(c.kind, c.sibling, c.clients) for c in changes] == [("reuse", 1, (0,))]
    assert after.members == {0: 1, 1: 1} and after.kinds.keys() == {0, 1}
    assert torch.equal(after.counts[0], text(2))


def test_new_text_gets_one_sibling_a_round() -> None:
    memory = memory_of(1, 2, 2)
    counts = {0: text(5), 1: text(6), 2: text(5)}
    after, changes = respond(memory, counts, SETTINGS, siblings=5, round=4)
    assert [(c.kind, c.sibling, c.clients) for c in changes] == [("spawn", 3, (0, 2))]
    assert changes[0].parent == nearest_kind(memory, text(5))[0]
    assert after.members == {0: 3, 1: 1, 2: 3} and after.spawned == {3: 4}
    assert torch.equal(after.counts[1], text(2)), "it waits, and is asked again"
    again, changes = respond(after, {1: text(6)}, SETTINGS, siblings=5, round=5)
    assert [(c.kind, c.sibling) for c in changes] == [("spawn", 4)]
    none, changes = respond(again, {2: text(7)}, SETTINGS, siblings=5, round=6)
    assert changes[0].kind == "none" and "no sibling is left" in changes[0].reason
    assert none.kinds.keys() == again.kinds.keys()
    off = DriftSettings(detect=True, spawn=False)
    _, changes = respond(memory, counts, off, siblings=5, round=4)
    assert {c.kind for c in changes} == {"none"}
    assert all("spawning is off" in c.reason for c in changes)


def test_a_spawned_sibling_that_nobody_needs_is_retired() -> None:
    memory, _ = respond(memory_of(1, 2), {0: text(5)}, SETTINGS, siblings=3, round=4)
    memory, changes = retire(memory, SETTINGS)
    assert changes == () and memory.idle == {2: 0}
    memory, _ = respond(memory, {0: text(2)}, SETTINGS, siblings=3, round=5)
    memory, changes = retire(memory, SETTINGS)
    assert changes == () and memory.idle == {2: 1}
    memory, changes = retire(memory, SETTINGS)
    assert [(c.kind, c.sibling) for c in changes] == [("retire", 2)]
    assert memory.kinds.keys() == {0, 1} and memory.spawned == memory.idle == {}
    _, changes = respond(memory, {1: text(6)}, SETTINGS, siblings=3, round=9)
    assert changes[0].kind == "spawn" and changes[0].sibling == 2


def test_blocks_follow_the_changes() -> None:
    """Two experts and three siblings: blocks 0-1, the assembler's 2, 3-4, 5-6, gate 7."""
    ids = [expert_block(e, 2, g) for g in range(3) for e in (0, 1)]
    assert ids == [0, 1, 3, 4, 5, 6] and gate_block(2, 3) == 7
    sizes = {0: 3, 1: 3, 2: 5, 3: 2, 4: 2, 5: 2, 6: 2, 7: 3 * BUCKETS + 3}
    blocks = {key: torch.full((size,), float(key)) for key, size in sizes.items()}
    blocks[0] = torch.tensor([1.0, 2.0, 9.0])
    memory, changes = respond(
        memory_of(1, 2), {0: text(5)}, SETTINGS, siblings=3, round=4
    )
    spawn = SiblingChange(kind="spawn", sibling=2, parent=0, clients=(0,), reason="")
    after = apply_changes(blocks, memory, (spawn,), siblings=3, experts=2)
    assert after[5].tolist() == [1, 2] and after[6].tolist() == [1, 1]
    assert all(torch.equal(after[key], blocks[key]) for key in (0, 1, 2, 3, 4))
    assert torch.equal(after[7], gate_for_kinds(memory.kinds, 3))
    assert used_siblings(after[7], 3) == [0, 1, 2]
    gone = SiblingChange(kind="retire", sibling=2, parent=None, clients=(), reason="")
    kept = SiblingMemory(kinds={key: memory.kinds[key] for key in (0, 1)})
    after = apply_changes(after, kept, (gone,), siblings=3, experts=2)
    assert not after[5].any() and not after[6].any()
    assert used_siblings(after[7], 3) == [0, 1]
    reuse = SiblingChange(kind="reuse", sibling=1, parent=None, clients=(0,), reason="")
    same = apply_changes(blocks, memory, (reuse,), siblings=3, experts=2)
    assert all(torch.equal(same[key], blocks[key]) for key in blocks)
    assert "sibling 2 spawned from" in describe(changes[0])
    assert describe(gone) == "sibling 2 retired: "


def test_a_gate_for_kinds_is_the_gate_that_was_fitted() -> None:
    counts = torch.stack([text(1), text(2)])
    fitted, members = fit_sibling_gate(counts, 4, reserve=1)
    kinds = {g: counts[c] / counts[c].sum() for c, g in enumerate(members)}
    assert torch.allclose(gate_for_kinds(kinds, 4), fitted, atol=1e-5)
    assert gate_for_kinds({2: kinds[0]}, 4)[-4:].tolist() == [NEVER, NEVER, 0, NEVER]
    crowded, members = fit_sibling_gate(torch.stack([text(n) for n in range(4)]), 4)
    assert sorted(members) == [0, 1, 2, 3]
    _, members = fit_sibling_gate(
        torch.stack([text(n) for n in range(4)]), 4, reserve=2
    )
    assert set(members) == {0, 1}


def test_the_memory_survives_as_tensors_and_facts() -> None:
    memory, _ = observe(memory_of(1, 2), {0: 3.123456789, 1: 2.0}, {}, SETTINGS)
    memory, _ = respond(memory, {0: text(5)}, SETTINGS, siblings=3, round=4)
    tensors, facts = to_parts(memory)
    back = from_parts(tensors, json.loads(json.dumps(facts)))
    for name in ("counts", "kinds"):
        before, after = getattr(memory, name), getattr(back, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("members", "spawned", "idle", "watches"):
        assert getattr(back, name) == getattr(memory, name)
    assert from_parts(*to_parts(SiblingMemory())) == SiblingMemory()
    with pytest.raises(ValueError, match="counts_CN has 2 rows for 3"):
        from_parts(tensors, facts | {"clients": [0, 1, 2]})


def test_a_client_remembers_what_it_told(tmp_path: Path, drifting_shards: Path) -> None:
    folder = state_folder(tmp_path, 0)
    assert load_counts(folder) is None
    shard = load_client(drifting_shards, 0)
    told = unpack_counts(tell_counts(tmp_path, 0, shard))
    kept = load_counts(folder)
    assert kept is not None and distance(kept, told) < 0.01
    later = unpack_counts(tell_counts(tmp_path, 0, shard.at(3)))
    assert distance(kept, later) > 0.9
    (folder / "counts.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged.*remove the file"):
        load_counts(folder)


def test_what_nodes_say_of_their_text_is_not_believed_blindly() -> None:
    said = {1: 0.5, 2: 7.0, 3: float("nan"), 4: 1, 5: "far", 9: 0.2}
    reported = {node: {MOVED: value} for node, value in said.items()} | {6: {}}
    assert told_distances(reported, range(1, 7)) == {1: 0.5}


@pytest.fixture(scope="module")
def drifting_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one client, whose text changes in round 3."""
    later = LaterText(train=torch.arange(1000, 2000), heldout={})
    shard = ClientShard(
        index=0,
        train=torch.arange(1000),
        heldout={},
        category_counts={},
        description="",
        tokenizer_fingerprint="",
        later={3: later},
    )
    index = FederatedIndex(
        domains=(),
        split="domain",
        seed=0,
        category_counts=({},),
        train_tokens=(1000,),
        category_heterogeneity=0.0,
        token_heterogeneity=0.0,
        tokenizer_fingerprint="",
        corpus_sha256={},
    )
    folder = tmp_path_factory.mktemp("shards")
    text = FederatedText(clients=(shard,), calibration={}, index=index)
    save_federated_text(text, folder)
    return folder


DRIFTING = (
    "adapter.siblings=3",
    "assembler.width=0",
    "train.train_gate=false",
    "train.learning_rate=0.02",
    "edits.rho_max=0",
    "federation.rounds=5",
    "drift.detect=true",
    "drift.threshold=0.2",
)


def test_a_client_that_changes_its_text_gets_a_sibling_and_a_resumed_run_its_bits(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "strange.txt"
    letters = random.Random(0).choices("QXZJKVW 0123456789\n", k=200_000)
    strange.write_text("".join(letters))
    drift = f"data.drift=3:0=strange={strange}"
    settings = small_settings(tiny_llama_folder, *DRIFTING, drift)
    assert domain_names(settings) == {"python", "pydoc", "strange"}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_embedded(settings, whole, console=quiet())
    rows = read_metrics(whole)
    assert "strange" not in rows[0]["perplexity"]
    assert "strange" in rows[1]["perplexity"]
    spawns = [
        (number, change)
        for number in range(1, 6)
        for change in json.loads((whole / f"merge_round{number}.json").read_text())[
            "siblings"
        ]
        if change["kind"] == "spawn"
    ]
    assert len(spawns) == 1
    number, change = spawns[0]
    assert 2 <= number <= 4 and change["clients"] == [0] and change["sibling"] == 2
    members = json.loads((whole / "siblings.json").read_text())["clients"]
    assert members == {"0": 2, "1": 1}

    interrupt(settings, parted, in_round=4)
    run_embedded(settings, parted, resume=True, console=quiet())
    assert_same_bits(checkpoint_tensors(whole, 5), checkpoint_tensors(parted, 5))
    path = latest_checkpoint(RunFolder(root=parted).checkpoints)
    assert path is not None
    fingerprint = json.loads((path / "state.json").read_text())["model_fingerprint"]
    state, _ = load_checkpoint(path, model_fingerprint=fingerprint)
    assert state.siblings is not None and state.siblings.members == {0: 2, 1: 1}
