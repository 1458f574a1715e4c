"""Drift: the two tests, and what is done about it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from samv2.common.settings import DriftSettings
from samv2.experts.sibling_gate import (
    BUCKETS,
    NEVER,
    fit_sibling_gate,
    gate_for_kinds,
)
from samv2.federated.drift import (
    REST,
    LossWatch,
    SiblingMemory,
    begin,
    distance,
    nearest_kind,
    observe,
    respond,
    retire,
)
from samv2.federated.drift_state import from_parts, to_parts
from samv2.federated.scores import MOVED, told_distances

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


def scored(
    memory: SiblingMemory,
    texts: Mapping[int, int],
    *,
    siblings: int,
    round: int,
    answer: bool = True,
) -> tuple[SiblingMemory, list[tuple[str, int, tuple[int, ...]]], tuple[int, ...]]:
    """One scoring, in which clients speak of their text alone and all losses are level.

    Args:
        memory: before.
        texts: {client: kind of its text now} of those that answer.
        siblings: G.
        round: rounds completed.
        answer: whether what alarmed clients tell reaches the server.

    Returns:
        The memory after, what was done, and who alarmed.
    """
    moved = {
        c: distance(memory.counts[c], text(kind)) if c in memory.told else 1.0
        for c, kind in texts.items()
    }
    memory, alarmed = observe(memory, dict.fromkeys(texts, 4.0), moved, SETTINGS)
    memory, changes = retire(memory, texts, SETTINGS)
    counts = {client: text(texts[client]) for client in alarmed if answer}
    memory, found = respond(memory, counts, SETTINGS, siblings=siblings, round=round)
    done = [(item.kind, item.sibling, item.clients) for item in changes + found]
    return memory, done, alarmed


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
    assert after.told == {0: 5, 1: 1, 2: 5}
    again, changes = respond(after, {1: text(6)}, SETTINGS, siblings=5, round=5)
    assert [(c.kind, c.sibling) for c in changes] == [("spawn", 4)]
    none, changes = respond(again, {2: text(7)}, SETTINGS, siblings=5, round=6)
    assert changes[0].kind == "none" and "no sibling is left" in changes[0].reason
    assert none.told[2] == 7, "nothing can be done, so it is not asked for ever"
    assert none.kinds.keys() == again.kinds.keys()
    off = DriftSettings(detect=True, spawn=False)
    _, changes = respond(memory, counts, off, siblings=5, round=4)
    assert {c.kind for c in changes} == {"none"}
    assert all("spawning is off" in c.reason for c in changes)


def test_a_client_that_waits_for_its_sibling_alarms_until_it_is_served() -> None:
    memory = memory_of(1, 2)
    texts = {0: 5, 1: 6}
    memory, done, alarmed = scored(memory, texts, siblings=4, round=3)
    assert alarmed == (0, 1) and done == [("spawn", 2, (0,))]
    memory, done, alarmed = scored(memory, texts, siblings=4, round=4)
    assert alarmed == (1,) and done == [("spawn", 3, (1,))]
    memory, done, alarmed = scored(memory, texts, siblings=4, round=5)
    assert alarmed == () and memory.members == {0: 2, 1: 3}


def test_a_lost_answer_settles_nothing() -> None:
    memory, done, _ = scored(
        memory_of(1, 2), {0: 5, 1: 2}, siblings=3, round=3, answer=False
    )
    assert done == [] and memory.told == {0: 1, 1: 1}
    memory, done, alarmed = scored(memory, {0: 5, 1: 2}, siblings=3, round=4)
    assert alarmed == (0,) and done == [("spawn", 2, (0,))]
    assert memory.told == {0: 5, 1: 1}


def test_a_client_that_was_never_told_of_is_asked() -> None:
    """Its first answer was lost, or the checkpoint is of an earlier version."""
    memory = begin({0: text(1)}, {0: 0})
    memory, done, alarmed = scored(memory, {0: 1, 1: 1}, siblings=2, round=1)
    assert alarmed == (1,) and done == [("reuse", 0, (1,))]
    assert memory.told == {0: 1, 1: 2} and memory.members == {0: 0, 1: 0}
    tensors, facts = to_parts(memory)
    old = from_parts(tensors, {k: facts[k] for k in facts if k != "told"})
    old, done, alarmed = scored(old, {0: 1, 1: 1}, siblings=2, round=4)
    assert alarmed == (0, 1) and done == [] and old.told == {0: 5, 1: 5}


def test_one_client_cannot_keep_all_siblings() -> None:
    """Client 1 claims new text after every round; client 0 changes once, in round 6."""
    memory, spawns = memory_of(1, 2), []
    window, held = REST * SETTINGS.patience, []
    for round in range(1, 2 * window + 1):
        texts = {0: 1 if round < 6 else 60, 1: 9 + round}
        memory, done, _ = scored(memory, texts, siblings=5, round=round)
        spawns += [(round, who) for kind, _, who in done if kind == "spawn"]
        held.append(len(memory.kinds) - 2 - (round >= 6))
    assert spawns == [(1, (1,)), (6, (0,)), (1 + window, (1,))]
    assert memory.members[0] in memory.spawned, "it keeps its own"
    assert max(held) == 2 and held.count(2) == SETTINGS.patience


def test_a_client_that_rests_may_share_the_sibling_of_another() -> None:
    memory, _, _ = scored(memory_of(1, 2), {0: 5, 1: 2}, siblings=5, round=1)
    memory, done, alarmed = scored(memory, {0: 6, 1: 2}, siblings=5, round=2)
    assert alarmed == (0,) and done == [] and memory.told[0] == 2
    memory, done, _ = scored(memory, {0: 6, 1: 6}, siblings=5, round=3)
    assert done == [("spawn", 3, (0, 1))]


def test_a_spawned_sibling_that_nobody_needs_is_retired() -> None:
    memory, _ = respond(memory_of(1, 2), {0: text(5)}, SETTINGS, siblings=3, round=4)
    both = (0, 1)
    memory, changes = retire(memory, both, SETTINGS)
    assert changes == () and memory.idle == {2: 0}
    memory, _ = respond(memory, {0: text(2)}, SETTINGS, siblings=3, round=5)
    memory, changes = retire(memory, both, SETTINGS)
    assert changes == () and memory.idle == {2: 1}
    memory, changes = retire(memory, both, SETTINGS)
    assert [(c.kind, c.sibling) for c in changes] == [("retire", 2)]
    assert memory.kinds.keys() == {0, 1} and memory.spawned == memory.idle == {}
    assert memory.members == {0: 1, 1: 1} and memory.told.keys() == {0, 1}
    _, changes = respond(memory, {1: text(6)}, SETTINGS, siblings=3, round=9)
    assert changes[0].kind == "spawn" and changes[0].sibling == 2


def test_a_sibling_whose_client_is_silent_is_retired_and_the_client_asked_later() -> (
    None
):
    memory, _, _ = scored(memory_of(1, 2), {0: 1, 1: 5}, siblings=3, round=1)
    assert memory.members[1] == 2
    memory, done, _ = scored(memory, {0: 1}, siblings=3, round=2)
    assert done == []
    memory, done, _ = scored(memory, {0: 1, 1: 5}, siblings=3, round=3)
    assert done == [] and memory.idle == {2: 0}, "it has spoken in time"
    for round in (4, 5):
        memory, done, _ = scored(memory, {0: 1}, siblings=3, round=round)
    assert done == [("retire", 2, ())]
    assert memory.members == {0: 0} and memory.counts.keys() == {0}
    memory, done, alarmed = scored(memory, {0: 1, 1: 2}, siblings=3, round=6)
    assert alarmed == (1,) and done == [("reuse", 1, (1,))]


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
    for name in ("told", "members", "spawned", "idle", "resting", "watches"):
        assert getattr(back, name) == getattr(memory, name)
    assert from_parts(*to_parts(SiblingMemory())) == SiblingMemory()
    with pytest.raises(ValueError, match="counts_CN has 2 rows for 3"):
        from_parts(tensors, facts | {"clients": [0, 1, 2]})


def test_what_nodes_say_of_their_text_is_not_believed_blindly() -> None:
    said = {1: 0.5, 2: 7.0, 3: float("nan"), 4: 1, 5: "far", 9: 0.2}
    reported = {node: {MOVED: value} for node, value in said.items()} | {6: {}}
    assert told_distances(reported, range(1, 7)) == {1: 0.5}
