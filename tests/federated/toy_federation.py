"""A toy federation on the real strategy, and ways to tamper with a client's replies."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import Tensor

from samv2.common.settings import Settings
from samv2.federated.checkpoint import save_checkpoint
from samv2.federated.client_round import TrainReply
from samv2.federated.client_state import (
    ClientState,
    load_client_state,
    save_client_state,
)
from samv2.federated.graph_message import update_graph
from samv2.federated.grid import (
    FIRST_NODE,
    Again,
    EmbeddedGrid,
    reply_from_record,
    reply_to_record,
    request_from_record,
)
from samv2.federated.run_logs import write_merge
from samv2.federated.server_merge import ServerState
from samv2.federated.spool import Spool
from samv2.federated.strategy import RoundReport, SamStrategy
from samv2.federated.usage import pack_usage
from samv2.updates.packing import pack
from tests.federated.runs import (
    toy_counts,
    toy_manifest,
    toy_settings,
    toy_state,
    toy_update,
)

CLIENTS = 3
ATTACKER = 1
Tamper = Callable[[Message, Message], list[Message]]
"""(request, honest reply) -> what arrives instead."""


def toy_client_app(folder: Path, masks: list[tuple[int, int, Tensor]]) -> ClientApp:
    """Clients that do no arithmetic, but keep graph and state as real ones do.

    Args:
        folder: of the clients' states.
        masks: gets (round, client, the mask it walked) of every training.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"client": int(context.node_config["client"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["client"])
        request = request_from_record(message.content)
        home = folder / f"client_{client}"
        known = load_client_state(home, before_round=request.round).graph
        graph = update_graph(known, request.graph)
        masks.append((request.round, client, graph.edge_mask_LEE))
        seed = 10 * request.round + client
        reply = TrainReply(
            update=pack(toy_update(seed), toy_manifest(), round=request.round),
            usage=pack_usage(toy_counts(seed, 12), round=request.round),
            graph_version=graph.version,
            examples=client + 1,
            tokens=64,
            train_loss=4.0,
            seconds=0.1,
        )
        save_client_state(home, ClientState(graph=graph), round=request.round)
        return Message(reply_to_record(reply), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        scores = {"nll.python": 20.0, "tokens.python": 10}
        return Message(RecordDict({"metrics": MetricRecord(scores)}), reply_to=message)

    return app


class HostileGrid(EmbeddedGrid):
    """An embedded grid on which one client's training replies are tampered with.

    It hands over what comes in another order than it was asked, where ``order`` says so.
    """

    tamper: Tamper | None = None
    rounds: tuple[int, ...] = (1,)
    attackers: tuple[int, ...] = (ATTACKER,)
    order: Callable[[list[Message]], list[Message]] | None = None
    calls: int = 0
    """Exchanges of training messages."""
    asked: int = 0
    """Training messages."""

    def stream(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        again: Again | None = None,
    ) -> Iterator[Message]:
        queue = deque(self.order(list(messages)) if self.order else messages)
        self.calls += bool(queue) and queue[0].metadata.message_type == "train"
        while queue:
            message = queue.popleft()
            self.asked += message.metadata.message_type == "train"
            for reply in super().stream([message], timeout=timeout):
                for found in self._tampered(message, reply):
                    repeated = again(found) if again is not None else None
                    if repeated is None:
                        yield found
                    else:
                        queue.append(repeated)

    def _tampered(self, request: Message, reply: Message) -> list[Message]:
        hit = (
            request.metadata.message_type == "train"
            and self.tamper is not None
            and reply.metadata.src_node_id - FIRST_NODE in self.attackers
            and int(request.metadata.group_id) in self.rounds
        )
        return self.tamper(request, reply) if hit and self.tamper else [reply]


class Federation:
    """A toy federation in a folder, and what came of it."""

    def __init__(self, root: Path, *overrides: str, clients: int = CLIENTS) -> None:
        self.root = root
        self.masks: list[tuple[int, int, Tensor]] = []
        self.settings: Settings = toy_settings(
            f"federation.clients={clients}",
            "federation.rounds=1",
            "edits.patience=1",
            "edits.cooldown=0",
            *overrides,
        )
        self.reports: list[RoundReport] = []
        self.states: list[ServerState] = [toy_state()]
        self.grid = HostileGrid(
            partial(toy_client_app, root / "clients", self.masks),
            [{"client": index} for index in range(clients)],
            {},
        )
        self.strategy = SamStrategy(
            self.states[0],
            toy_manifest(),
            self.settings,
            on_round=self._on_round,
            spool=Spool(root / "spool"),
        )

    def _on_round(self, state: ServerState, report: RoundReport) -> None:
        self.states.append(state)
        self.reports.append(report)
        write_merge(self.root, report.merge)
        save_checkpoint(self.root / "checkpoints", state, model_fingerprint="toy")

    def run(self, tamper: Tamper | None = None, rounds: tuple[int, ...] = (1,)) -> None:
        """All rounds, the attacker tampering in those given."""
        self.grid.tamper, self.grid.rounds = tamper, rounds
        self.strategy.start(self.grid)

    def refused(self, round: int = 1) -> list[dict[str, Any]]:
        """The refusals that merge_round{N}.json tells of."""
        path = self.root / f"merge_round{round}.json"
        return json.loads(path.read_text())["refused"]

    def tensors(self) -> dict[str, Tensor]:
        """Everything of the newest state that could differ."""
        state = self.states[-1]
        graph = {"mask": state.graph.edge_mask_LEE, "usage": state.memory.usage_LEE}
        return {str(key): value for key, value in state.blocks.items()} | graph


def altered(**changes: Any) -> Tamper:
    """The honest reply with some of its fields changed."""

    def tamper(request: Message, reply: Message) -> list[Message]:
        values = reply_from_record(reply.content).__dict__ | changes
        return [Message(reply_to_record(TrainReply(**values)), reply_to=request)]

    return tamper


def metric(**changes: Any) -> Tamper:
    """The honest reply with raw numbers changed (None removes one)."""

    def tamper(request: Message, reply: Message) -> list[Message]:
        metrics = dict(reply.content["metrics"])
        for name, value in changes.items():
            metrics[name.replace("_", "-")] = value
        kept = {name: value for name, value in metrics.items() if value is not None}
        plain = not any(isinstance(value, (bool, str)) for value in kept.values())
        kind = MetricRecord if plain else ConfigRecord
        reply.content["metrics"] = kind(kept)
        return [Message(reply.content, reply_to=request)]

    return tamper


def arrays(change: Callable[[dict[str, Array]], Any]) -> Tamper:
    """The honest reply with its arrays changed in place."""

    def tamper(request: Message, reply: Message) -> list[Message]:
        held = dict(reply.content["payload"])
        change(held)
        reply.content["payload"] = ArrayRecord(held)
        return [Message(reply.content, reply_to=request)]

    return tamper


def of_kind(name: str, record: Any) -> Tamper:
    """The honest reply with one record replaced by one of another kind."""

    def tamper(request: Message, reply: Message) -> list[Message]:
        content = RecordDict(dict(reply.content))
        content[name] = record
        return [Message(content, reply_to=request)]

    return tamper


def empty(request: Message, reply: Message) -> list[Message]:
    """A reply without any record."""
    return [Message(RecordDict(), reply_to=request)]


def failure(reason: str) -> Tamper:
    """An error message."""
    return lambda request, reply: [Message(Error(2, reason), reply_to=request)]


def silence(request: Message, reply: Message) -> list[Message]:
    """Nothing at all."""
    return []


def from_elsewhere(request: Message, reply: Message) -> list[Message]:
    """The reply under the name of a node that was not asked."""
    reply.metadata.__dict__["_src_node_id"] = 999
    return [reply]


def huge(numbers: Tensor) -> bytes:
    """An update frame of these numbers in block 0."""
    return pack({0: numbers}, toy_manifest(), round=1)


def honest_frame(round: int = 1) -> bytes:
    """The attacker's honest update, under a round of choice."""
    return pack(toy_update(11), toy_manifest(), round=round)


def fails_times(times: int) -> Tamper:
    """Silent a number of times, honest after."""
    left = [times]

    def tamper(request: Message, reply: Message) -> list[Message]:
        left[0] -= 1
        return [] if left[0] >= 0 else [reply]

    return tamper


FOREIGN = Array(dtype="float32", shape=(6,), stype="numpy.ndarray", data=bytes(24))
