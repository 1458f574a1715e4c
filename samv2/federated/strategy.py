"""The Flower strategy: asks clients, refuses what is invalid, merges the rest.

Arithmetic lives in server_merge; this file turns messages into its arguments. Only the
message API is used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from samv2.common.errors import FederationError, FrameError
from samv2.common.settings import Settings
from samv2.data.sources import parse_domain
from samv2.federated.client_round import (
    GraphMessage,
    RoundRequest,
    edits_to_json,
    pack_graph,
)
from samv2.federated.client_rows import tell_replies
from samv2.federated.grid import (
    counts_from_record,
    counts_request,
    message_to,
    reply_from_record,
    request_to_record,
)
from samv2.federated.server_merge import (
    MergeReport,
    Refusal,
    ServerState,
    ValidReply,
    broadcast_frame,
    server_merge,
)
from samv2.federated.siblings import fit_siblings, unpack_counts
from samv2.federated.validate import LARGEST_LOSS, validate_reply
from samv2.federated.waiting import Waiting
from samv2.models.perplexity import Score
from samv2.updates.packing import Manifest

log = logging.getLogger(__name__)

ENROL_SECONDS = 120.0
LONGEST_DETAIL = 2000
"""Characters of a client's error that are kept."""


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """All that is known about one finished round."""

    merge: MergeReport
    scores: dict[str, Score]
    """Held-out score by domain, summed over clients; empty where none was asked for."""
    bytes_down: int
    """Payload bytes sent to one client for training, the largest of the round."""
    bytes_down_all: int
    """The same of all clients asked; of the second try where there were two."""
    seconds: dict[str, float]
    """Wall time by phase: train, merge, evaluate; and ``server``, the time of all phases
    that was not spent waiting for clients."""
    asked: dict[int, int] = field(default_factory=dict)
    """Payload bytes sent to each client that was asked to train."""
    waited: dict[int, float] = field(default_factory=dict)
    """Seconds from asking to a client's reply, where replies come one by one."""


@dataclass
class _Round:
    """What the strategy keeps between sending a round's messages and its replies."""

    nodes: dict[int, int] = field(default_factory=dict)
    """{node id: client} of the clients asked."""
    bytes_down: int = 0
    bytes_down_all: int = 0
    asked: dict[int, int] = field(default_factory=dict)
    """{client: bytes sent to it}."""


class TooFewReplies(FederationError):
    """A round had fewer valid replies than it needs."""

    def __init__(
        self, server_round: int, valid: int, needed: int, refusals: Sequence[Refusal]
    ) -> None:
        causes = "; ".join(
            f"client {item.client}: {item.detail.splitlines()[0]} [{item.reason}]"
            for item in refusals
        )
        super().__init__(
            f"round {server_round} had {valid} valid replies, needed are {needed} "
            f"(federation.min_replies), also when it was tried again. {causes}. "
            "Everything up to the round before is in the checkpoint: mend the clients "
            "and continue with --resume"
        )


class SamStrategy(Strategy):
    """Sparse FedAvg over expert blocks, with graph edits.

    Args:
        state: the server's state to continue from.
        manifest: of the model's trainable blocks.
        settings: of the run.
        visits: of a token in each converted layer; None: K everywhere.
        on_start: called with the held-out scores before the first round of this call.
        on_round: called after every round with the new state and its report; the place
            for checkpoints and logs.
        on_event: told what happens within a round, by name, as keywords of JSON values.
    """

    def __init__(
        self,
        state: ServerState,
        manifest: Manifest,
        settings: Settings,
        *,
        visits: Sequence[int] | None = None,
        on_start: Callable[[dict[str, Score]], None] | None = None,
        on_round: Callable[[ServerState, RoundReport], None] | None = None,
        on_event: Callable[..., None] | None = None,
    ) -> None:
        self.state = state
        self.manifest = manifest
        self.settings = settings
        self.visits = visits
        self._on_start = on_start
        self._on_round = on_round
        self._tell = on_event or (lambda name, **fields: None)
        self._waiting = Waiting()
        self._clients: dict[int, int] = {}
        self._known_version: dict[int, int] = {}
        self._current = _Round()
        self._merge: MergeReport | None = None
        self._scores: dict[str, Score] = {}
        self.siblings: dict[int, int] = {}
        """{client: the sibling that its text is for}, where this start fitted the gate."""
        self.count_frames: dict[int, bytes] = {}
        """Token counts as they came, where this start fitted the gate."""
        self.gate_bytes: dict[int, int] = {}
        """Bytes of token counts by client; they count as sent in round 1."""

    def summary(self) -> None:
        """Nothing: the run's own table says what happens."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[..., MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left, from ``state.round + 1`` on.

        The parameters live in the strategy's state, so the arrays and configs of
        Flower's signature are not used; ``num_rounds`` and ``timeout`` default to the
        settings.

        Raises:
            FederationError: clients are missing, or two tries of a round gave fewer
                valid replies than ``federation.min_replies``.
        """
        rounds = num_rounds or self.settings.federation.rounds
        wait = timeout or self.settings.federation.round_timeout
        self.enrol(grid)
        if self._lacks_gate():
            self.fit_siblings(grid)
        if self._on_start is not None:
            self._on_start(self._evaluate(grid, self.state.round, wait))
        while self.state.round < rounds:
            self._one_round(grid, wait)
        return Result()

    def _one_round(self, grid: Grid, timeout: float) -> None:
        begin = time.perf_counter()
        self._waiting.restart()
        current = self.state.round + 1
        replies = self._train(grid, current, timeout)
        trained = time.perf_counter()
        try:
            self.aggregate_train(current, replies)
        except TooFewReplies:
            replies = self._train(grid, current, timeout)
            trained = time.perf_counter()
            self.aggregate_train(current, replies)
        merged = time.perf_counter()
        scores: dict[str, Score] = {}
        if is_scored(self.settings, current):
            scores = self._evaluate(grid, current, timeout)
        if self._on_round is not None and self._merge is not None:
            seconds = {
                "train": trained - begin,
                "merge": merged - trained,
                "evaluate": time.perf_counter() - merged,
            }
            seconds["server"] = sum(seconds.values()) - self._waiting.seconds
            nodes, arrivals = self._current.nodes, self._waiting.arrivals
            report = RoundReport(
                merge=self._merge,
                scores=scores,
                bytes_down=self._current.bytes_down,
                bytes_down_all=self._current.bytes_down_all,
                seconds=seconds,
                asked=self._current.asked,
                waited={nodes[n]: t for n, t in arrivals.items() if n in nodes},
            )
            self._on_round(self.state, report)

    def _train(self, grid: Grid, current: int, timeout: float) -> Iterable[Message]:
        messages = self.configure_train(current, ArrayRecord(), ConfigRecord(), grid)
        self._tell("round_started", round=current, clients=list(self._current.asked))
        return self._waiting(
            lambda: grid.send_and_receive(messages, timeout=timeout),
            sender=lambda reply: reply.metadata.src_node_id,
        )

    def enrol(self, grid: Grid) -> None:
        """Wait for the run's clients, see :func:`enrol_clients`."""
        self._clients = enrol_clients(grid, self.settings.federation.clients)

    def fit_siblings(self, grid: Grid) -> None:
        """Ask how often tokens occur in the clients' text, and fit the siblings' gate.

        Raises:
            FederationError: not one client has sent counts that can be used.
        """
        messages = [
            message_to(grid, node, counts_request(), MessageType.QUERY, "siblings")
            for node in self._clients
        ]
        counts: dict[int, Tensor] = {}
        for reply in grid.send_and_receive(messages, timeout=ENROL_SECONDS):
            client = self._clients.get(reply.metadata.src_node_id)
            if client is None or client in counts:
                continue
            try:
                frame = counts_from_record(reply.content if reply.has_content() else {})
                counts[client] = unpack_counts(frame)
            except FrameError as error:
                log.warning("client %d: token counts refused: %s", client, error)
                continue
            self.count_frames[client] = frame
            self.gate_bytes[client] = len(frame)
        if not counts:
            raise FederationError(
                "no client has sent token counts, which tell the siblings' kinds of text "
                "apart; mend the clients, or set adapter.siblings to 1"
            )
        siblings = self.settings.adapter.siblings
        gate, self.siblings = fit_siblings(counts, siblings)
        blocks = self.state.blocks | {max(self.manifest.ids): gate}
        self.state = replace(self.state, blocks=blocks)

    def _lacks_gate(self) -> bool:
        """Whether there are siblings, and nobody has said yet what each is for."""
        siblings = self.settings.adapter.siblings
        return siblings > 1 and not self.state.blocks[max(self.manifest.ids)].any()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Requests to the round's clients; the sample depends on seed and round."""
        parameters = broadcast_frame(self.state, self.manifest)
        self._current = _Round(nodes=self._sample(server_round))
        messages = []
        for node in self._current.nodes:
            request = RoundRequest(
                round=server_round,
                graph=self._graph_for(node),
                parameters=parameters,
                temperature=self._temperature(server_round),
            )
            size = request_bytes(request)
            self._current.bytes_down = max(self._current.bytes_down, size)
            self._current.bytes_down_all += size
            self._current.asked[self._current.nodes[node]] = size
            messages.append(
                message_to(
                    grid,
                    node,
                    request_to_record(request),
                    MessageType.TRAIN,
                    str(server_round),
                )
            )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[None, MetricRecord]:
        """Validate a round's replies and merge the good ones into the state.

        Raises:
            TooFewReplies: fewer are valid than ``federation.min_replies``; the state is
                unchanged.
        """
        valid, refusals = self._sort_replies(replies)
        tell_replies(self._tell, server_round, valid, refusals)
        needed = self.settings.federation.min_replies
        if len(valid) < needed:
            # Clients read the state before this round again when it is tried again.
            for node in self._current.nodes:
                self._known_version.pop(node, None)
            raise TooFewReplies(server_round, len(valid), needed, refusals)
        self.state, self._merge = server_merge(
            self.state,
            valid,
            refusals,
            self.manifest,
            self.settings,
            visits=self.visits,
        )
        return None, MetricRecord({"replies": len(valid), "refused": len(refusals)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Requests to all clients to score their held-out text."""
        request = RoundRequest(
            round=self.state.round + 1,
            graph=self._full_graph(),
            parameters=broadcast_frame(self.state, self.manifest),
        )
        return [
            message_to(
                grid,
                node,
                request_to_record(request),
                MessageType.EVALUATE,
                str(server_round),
            )
            for node in self._clients
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord:
        """Perplexity by domain; what is not believable in a reply is left out.

        A score counts for a domain of the settings, with as many tokens as the windows
        hold at most, once for every node that was asked.
        """
        answered = list(replies)
        for message in answered:
            if message.has_error():
                log.warning(
                    "round %d: node %d has not scored its held-out text: %s",
                    server_round,
                    message.metadata.src_node_id,
                    first_line(message),
                )
        federation = self.settings.federation
        length = self.settings.train.sequence_length
        self._scores = sum_scores(
            answered,
            nodes=set(self._clients),
            domains={parse_domain(spec)[0] for spec in self.settings.data.domains},
            most_tokens=federation.eval_windows * (length - 1),
        )
        return MetricRecord(
            {name: score.perplexity for name, score in self._scores.items()}
        )

    def _evaluate(self, grid: Grid, current: int, timeout: float) -> dict[str, Score]:
        messages = self.configure_evaluate(current, ArrayRecord(), ConfigRecord(), grid)
        replies = self._waiting(
            lambda: grid.send_and_receive(messages, timeout=timeout)
        )
        self.aggregate_evaluate(current, replies)
        return self._scores

    def _sample(self, server_round: int) -> dict[int, int]:
        count = self.settings.federation.clients_per_round or len(self._clients)
        return sample_nodes(self._clients, count, self.settings.seed, server_round)

    def _graph_for(self, node: int) -> GraphMessage:
        """Edits where the client is at most one version behind, else the full graph."""
        version = self.state.graph.version
        known = self._known_version.get(node)
        if known is None or known < version - 1:
            return self._full_graph()
        edits = self.state.last_edits if known == version - 1 else ()
        return GraphMessage(version=version, full=None, edits=edits)

    def _full_graph(self) -> GraphMessage:
        graph = self.state.graph
        return GraphMessage(version=graph.version, full=pack_graph(graph), edits=())

    def _temperature(self, server_round: int) -> float:
        first = self.settings.assembler.temperature_start
        last = self.settings.assembler.temperature_end
        rounds = self.settings.federation.rounds
        share = (server_round - 1) / (rounds - 1) if rounds > 1 else 0.0
        return first + (last - first) * min(share, 1.0)

    def _sort_replies(
        self, replies: Iterable[Message]
    ) -> tuple[list[ValidReply], list[Refusal]]:
        """Validate every reply; name every client that failed or stayed silent."""
        silent = dict(self._current.nodes)
        valid: list[ValidReply] = []
        refusals: list[Refusal] = []
        for message in replies:
            node = message.metadata.src_node_id
            client = silent.pop(node, None)
            if client is None and node in self._current.nodes:
                detail = "this client had already replied; its first reply counts"
                refusals.append(
                    _refusal(self._current.nodes[node], "duplicate", detail)
                )
                continue
            if client is None:
                refusals.append(_refusal(-1, "unasked", f"node {node} was not asked"))
                continue
            self._known_version.pop(node, None)
            if message.has_error():
                reason = message.error.reason or "the client gave no reason"
                refusals.append(_refusal(client, "client_error", reason))
                continue
            try:
                reply = reply_from_record(message.content)
                checked = validate_reply(
                    reply,
                    client,
                    self.state,
                    self.manifest,
                    self.settings,
                    visits=self.visits,
                )
            except FrameError as error:
                detail = str(error).removesuffix(f" [{error.reason}]")
                refusals.append(_refusal(client, error.reason, detail))
                continue
            self._known_version[node] = reply.graph_version
            if self.state.round == 0:
                sent = self.gate_bytes.get(client, 0)
                checked = replace(checked, bytes_up=checked.bytes_up + sent)
            valid.append(checked)
        for node, client in silent.items():
            self._known_version.pop(node, None)
            refusals.append(_refusal(client, "no_reply", "no reply in time"))
        return valid, refusals


def is_scored(settings: Settings, round: int) -> bool:
    """Whether held-out text is scored after a round."""
    federation = settings.federation
    return round % federation.eval_every == 0 or round == federation.rounds


def enrol_clients(grid: Grid, wanted: int) -> dict[int, int]:
    """Wait for a run's clients and learn which node is which client.

    Returns:
        {node id: client}, by node.

    Raises:
        FederationError: too few nodes, or two nodes claim the same client.
    """
    deadline = time.monotonic() + ENROL_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} of {wanted} clients are connected after "
                f"{ENROL_SECONDS:g} s; start the missing ones or lower "
                "federation.clients"
            )
        time.sleep(0.5)
    messages = [
        message_to(grid, node, RecordDict(), MessageType.QUERY, "enrol")
        for node in nodes
    ]
    clients: dict[int, int] = {}
    failures: list[str] = []
    for reply in grid.send_and_receive(messages, timeout=ENROL_SECONDS):
        client = _client_of(reply)
        if client is None:
            failures.append(first_line(reply))
            continue
        if client in clients.values():
            raise FederationError(
                f"two nodes hold client {client}; give each its own partition-id"
            )
        clients[reply.metadata.src_node_id] = client
    missing = sorted(set(range(wanted)) - set(clients.values()))
    if missing:
        raise FederationError(
            f"clients {missing} are not there ({'; '.join(failures) or 'no answer'}); "
            "check that each node has its own partition-id and its shard"
        )
    return {n: c for n, c in sorted(clients.items()) if 0 <= c < wanted}


def sample_nodes(
    clients: Mapping[int, int], count: int, seed: int, server_round: int
) -> dict[int, int]:
    """A round's clients, which depend on seed and round alone.

    Args:
        clients: {node id: client} of the run.
        count: how many to take.
        seed: of the run.
        server_round: from 1.
    """
    by_client = {client: node for node, client in clients.items()}
    generator = np.random.default_rng([seed, server_round])
    chosen = generator.choice(sorted(by_client), size=count, replace=False)
    return {by_client[int(client)]: int(client) for client in sorted(chosen)}


def _refusal(client: int, reason: str, detail: str) -> Refusal:
    """A refusal whose text cannot flood a log or steer a terminal."""
    shown = detail[:LONGEST_DETAIL].strip() or "no detail"
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in shown)
    return Refusal(client=client, reason=reason, detail=clean)


def first_line(reply: Message) -> str:
    """Why a reply is none, in one line."""
    if not reply.has_error():
        return f"node {reply.metadata.src_node_id} names no client"
    return _refusal(-1, "client_error", reply.error.reason or "").detail.splitlines()[0]


def _client_of(reply: Message) -> int | None:
    """The client that an enrolment reply names; None where it names none."""
    if reply.has_error() or "metrics" not in reply.content:
        return None
    client = reply.content["metrics"].get("client")
    return client if type(client) is int else None


def request_bytes(request: RoundRequest) -> int:
    """Payload bytes of a request: parameters, graph or edits, three numbers."""
    graph = request.graph
    return (
        len(request.parameters)
        + len(graph.full or b"")
        + len(edits_to_json(graph.edits))
        + 3 * 8
    )


def sum_scores(
    replies: Iterable[Message],
    *,
    nodes: Container[int],
    domains: Container[str],
    most_tokens: int,
) -> dict[str, Score]:
    """Scores by domain, summed in node order so that the bits repeat.

    Args:
        replies: untrusted answers to an evaluation.
        nodes: nodes that were asked; the first reply of each counts.
        domains: names that may be scored.
        most_tokens: tokens of a domain that one client can have scored.
    """
    first: dict[int, Message] = {}
    for message in replies:
        node = message.metadata.src_node_id
        if message.has_content() and node in nodes:
            first.setdefault(node, message)
    scores: dict[str, Score] = {}
    for _, message in sorted(first.items()):
        metrics = message.content.get("metrics") or {}
        for key in sorted(metrics):
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
