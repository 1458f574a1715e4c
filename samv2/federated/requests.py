"""What the server sends to clients: parameters, their part of the graph, and edits.

A client that is at most one version of the graph behind gets the edits, any other the
full graph. Clients that hold the same part of the model get the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from samv2.common.json_keys import number_keys, text_keys
from samv2.common.settings import Settings
from samv2.experts.sub_graph import SubGraph
from samv2.federated.client_round import RoundRequest
from samv2.federated.graph_message import GraphMessage, edits_to_json, pack_graph
from samv2.federated.grid import message_to, request_to_record
from samv2.federated.parts import Parts
from samv2.federated.rehearsal import ATTEMPT
from samv2.federated.server_merge import ServerState, broadcast_frame
from samv2.updates.packing import Manifest


class Requests:
    """Makes requests, and remembers which version of the graph each node has.

    Args:
        settings: of the run.
        manifest: of the model's trainable blocks.
    """

    def __init__(self, settings: Settings, manifest: Manifest) -> None:
        self._settings = settings
        self._manifest = manifest
        self._versions: dict[int, int] = {}
        self._recalled: dict[int, int] = {}

    def memory(self, clients: Mapping[int, int]) -> dict[str, int]:
        """Versions that clients hold, by client, for a checkpoint.

        Args:
            clients: {node id: client}.
        """
        return text_keys(
            {
                client: self._versions[node]
                for node, client in clients.items()
                if node in self._versions
            }
        )

    def recall(self, versions: Mapping[str, int]) -> None:
        """Take up what an earlier start's :meth:`memory` was."""
        self._recalled = number_keys(versions)

    def meet(self, clients: Mapping[int, int]) -> None:
        """Clients have enrolled: go by what is recalled of them."""
        self._versions = {
            node: self._recalled[client]
            for node, client in clients.items()
            if client in self._recalled
        }

    def note(self, nodes: Iterable[int], version: int | None) -> None:
        """Nodes are known to have a version of the graph; None: it is not known."""
        for node in nodes:
            self._versions.pop(node, None)
            if version is not None:
                self._versions[node] = version

    def training(
        self, state: ServerState, parts: Parts, nodes: Mapping[int, int], round: int
    ) -> dict[int, RoundRequest]:
        """To train, by node.

        Args:
            state: of the server.
            parts: who holds what.
            nodes: {node id: client} of those that are asked.
            round: from 1.
        """
        frames: dict[SubGraph | None, bytes] = {}
        return {
            node: RoundRequest(
                round=round,
                graph=self._graph_for(node, state),
                parameters=self._parameters(client, state, parts, frames),
                part=parts.part(client),
                temperature=self._temperature(round),
            )
            for node, client in nodes.items()
        }

    def scoring(
        self, state: ServerState, parts: Parts, clients: Mapping[int, int]
    ) -> dict[int, RoundRequest]:
        """To score held-out text, by node; arguments as of :meth:`training`."""
        frames: dict[SubGraph | None, bytes] = {}
        watch = state.siblings
        return {
            node: RoundRequest(
                round=state.round + 1,
                graph=full_graph(state),
                parameters=self._parameters(client, state, parts, frames),
                part=parts.part(client),
                told=None if watch is None else watch.told.get(client, 0),
            )
            for node, client in clients.items()
        }

    def repeated(
        self, request: RoundRequest, node: int, state: ServerState
    ) -> RoundRequest:
        """A request once more, with the full graph: not knowing it may be the fault."""
        self.note([node], None)
        return replace(request, graph=full_graph(state))

    def _graph_for(self, node: int, state: ServerState) -> GraphMessage:
        version, known = state.graph.version, self._versions.get(node)
        if known is None or known < version - 1:
            return full_graph(state)
        edits = state.last_edits if known == version - 1 else ()
        return GraphMessage(version=version, full=None, edits=edits)

    def _parameters(
        self,
        client: int,
        state: ServerState,
        parts: Parts,
        frames: dict[SubGraph | None, bytes],
    ) -> bytes:
        """The frame for a client; ``frames`` has those that are made, by part."""
        part = parts.part(client)
        if part not in frames:
            held = parts.held(client)
            codec = self._settings.federation.down_codec
            frames[part] = broadcast_frame(state, self._manifest, held, codec)
        return frames[part]

    def _temperature(self, round: int) -> float:
        first = self._settings.assembler.temperature_start
        last = self._settings.assembler.temperature_end
        rounds = self._settings.federation.rounds
        share = (round - 1) / (rounds - 1) if rounds > 1 else 0.0
        return first + (last - first) * min(share, 1.0)


def full_graph(state: ServerState) -> GraphMessage:
    """The server's graph as it is."""
    graph = state.graph
    return GraphMessage(version=graph.version, full=pack_graph(graph), edits=())


def to_message(
    grid: Grid,
    node: int,
    request: RoundRequest,
    kind: str,
    round: int,
    *,
    attempt: int = 0,
) -> Message:
    """A request as Flower sends it.

    Args:
        grid: that it goes out on.
        node: to whom.
        request: what is asked.
        kind: Flower's message type.
        round: in which it is sent; Flower's group of the message.
        attempt: how often the node was asked before in the round.
    """
    content = request_to_record(request)
    if attempt:
        content[ATTEMPT] = ConfigRecord({"number": attempt})
    return message_to(grid, node, content, kind, str(round))


def request_bytes(request: RoundRequest) -> int:
    """Payload bytes of a request: parameters, graph or edits, three numbers."""
    graph = request.graph
    return (
        len(request.parameters)
        + len(graph.full or b"")
        + len(edits_to_json(graph.edits))
        + 3 * 8
    )
