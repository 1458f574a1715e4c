"""Asking clients how often tokens occur in their text."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping

from flwr.app import MessageType
from flwr.serverapp import Grid
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.federated.enrolment import ANSWER_SECONDS
from samv2.federated.grid import counts_from_record, counts_request, message_to
from samv2.federated.siblings import unpack_counts

log = logging.getLogger(__name__)


def ask_counts(
    grid: Grid, clients: Mapping[int, int], wanted: Container[int], round: int
) -> tuple[dict[int, Tensor], dict[int, bytes]]:
    """Token counts of clients' text; the first usable answer of each counts.

    Args:
        grid: to ask on.
        clients: {node id: client}.
        wanted: clients to ask.
        round: whose text is meant.

    Returns:
        {client: (N,) counts}, and the frames that they came in.
    """
    messages = [
        message_to(grid, node, counts_request(round), MessageType.QUERY, "siblings")
        for node, client in clients.items()
        if client in wanted
    ]
    frames: dict[int, bytes] = {}
    counts: dict[int, Tensor] = {}
    for reply in grid.send_and_receive(messages, timeout=ANSWER_SECONDS):
        client = clients.get(reply.metadata.src_node_id)
        if client is None or client not in wanted or client in counts:
            continue
        try:
            frame = counts_from_record(reply.content if reply.has_content() else {})
            counts[client] = unpack_counts(frame)
        except FrameError as error:
            log.warning("client %d: token counts refused: %s", client, error)
            continue
        frames[client] = frame
    return counts, frames
