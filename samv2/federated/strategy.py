"""The Flower strategy: asks clients, refuses what is invalid, merges the rest.

    requests out -> replies validated as they come -> merge -> scores

Arithmetic lives in server_merge; this file turns messages into its arguments. Only the
message API is used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from samv2.common.errors import FederationError
from samv2.common.settings import Settings
from samv2.federated.ask_counts import ask_counts
from samv2.federated.client_round import RoundRequest
from samv2.federated.client_rows import tell_replies
from samv2.federated.drift import begin
from samv2.federated.drift_watch import DriftReport, watch_drift
from samv2.federated.exchange import (
    Exchange,
    error_refusal,
    reported_scores,
    sort_replies,
)
from samv2.federated.grid import reply_from_record
from samv2.federated.parts import Parts, plan_parts
from samv2.federated.questions import answer_seconds
from samv2.federated.refusals import TooFewReplies
from samv2.federated.requests import Requests, request_bytes, to_message
from samv2.federated.roster import Roster
from samv2.federated.sampling import sample_nodes
from samv2.federated.scores import (
    believed_scores,
    domain_names,
    is_scored,
    mean_loss,
    sum_scores,
    told_distances,
)
from samv2.federated.server_merge import (
    MergeReport,
    ServerState,
    ValidReply,
    server_merge,
)
from samv2.federated.siblings import fit_siblings
from samv2.federated.spool import Spool
from samv2.federated.subgraph import Planner
from samv2.federated.validate import validate_reply
from samv2.federated.waiting import Waiting
from samv2.models.perplexity import Score
from samv2.updates.packing import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """All that is known about one finished round."""

    merge: MergeReport
    scores: dict[str, Score]
    """Held-out score by domain, summed over clients; empty where none was asked for."""
    drift: DriftReport = DriftReport()
    """What was done about clients whose text has changed."""
    bytes_down: int
    """Payload bytes sent to one client for training, the largest of the round."""
    bytes_down_all: int
    """The same of all requests; of the second try where there were two."""
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
    requests: dict[int, RoundRequest] = field(default_factory=dict)
    """By node, as sent first."""
    attempts: dict[int, int] = field(default_factory=dict)
    """How often each node was asked again."""
    bytes_down: int = 0
    """The largest first request."""
    asked: dict[int, int] = field(default_factory=dict)
    """{client: bytes sent to it}."""


class SamStrategy(Strategy):
    """Sparse FedAvg over expert blocks, with graph edits.

    Args:
        state: the server's state to continue from.
        manifest: of the model's trainable blocks.
        settings: of the run.
        visits: of a token in each converted layer; None: K everywhere.
        planner: makes the parts of clients that cannot hold the model; None: all can.
        key: of the noise, where privacy is on.
        on_start: called with the held-out scores before the first round of this call.
        on_round: called after every round with the new state and its report; the place
            for checkpoints and logs.
        spool: where a round's frames wait for its merge; default: in memory.
        on_event: told what happens within a round, by name, as keywords of JSON values.
    """

    def __init__(
        self,
        state: ServerState,
        manifest: Manifest,
        settings: Settings,
        *,
        visits: Sequence[int] | None = None,
        planner: Planner | None = None,
        key: bytes | None = None,
        on_start: Callable[[dict[str, Score]], None] | None = None,
        on_round: Callable[[ServerState, RoundReport], None] | None = None,
        spool: Spool | None = None,
        on_event: Callable[..., None] | None = None,
    ) -> None:
        self.state = state
        self.manifest = manifest
        self.settings = settings
        self.visits = visits
        self.planner = planner
        self.parts = Parts()
        self._key = key
        self._on_start = on_start
        self._on_round = on_round
        self._tell = on_event or (lambda name, **fields: None)
        self._waiting = Waiting()
        self.roster = Roster(
            settings.federation.clients, settings.federation.quarantine
        )
        self._requests = Requests(settings, manifest)
        self._exchange = Exchange()
        self._spool = spool or Spool(None)
        self._current = _Round()
        self._trained = 0.0
        self._merge: MergeReport | None = None
        self._scores: dict[str, Score] = {}
        self._losses: dict[int, float] = {}
        self._moved: dict[int, float] = {}
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
        self.plan()
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
        with self._waiting.counted():
            self.roster.renew(grid, answer_seconds(timeout))
        try:
            self.aggregate_train(current, self._train(grid, current, timeout))
        except TooFewReplies:
            if self.roster.missing(grid):
                with self._waiting.counted():
                    self.enrol(grid)
            self.aggregate_train(current, self._train(grid, current, timeout))
        merged = time.perf_counter()
        scores: dict[str, Score] = {}
        if is_scored(self.settings, current):
            scores = self._evaluate(grid, current, timeout)
        drift = DriftReport()
        if scores:
            self.state, drift = watch_drift(
                self.state,
                self.settings,
                grid,
                self.roster.clients,
                losses=self._losses,
                moved=self._moved,
                asking=self._waiting.counted(),
            )
        if self._on_round is not None and self._merge is not None:
            seconds = {
                "train": self._trained - begin,
                "merge": merged - self._trained,
                "evaluate": time.perf_counter() - merged,
            }
            seconds["server"] = sum(seconds.values()) - self._waiting.seconds
            nodes, arrivals = self._current.nodes, self._waiting.arrivals
            report = RoundReport(
                merge=self._merge,
                scores=scores,
                drift=drift,
                bytes_down=self._current.bytes_down,
                bytes_down_all=sum(self._current.asked.values()),
                seconds=seconds,
                asked=self._current.asked,
                waited={nodes[n]: t for n, t in arrivals.items() if n in nodes},
            )
            self._on_round(self.state, report)
        self._merge = None
        self._spool.empty()

    def _train(self, grid: Grid, current: int, timeout: float) -> Iterator[Message]:
        """Replies as they come; a client that fails is asked again while time allows."""
        messages = self.configure_train(current, ArrayRecord(), ConfigRecord(), grid)

        def again(reply: Message) -> Message | None:
            return self._repeated(grid, current, reply)

        self._tell("round_started", round=current, clients=list(self._current.asked))
        return self._waiting(
            lambda: self._exchange.stream(grid, messages, timeout=timeout, again=again),
            sender=lambda reply: reply.metadata.src_node_id,
        )

    def _repeated(self, grid: Grid, current: int, reply: Message) -> Message | None:
        """The request once more, for a client that failed; None where enough is enough.

        The graph goes out anew, since not knowing it may be what the client failed over.
        """
        node = reply.metadata.src_node_id
        attempt = self._current.attempts.get(node, 0) + 1
        if not reply.has_error() or attempt > self.settings.federation.retries:
            return None
        client = self._current.nodes[node]
        why = error_refusal(client, reply).detail.splitlines()[0]
        log.info("round %d: client %d is asked again: %s", current, client, why)
        self._current.attempts[node] = attempt
        sent = self._current.requests[node]
        request = self._requests.repeated(sent, node, self.state)
        self._current.asked[client] += request_bytes(request)
        return to_message(
            grid, node, request, MessageType.TRAIN, current, attempt=attempt
        )

    def enrol(self, grid: Grid) -> None:
        """Wait for the run's clients, see :meth:`Roster.enrol`."""
        self.roster.enrol(grid)
        self._requests.meet(self.roster.clients)

    def plan(self) -> None:
        """Give each enrolled client its part, and leave out those that none fits.

        Raises:
            FederationError: fewer than ``federation.min_replies`` clients are left.
        """
        if self.planner is None:
            return
        self.parts, unfit = plan_parts(self.planner, self.roster.budgets)
        for client, why in unfit.items():
            self.roster.leave_out(client, why)
        left, needed = len(self.roster.clients), self.settings.federation.min_replies
        if unfit and left < needed:
            client, why = min(unfit.items())
            raise FederationError(
                f"{left} clients can hold a part of the model, and a round needs "
                f"{needed} (federation.min_replies). Client {client}: {why}"
            )

    def memory(self) -> dict[str, dict[str, Any]]:
        """What is known of clients, for a checkpoint.

        ``graph``: versions that clients hold, by client; the others are the roster's.
        """
        known = self._requests.memory(self.roster.clients)
        return {"graph": known} | self.roster.memory()

    def recall(self, memory: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up what an earlier start's :meth:`memory` was, before :meth:`start`."""
        self._requests.recall(memory.get("graph", {}))
        self.roster.recall(memory)

    def fit_siblings(self, grid: Grid) -> None:
        """Ask how often tokens occur in the clients' text, and fit the siblings' gate.

        Raises:
            FederationError: not one client has sent counts that can be used.
        """
        clients = set(self.roster.clients.values())
        counts, self.count_frames = ask_counts(grid, self.roster.clients, clients, 1)
        self.gate_bytes = {c: len(frame) for c, frame in self.count_frames.items()}
        if not counts:
            raise FederationError(
                "no client has sent token counts, which tell the siblings' kinds of text "
                "apart; mend the clients, or set adapter.siblings to 1"
            )
        siblings = self.settings.adapter.siblings
        drift = self.settings.drift
        reserve = drift.reserve if drift.detect else 0
        gate, self.siblings = fit_siblings(counts, siblings, reserve=reserve)
        blocks = self.state.blocks | {max(self.manifest.ids): gate}
        memory = begin(counts, self.siblings) if drift.detect else None
        self.state = replace(self.state, blocks=blocks, siblings=memory)

    def _lacks_gate(self) -> bool:
        """Whether there are siblings, and nobody has said yet what each is for."""
        siblings = self.settings.adapter.siblings
        return siblings > 1 and not self.state.blocks[max(self.manifest.ids)].any()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Requests to the round's clients; the sample depends on seed and round."""
        nodes = self._sample(server_round)
        requests = self._requests.training(self.state, self.parts, nodes, server_round)
        sizes = {nodes[n]: request_bytes(request) for n, request in requests.items()}
        self._current = _Round(
            nodes=nodes,
            requests=requests,
            bytes_down=max(sizes.values(), default=0),
            asked=sizes,
        )
        return [
            to_message(grid, node, request, MessageType.TRAIN, server_round)
            for node, request in requests.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[None, MetricRecord]:
        """Validate a round's replies as they come and merge the good ones.

        Raises:
            TooFewReplies: fewer are valid than ``federation.min_replies``; the state is
                unchanged.
        """
        self._spool.empty()
        nodes = self._current.nodes
        valid, refusals = sort_replies(replies, nodes, self._checked)
        refusals += self._exchange.late_refusals(self.roster.clients)
        self._trained = time.perf_counter()
        tell_replies(self._tell, server_round, valid, refusals)
        self.roster.judge(server_round, refusals)
        self._requests.note(nodes, None)
        needed = self.settings.federation.min_replies
        if len(valid) < needed:
            raise TooFewReplies(server_round, len(valid), needed, refusals)
        replied = {reply.contribution.client for reply in valid}
        knowing = [node for node, client in nodes.items() if client in replied]
        self._requests.note(knowing, self.state.graph.version)
        self.state, self._merge = server_merge(
            self.state,
            valid,
            refusals,
            self.manifest,
            self.settings,
            visits=self.visits,
            key=self._key,
        )
        return None, MetricRecord({"replies": len(valid), "refused": len(refusals)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Requests to all clients to score their held-out text."""
        requests = self._requests.scoring(self.state, self.parts, self.roster.clients)
        return [
            to_message(grid, node, request, MessageType.EVALUATE, server_round)
            for node, request in requests.items()
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord:
        """Perplexity by domain; what is not believable in a reply is left out.

        A score counts for a domain of the settings, with as many tokens as the windows
        hold at most, once for every node that was asked.
        """
        federation = self.settings.federation
        length = self.settings.train.sequence_length
        reported = reported_scores(server_round, replies)
        believed = believed_scores(
            reported,
            clients=self.roster.clients,
            domains=domain_names(self.settings),
            most_tokens=federation.eval_windows * (length - 1),
        )
        self._scores = sum_scores(believed)
        self._losses = {client: mean_loss(own) for client, own in believed.items()}
        moved = told_distances(reported, self.roster.clients)
        self._moved = {self.roster.clients[node]: far for node, far in moved.items()}
        return MetricRecord(
            {name: score.perplexity for name, score in self._scores.items()}
        )

    def _evaluate(self, grid: Grid, current: int, timeout: float) -> dict[str, Score]:
        messages = self.configure_evaluate(current, ArrayRecord(), ConfigRecord(), grid)
        replies = self._waiting(
            lambda: self._exchange.stream(grid, messages, timeout=timeout)
        )
        self.aggregate_evaluate(current, replies)
        return self._scores

    def _sample(self, server_round: int) -> dict[int, int]:
        count = self.settings.federation.clients_per_round or len(self.roster.clients)
        return sample_nodes(
            self.roster.clients, count, self.settings.seed, server_round
        )

    def _checked(self, client: int, message: Message) -> ValidReply:
        """One reply, validated and spooled.

        Raises:
            FrameError: it is refused.
        """
        checked = validate_reply(
            reply_from_record(message.content),
            client,
            self.state,
            self.manifest,
            self.settings,
            visits=self.visits,
            held=self.parts.held(client),
        )
        if self.state.round == 0:
            sent = self.gate_bytes.get(client, 0)
            checked = replace(checked, bytes_up=checked.bytes_up + sent)
        return self._spool.keep(checked)
