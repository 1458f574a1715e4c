"""What is said of replies that do not count, and when a client is asked no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from samv2.common.errors import FederationError
from samv2.federated.server_merge import Refusal

LONGEST_DETAIL = 2000
"""Characters of a client's error that are kept."""
BLAMELESS = frozenset({"client_error", "no_reply", "late", "duplicate", "unasked"})
"""Reasons that an honest client may have too; all others are of a hostile kind."""


class TooFewReplies(FederationError):
    """A round had fewer valid replies than it needs."""

    def __init__(
        self, server_round: int, valid: int, needed: int, refusals: Sequence[Refusal]
    ) -> None:
        causes = "; ".join(
            f"client {item.client}: {item.detail.splitlines()[0]} [{item.reason}]"
            for item in sorted(refusals, key=lambda item: item.client)
        )
        super().__init__(
            f"round {server_round} had {valid} valid replies, needed are {needed} "
            f"(federation.min_replies), also when it was tried again. {causes}. "
            "Everything up to the round before is in the checkpoint: mend the clients "
            "and continue with --resume"
        )


def refusal(client: int, reason: str, detail: str) -> Refusal:
    """A refusal whose text cannot flood a log or steer a terminal."""
    shown = detail[:LONGEST_DETAIL].strip() or "no detail"
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in shown)
    return Refusal(client=client, reason=reason, detail=clean)


def count_hostile(
    counts: dict[int, int], refusals: Iterable[Refusal]
) -> dict[int, int]:
    """{client: refused replies of a hostile kind}, with a round's added."""
    found = dict(counts)
    for item in refusals:
        if item.reason not in BLAMELESS:
            found[item.client] = found.get(item.client, 0) + 1
    return found


def quarantined(counts: dict[int, int], limit: int) -> set[int]:
    """Clients that are asked no more: ``limit`` hostile replies or more; 0: none."""
    return {client for client, count in counts.items() if 0 < limit <= count}
