"""Held-out scores as clients report them: what is believed, and its sum."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from samv2.common.settings import Settings
from samv2.federated.validate import LARGEST_LOSS
from samv2.models.perplexity import Score


def is_scored(settings: Settings, round: int) -> bool:
    """Whether held-out text is scored after a round."""
    federation = settings.federation
    return round % federation.eval_every == 0 or round == federation.rounds


def sum_scores(
    reported: Mapping[int, Mapping[str, Any]],
    *,
    nodes: Container[int],
    domains: Container[str],
    most_tokens: int,
) -> dict[str, Score]:
    """Scores by domain, summed in node order so that the bits repeat.

    Args:
        reported: {node: untrusted numbers}, ``nll.DOMAIN`` and ``tokens.DOMAIN``.
        nodes: nodes that were asked.
        domains: names that may be scored.
        most_tokens: tokens of a domain that one client can have scored.
    """
    scores: dict[str, Score] = {}
    for node, metrics in sorted(reported.items()):
        for key in sorted(metrics) if node in nodes else ():
            prefix, _, domain = key.partition(".")
            nll, tokens = metrics[key], metrics.get(f"tokens.{domain}")
            if (
                prefix == "nll"
                and domain in domains
                and _plausible(nll, tokens, most_tokens)
            ):
                found = Score(nll=float(nll), tokens=tokens)
                scores[domain] = scores.get(domain, Score(nll=0.0, tokens=0)) + found
    return dict(sorted(scores.items()))


def _plausible(nll: object, tokens: object, most_tokens: int) -> bool:
    return (
        type(tokens) is int
        and 0 < tokens <= most_tokens
        and type(nll) is float
        and 0 <= nll <= LARGEST_LOSS * tokens
    )
