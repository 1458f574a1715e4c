"""Questions to nodes beside their work: who they are, what their text is like."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from samv2.federated.exchange import Exchange, first_line
from samv2.federated.grid import FLOPS_BUDGET, MEMORY_BUDGET, message_to
from samv2.federated.subgraph import ClientBudget, believed_budget

ANSWER_SECONDS = 600.0
"""For an answer to a question; the first one waits until a client's process is up, and
many start on few cores. A node that is gone does not take that long: its SuperLink says so.
"""

NODE_UNAVAILABLE = 5
"""Flower's error code for a node whose heartbeats have stopped."""


def answer_seconds(round_timeout: float) -> float:
    """How long an answer is waited for in mid-run: not longer than a round's replies."""
    return min(ANSWER_SECONDS, round_timeout)


def ask(
    grid: Grid, questions: Mapping[int, RecordDict], about: str, *, timeout: float
) -> Iterator[tuple[int, Message]]:
    """Ask nodes, and yield answers as they come: the first of each node that was asked.

    An answer counts as that of the node that was asked, whatever it says itself, and one
    that cannot be read is an error of that node.

    Args:
        grid: to ask on.
        questions: by node.
        about: what they are about; Flower's group of the messages.
        timeout: seconds to wait for answers.
    """
    messages = [
        message_to(grid, node, content, MessageType.QUERY, about)
        for node, content in questions.items()
    ]
    answered: set[int] = set()
    for reply in Exchange().stream(grid, messages, timeout=timeout):
        node = reply.metadata.src_node_id
        if node in questions and node not in answered:
            answered.add(node)
            yield node, reply


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a node says of itself."""

    node: int
    client: int
    budget: ClientBudget


@dataclass(frozen=True, kw_only=True)
class Who:
    """What came of asking nodes which client they are."""

    claims: list[Claim]
    """By node."""
    failures: list[str]
    """Why others say nothing."""
    away: bool
    """Whether some of them were only not there, and may be soon."""


def ask_who(grid: Grid, nodes: Iterable[int], *, timeout: float) -> Who:
    """Ask nodes which client they are, and what they can hold.

    Args:
        grid: to ask on.
        nodes: to ask.
        timeout: seconds to wait for answers.
    """
    claims: list[Claim] = []
    failures: list[str] = []
    away = False
    questions = {node: RecordDict() for node in nodes}
    for node, reply in ask(grid, questions, "enrol", timeout=timeout):
        claim = _claim_of(node, reply)
        if claim is None:
            failures.append(first_line(reply))
            away |= reply.has_error() and reply.error.code == NODE_UNAVAILABLE
        else:
            claims.append(claim)
    claims.sort(key=lambda claim: claim.node)
    return Who(claims=claims, failures=failures, away=away)


def _claim_of(node: int, reply: Message) -> Claim | None:
    """What an answer claims; None where it names no client."""
    if reply.has_error() or "metrics" not in reply.content:
        return None
    metrics = reply.content["metrics"]
    client = metrics.get("client")
    if type(client) is not int:
        return None
    budget = believed_budget(metrics.get(MEMORY_BUDGET), metrics.get(FLOPS_BUDGET))
    return Claim(node=node, client=client, budget=budget)
