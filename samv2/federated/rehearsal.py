"""Faults on purpose: which client fails or turns hostile in a round, and how.

Everything depends on seed, round, client and attempt alone, so that a rehearsal repeats,
also after a resume. The faults themselves are in ``rehearsal_mod``.
"""

from __future__ import annotations

import numpy as np

from samv2.common.settings import Settings
from samv2.common.settings_checks import ATTACKS

ATTEMPT = "attempt"
"""Record of a request that is sent again: ``number``, from 1."""
FAULTS = ("raise", "error", "die", "silence")
POISON = ("sign_flip", "scale", "huge_examples", "foreign_keys")
"""Attacks that are well formed: nothing tells them from an honest reply but its effect,
so they are not refused. All others are."""
_FAIL, _WHO, _FIRST = 1, 2, 3


def fault_of(settings: Settings, round: int, client: int, attempt: int) -> str | None:
    """How a client fails a training request; None where it does not."""
    draws = np.random.default_rng([settings.seed, _FAIL, round, client, attempt])
    if draws.random() >= settings.rehearsal.fail:
        return None
    return FAULTS[int(draws.integers(len(FAULTS)))]


def hostile_clients(settings: Settings) -> tuple[int, ...]:
    """The clients that are hostile all through a run; at least one where any shall be."""
    clients, share = settings.federation.clients, settings.rehearsal.hostile
    if share == 0:
        return ()
    draws = np.random.default_rng([settings.seed, _WHO])
    count = max(1, round(share * clients))
    return tuple(sorted(map(int, draws.choice(clients, size=count, replace=False))))


def attack_of(settings: Settings, round: int, client: int) -> str | None:
    """What a client sends in a round; None for an honest one.

    A hostile client goes through all attacks in turn, from one of its own.
    """
    if client not in hostile_clients(settings):
        return None
    attacks = settings.rehearsal.attacks or ATTACKS
    draws = np.random.default_rng([settings.seed, _FIRST, client])
    return attacks[(int(draws.integers(len(attacks))) + round) % len(attacks)]


def warning(settings: Settings) -> str | None:
    """What a log must say while a rehearsal is on; None where it is off."""
    rehearsal = settings.rehearsal
    if not rehearsal.fail and not rehearsal.hostile:
        return None
    parts = []
    if rehearsal.fail:
        parts.append(f"{rehearsal.fail:.0%} of training requests fail")
    if hostile := hostile_clients(settings):
        parts.append(f"clients {', '.join(map(str, hostile))} send hostile replies")
    return (
        f"REHEARSAL: {' and '.join(parts)}, on purpose (rehearsal.*). "
        "The model that comes of it is not for use"
    )
