"""What is known of every client of a round: ``clients.jsonl``, a line of it a round."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from samv2.federated.server_merge import MergeReport, Refusal, ValidReply
from samv2.updates.packing import Manifest, squared_norm

CLIENTS = "clients.jsonl"
LONGEST_DETAIL = 200
"""Characters of a refusal's detail that are kept here; ``merge_round{N}.json`` has it."""
UNKNOWN = -1
"""Client of a reply that nobody was asked for."""


def client_rows(
    report: MergeReport,
    manifest: Manifest,
    *,
    asked: Mapping[int, int],
    waited: Mapping[int, float],
) -> list[dict[str, Any]]:
    """A JSON object for every client that was asked, replied or was refused.

    Args:
        report: of the round's merge.
        manifest: of the blocks, to read updates.
        asked: {client: payload bytes sent to it}.
        waited: {client: seconds from asking to its reply}, where known.

    Returns:
        By client: ``client`` (-1 where nobody was asked), ``replied``, ``bytes_up``,
        ``bytes_down``, ``seconds`` (as the client says), ``waited`` (as the server saw),
        ``train_loss``, ``tokens``, ``update_norm`` (L2), ``refused`` (a list of
        ``reason`` and ``detail``). What is not known is null.
    """
    replies = {reply.contribution.client: reply for reply in report.replies}
    refused: dict[int, list[Refusal]] = {}
    for item in report.refusals:
        refused.setdefault(item.client, []).append(item)
    return [
        {
            "client": client,
            "replied": client in replies,
            "bytes_down": asked.get(client),
            "waited": waited.get(client),
            **_told(replies.get(client), manifest, report.round),
            "refused": [
                {"reason": item.reason, "detail": one_line(item.detail)}
                for item in refused.get(client, [])
            ],
        }
        for client in sorted(asked.keys() | replies.keys() | refused.keys())
    ]


def _told(reply: ValidReply | None, manifest: Manifest, round: int) -> dict[str, Any]:
    names = ("bytes_up", "seconds", "train_loss", "tokens")
    found: dict[str, Any] = {name: getattr(reply, name, None) for name in names}
    found["update_norm"] = None
    if reply is not None:
        frame = reply.contribution.read()
        found["update_norm"] = math.sqrt(squared_norm(frame, manifest, round=round))
    return found


def one_line(text: str) -> str:
    """A client's words in one line of printable characters, not too many."""
    words = " ".join(text.split())[:LONGEST_DETAIL]
    return "".join(c if c.isprintable() else "?" for c in words)


def refused_by_reason(refusals: Iterable[Refusal]) -> dict[str, int]:
    """How many replies were refused, by reason."""
    return dict(sorted(Counter(item.reason for item in refusals).items()))


def refusal_totals(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{client: {reason: refusals}} of all rounds.

    Args:
        rows: of ``clients.jsonl``.
    """
    counts: dict[int, Counter[str]] = {}
    for row in rows:
        for client in row["clients"]:
            for item in client["refused"]:
                found = counts.setdefault(client["client"], Counter())
                found[item["reason"]] += 1
    return {str(key): dict(sorted(counts[key].items())) for key in sorted(counts)}


def tell_replies(
    tell: Callable[..., None],
    round: int,
    valid: Sequence[ValidReply],
    refusals: Sequence[Refusal],
) -> None:
    """Events ``replies``, and ``refused`` for each that was.

    Args:
        tell: as :meth:`samv2.common.event_log.EventLog.event`.
        round: that they are of.
        valid: replies that count.
        refusals: and those that do not.
    """
    tell("replies", round=round, clients=sorted(r.contribution.client for r in valid))
    for item in refusals:
        tell(
            "refused",
            level=logging.WARNING,
            round=round,
            client=item.client,
            reason=item.reason,
            detail=item.detail,
        )
