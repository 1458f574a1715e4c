"""Held-out scores as clients report them: what is believed, and its sum."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from samv2.common.settings import Settings
from samv2.data.drift import parse_drifts
from samv2.data.sources import parse_domain
from samv2.federated.validate import LARGEST_LOSS
from samv2.models.perplexity import Score

MOVED = "text-distance"
"""Key under which a client says how far its text is from what it was."""


def is_scored(settings: Settings, round: int) -> bool:
    """Whether held-out text is scored after a round."""
    federation = settings.federation
    return round % federation.eval_every == 0 or round == federation.rounds


def sum_scores(believed: Mapping[int, Mapping[str, Score]]) -> dict[str, Score]:
    """Scores by domain, summed in the clients' order so that the bits repeat.

    Args:
        believed: {client: its scores by domain}, as :func:`believed_scores` has them.
    """
    scores: dict[str, Score] = {}
    for _, own in sorted(believed.items()):
        for domain, found in own.items():
            scores[domain] = scores.get(domain, Score(nll=0.0, tokens=0)) + found
    return dict(sorted(scores.items()))


def believed_scores(
    reported: Mapping[int, Mapping[str, Any]],
    *,
    clients: Mapping[int, int],
    domains: Container[str],
    most_tokens: int,
) -> dict[int, dict[str, Score]]:
    """What each client has scored, by domain; what cannot be believed is left out.

    Args:
        reported: {node: untrusted numbers}, ``nll.DOMAIN`` and ``tokens.DOMAIN``.
        clients: {node: client} of the nodes that were asked.
        domains: names that may be scored.
        most_tokens: tokens of a domain that one client can have scored.

    Returns:
        {client: its scores by domain}.
    """
    scores: dict[int, dict[str, Score]] = {}
    for node, metrics in reported.items():
        for key in sorted(metrics) if node in clients else ():
            prefix, _, domain = key.partition(".")
            nll, tokens = metrics[key], metrics.get(f"tokens.{domain}")
            if (
                prefix == "nll"
                and domain in domains
                and _plausible(nll, tokens, most_tokens)
            ):
                found = Score(nll=float(nll), tokens=tokens)
                scores.setdefault(clients[node], {})[domain] = found
    return scores


def mean_loss(scores: Mapping[str, Score]) -> float:
    """Nats a token over all domains; 0 where nothing was scored."""
    total = sum(scores.values(), start=Score(nll=0.0, tokens=0))
    return total.nll / max(total.tokens, 1)


def told_distances(
    reported: Mapping[int, Mapping[str, Any]], nodes: Container[int]
) -> dict[int, float]:
    """How far nodes say their text is from what it was; nonsense is left out."""
    said = {n: metrics.get(MOVED) for n, metrics in reported.items() if n in nodes}
    return {n: far for n, far in said.items() if type(far) is float and 0 <= far <= 1}


def domain_names(settings: Settings) -> set[str]:
    """Names of all domains that clients hold at some time."""
    drifts = parse_drifts(settings.data.drift, settings.federation.clients)
    at_first = {parse_domain(spec)[0] for spec in settings.data.domains}
    return at_first | {drift.name for drift in drifts}


def _plausible(nll: object, tokens: object, most_tokens: int) -> bool:
    return (
        type(tokens) is int
        and 0 < tokens <= most_tokens
        and type(nll) is float
        and 0 <= nll <= LARGEST_LOSS * tokens
    )
