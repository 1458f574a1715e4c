"""Questions to nodes beside their work: who they are, what their text is like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from samv2.federated.exchange import Exchange
from samv2.federated.grid import message_to

ANSWER_SECONDS = 600.0
"""For an answer to a question; the first one waits until a client's process is up, and
many start on few cores. A node that is gone does not take that long: its SuperLink says so.
"""


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
