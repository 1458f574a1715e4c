"""Text that changes during a run: notice it, reuse a sibling for it, or make a new one.

Two tests raise an alarm. *Page-Hinkley* (Page 1954; Gama et al. 2014, "A survey on
concept drift adaptation", 3.3) watches every client's held-out loss, which it reports
anyway; its mean fades, for a loss in training falls. And a client compares the *mean
embedding* of its text with what it was, as ShiftEx does (arXiv 2506.18789), here with a
token's one-hot vector as its embedding and the Jensen-Shannon distance; it reports that
one number. An alarmed client is asked for the token counts of its text now, and the
server measures the distance itself: a loss that rose for another reason changes nothing.

Changed text is first compared with every kind that a sibling serves: one that is near
enough is *reused*. Otherwise a sibling that was held back is *spawned*: it shares the
base blocks as all siblings do, copies the adapter rows of the sibling whose text is
nearest, and the gate learns its kind of text; so the model's output on the new text
starts as its parent's. A spawned sibling whose clients are gone or silent for
``patience`` scorings is *retired*, and can be spawned again. Siblings are scarce, and a
client may lie: it causes one spawn in ``REST * patience`` scorings at most.

The server alone says what counts as told: a client compares its text with the counts of
the round in :attr:`SiblingMemory.told`, which is part of the checkpoint. Until a change
is answered, it therefore alarms again, also after a lost answer or a resume.

Everything here is a pure function of what the server knows.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from samv2.common.settings import DriftSettings
from samv2.data.allocation import heterogeneity

MEMORY = 3
"""Losses that the fading mean looks back on, about."""
REST = 4
"""Times ``drift.patience``: scorings in which a client causes one spawn at most."""
ChangeKind = Literal["spawn", "reuse", "none", "retire"]


@dataclass(frozen=True, kw_only=True)
class LossWatch:
    """Page-Hinkley's sums over one client's losses."""

    count: int = 0
    mean: float = 0.0
    """Fading mean of the losses, nats: a new one weighs 1 / ``MEMORY`` at least."""
    rise: float = 0.0
    """Sum of what losses were above the mean, less the tolerance."""
    lowest: float = 0.0
    """The least that ``rise`` was."""

    def after(self, loss: float, tolerance: float) -> LossWatch:
        """The sums with one more loss."""
        count = self.count + 1
        mean = self.mean + (loss - self.mean) / min(count, MEMORY)
        rise = self.rise + loss - mean - tolerance
        return LossWatch(
            count=count, mean=mean, rise=rise, lowest=min(self.lowest, rise)
        )

    @property
    def statistic(self) -> float:
        """What is compared with the threshold, nats."""
        return self.rise - self.lowest


@dataclass(frozen=True, kw_only=True)
class SiblingMemory:
    """What the server remembers of siblings and of their clients' text."""

    counts: dict[int, Tensor] = field(default_factory=dict)
    """{client: (N,) float32 token counts, as last settled}."""
    told: dict[int, int] = field(default_factory=dict)
    """{client: the round whose text ``counts`` are of}."""
    kinds: dict[int, Tensor] = field(default_factory=dict)
    """{sibling: (N,) float32 shares of tokens in the text it serves}; the used ones."""
    members: dict[int, int] = field(default_factory=dict)
    """{client: sibling}."""
    spawned: dict[int, int] = field(default_factory=dict)
    """{sibling: round after which it was made}, of those that were not there at first."""
    idle: dict[int, int] = field(default_factory=dict)
    """{spawned sibling: scorings in a row in which no client needed it}."""
    resting: dict[int, int] = field(default_factory=dict)
    """{client: scorings until it may cause a spawn again}; others may."""
    watches: dict[int, LossWatch] = field(default_factory=dict)
    """By client."""


@dataclass(frozen=True, kw_only=True)
class SiblingChange:
    """What was done about changed text; part of ``merge_round{N}.json``."""

    kind: ChangeKind
    """``none``: the text changed, but no sibling is near and none can be made."""
    sibling: int
    """The one that serves the clients from now on, or was given up."""
    parent: int | None
    """Whose rows a spawned one starts with."""
    clients: tuple[int, ...]
    reason: str
    """With the figures that decided, for a person."""


def begin(counts: Mapping[int, Tensor], members: Mapping[int, int]) -> SiblingMemory:
    """The memory when the gate has just been fitted.

    Args:
        counts: {client: (N,) token counts of its text in round 1}.
        members: {client: sibling}, as the fit found them.
    """
    kinds = {
        sibling: torch.stack(
            [_share(counts[c]) for c, own in sorted(members.items()) if own == sibling]
        ).mean(dim=0)
        for sibling in sorted(set(members.values()))
    }
    return SiblingMemory(
        counts=dict(counts),
        told=dict.fromkeys(counts, 1),
        kinds=kinds,
        members=dict(members),
    )


def observe(
    memory: SiblingMemory,
    losses: Mapping[int, float],
    moved: Mapping[int, float],
    settings: DriftSettings,
) -> tuple[SiblingMemory, tuple[int, ...]]:
    """Take note of what clients say of their text after a round.

    Args:
        memory: before.
        losses: {client: mean held-out loss, nats} of those that were scored.
        moved: {client: distance of its text from what it was} of those that said so.
        settings: tolerance, threshold and distance.

    Returns:
        The memory after, and the clients for whom a test alarmed, rising.
    """
    watches = dict(memory.watches)
    for client, loss in losses.items():
        watch = watches.get(client, LossWatch())
        watches[client] = watch.after(loss, settings.tolerance)
    rose = {c for c in losses if watches[c].statistic > settings.threshold}
    turned = {c for c, far in moved.items() if far > settings.distance}
    resting = {c: left - 1 for c, left in memory.resting.items() if left > 1}
    seen = replace(memory, watches=watches, resting=resting)
    return seen, tuple(sorted(rose | turned))


def respond(
    memory: SiblingMemory,
    counts: Mapping[int, Tensor],
    settings: DriftSettings,
    *,
    siblings: int,
    round: int,
) -> tuple[SiblingMemory, tuple[SiblingChange, ...]]:
    """Decide about the clients that alarmed and have told their text.

    Args:
        memory: before.
        counts: {client: (N,) token counts of its text in the round that comes next}.
        settings: distance, and whether siblings may be spawned.
        siblings: G, with those held back.
        round: rounds completed.

    Returns:
        The memory after, and what is to be done; at most one spawn. The counts of a
        client that has to wait for a spawn are not settled, so it is alarmed again.
    """
    changed: dict[int, str] = {}
    settled: set[int] = set()
    watches = dict(memory.watches)
    for client, now_N in sorted(counts.items()):
        before_N = memory.counts.get(client)
        moved = 1.0 if before_N is None else distance(before_N, now_N)
        if moved <= settings.distance:
            watches[client] = LossWatch()
            if client not in memory.told:  # a checkpoint of an earlier version
                settled.add(client)
            continue
        changed[client] = (
            f"client {client}: loss {watches[client].statistic:.2f} nats above its mean, "
            f"text {moved:.2f} from before"
            if client in watches
            else f"client {client}: text {moved:.2f} from before"
        )
    members, changes = dict(memory.members), []
    lost: list[int] = []
    for client in changed:
        near, apart = nearest_kind(memory, counts[client])
        if apart > settings.distance:
            lost.append(client)
            continue
        members[client] = near
        reason = f"{changed[client]}, {apart:.2f} from sibling {near}'s"
        changes.append(_change("reuse", near, None, [client], reason))
    memory = replace(memory, members=members)
    free = [item for item in range(siblings) if item not in memory.kinds]
    waiting: list[int] = []
    if lost and settings.spawn and free:
        group = _group(lost, memory, counts, settings)
        waiting = [c for c in lost if c not in group]
        if group:
            why = "; ".join(changed[client] for client in group)
            memory, change = _spawn(memory, free[0], group, counts, round, why)
            rest = dict.fromkeys(group, REST * settings.patience)
            memory = replace(memory, resting=memory.resting | rest)
            changes.append(change)
    else:
        limit = "spawning is off" if not settings.spawn else "no sibling is left"
        for client in lost:
            near, apart = nearest_kind(memory, counts[client])
            memory = replace(memory, members=memory.members | {client: near})
            reason = (
                f"{changed[client]}, {apart:.2f} from the nearest sibling's; {limit}"
            )
            changes.append(_change("none", near, None, [client], reason))
    settled |= set(changed) - set(waiting)
    answered = replace(
        memory,
        counts=memory.counts | {client: counts[client] for client in settled},
        told=memory.told | dict.fromkeys(settled, round + 1),
        watches=watches | dict.fromkeys(settled, LossWatch()),
    )
    return answered, tuple(changes)


def retire(
    memory: SiblingMemory, heard: Container[int], settings: DriftSettings
) -> tuple[SiblingMemory, tuple[SiblingChange, ...]]:
    """Count the scorings in which spawned siblings had no client; give up idle ones.

    Args:
        memory: before.
        heard: clients that have answered in this scoring; others need no sibling.
        settings: patience.

    Returns:
        The memory after, and what was given up. Its clients are forgotten: the server
        has no counts of theirs, and asks when they are back.
    """
    needed = {own for client, own in memory.members.items() if client in heard}
    idle = {
        sibling: 0 if sibling in needed else memory.idle.get(sibling, 0) + 1
        for sibling in memory.spawned
    }
    gone = [sibling for sibling, rounds in idle.items() if rounds >= settings.patience]
    changes = tuple(
        _change("retire", item, None, [], f"no client for {idle[item]} rounds")
        for item in gone
    )
    left = {client for client, own in memory.members.items() if own in gone}
    kept = replace(
        memory,
        counts={key: value for key, value in memory.counts.items() if key not in left},
        told={key: value for key, value in memory.told.items() if key not in left},
        members={
            key: value for key, value in memory.members.items() if key not in left
        },
        kinds={key: value for key, value in memory.kinds.items() if key not in gone},
        spawned={
            key: value for key, value in memory.spawned.items() if key not in gone
        },
        idle={key: value for key, value in idle.items() if key not in gone},
    )
    return kept, changes


def describe(change: SiblingChange) -> str:
    """A change for a person, in one line."""
    whom = (
        f" for clients {', '.join(map(str, change.clients))}" if change.clients else ""
    )
    what = {
        "spawn": f"sibling {change.sibling} spawned from {change.parent}{whom}",
        "reuse": f"sibling {change.sibling} reused{whom}",
        "none": f"sibling {change.sibling} stays the nearest{whom}",
        "retire": f"sibling {change.sibling} retired",
    }[change.kind]
    return f"{what}: {change.reason}"


def distance(first_N: Tensor, second_N: Tensor) -> float:
    """Jensen-Shannon distance of two texts' token counts: 0 alike .. 1 disjoint."""
    return heterogeneity(torch.stack([first_N, second_N]).numpy())


def nearest_kind(memory: SiblingMemory, counts_N: Tensor) -> tuple[int, float]:
    """The used sibling whose text is nearest, and how far it is; ties: the lower."""
    far = {key: distance(counts_N, kind_N) for key, kind_N in memory.kinds.items()}
    near = min(far, key=lambda key: (far[key], key))
    return near, far[near]


def _group(
    lost: list[int],
    memory: SiblingMemory,
    counts: Mapping[int, Tensor],
    settings: DriftSettings,
) -> list[int]:
    """Whom the next spawn is for: the first that may cause one, and clients like it."""
    makers = [client for client in lost if client not in memory.resting]
    if not makers:
        return []
    first = counts[makers[0]]
    return [c for c in lost if distance(first, counts[c]) <= settings.distance]


def _spawn(
    memory: SiblingMemory,
    sibling: int,
    clients: list[int],
    counts: Mapping[int, Tensor],
    round: int,
    why: str,
) -> tuple[SiblingMemory, SiblingChange]:
    kind_N = torch.stack([_share(counts[client]) for client in clients]).mean(dim=0)
    parent, apart = nearest_kind(memory, kind_N)
    made = replace(
        memory,
        kinds=memory.kinds | {sibling: kind_N},
        members=memory.members | dict.fromkeys(clients, sibling),
        spawned=memory.spawned | {sibling: round},
        idle=memory.idle | {sibling: 0},
    )
    reason = f"{why}, {apart:.2f} from the nearest sibling's ({parent})"
    return made, _change("spawn", sibling, parent, clients, reason)


def _change(
    kind: ChangeKind,
    sibling: int,
    parent: int | None,
    clients: list[int],
    reason: str,
) -> SiblingChange:
    return SiblingChange(
        kind=kind, sibling=sibling, parent=parent, clients=tuple(clients), reason=reason
    )


def _share(counts_N: Tensor) -> Tensor:
    return counts_N.float() / counts_N.sum()
