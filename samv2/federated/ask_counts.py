"""Asking clients how often tokens occur in their text."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping

from flwr.serverapp import Grid
from torch import Tensor

from samv2.common.errors import FrameError
from samv2.federated.grid import counts_from_record, counts_request
from samv2.federated.questions import ANSWER_SECONDS, ask
from samv2.federated.refusals import refusal
from samv2.federated.siblings import unpack_counts

log = logging.getLogger(__name__)


def ask_counts(
    grid: Grid,
    clients: Mapping[int, int],
    wanted: Container[int],
    round: int,
    *,
    timeout: float = ANSWER_SECONDS,
) -> tuple[dict[int, Tensor], dict[int, bytes]]:
    """Token counts of clients' text; the first answer of each counts.

    Args:
        grid: to ask on.
        clients: {node id: client}.
        wanted: clients to ask.
        round: whose text is meant.
        timeout: seconds to wait for answers.

    Returns:
        {client: (N,) counts}, and the frames that they came in.
    """
    questions = {
        node: counts_request(round)
        for node, client in clients.items()
        if client in wanted
    }
    frames: dict[int, bytes] = {}
    counts: dict[int, Tensor] = {}
    for node, reply in ask(grid, questions, "siblings", timeout=timeout):
        client = clients[node]
        try:
            frame = counts_from_record(reply.content if reply.has_content() else {})
            counts[client] = unpack_counts(frame)
        except FrameError as error:
            detail = refusal(client, error.reason, str(error)).detail
            log.warning("client %d: token counts refused: %s", client, detail)
            continue
        frames[client] = frame
    return counts, frames
