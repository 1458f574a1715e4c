"""Federated averaging of LoRA adapters, on Flower's own FedAvg.

FedAvg averages; this file samples clients as SAM-v2 does, puts replies in a fixed order
so that the bits repeat, measures what is sent, and goes on from any round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from samv2.common.errors import FederationError
from samv2.common.quiet import quiet_logger
from samv2.common.settings import Settings
from samv2.data.sources import parse_domain
from samv2.federated.exchange import first_line, reported_scores
from samv2.federated.grid import message_to
from samv2.federated.lora_app import to_arrays, to_tensors
from samv2.federated.lora_methods import LoraMethod
from samv2.federated.roster import Roster
from samv2.federated.sampling import sample_nodes
from samv2.federated.scores import believed_scores, is_scored, sum_scores
from samv2.models.perplexity import Score

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoraRound:
    """All that is known about one finished round."""

    round: int
    adapters: dict[str, Tensor]
    """The mean of what came; empty where adapters stay with the clients."""
    scores: dict[str, Score]
    """Held-out score by domain, summed over clients."""
    clients: int
    """Whose replies counted."""
    failed: int
    train_loss: float
    """Nats, the mean over clients, weighted by windows."""
    bytes_up: list[int]
    """Bytes of adapters that each client sent."""
    bytes_down: list[int]
    """Bytes of adapters that each client was sent for training."""
    seconds: dict[str, float]
    """Wall time by phase: train, merge, evaluate."""


class LoraFedAvg(FedAvg):
    """Rounds of a LoRA baseline.

    Args:
        settings: of the run.
        method: what is trained and whether it is sent.
        first_round: the round to begin with.
        on_start: called with the held-out scores before the first round of this call.
        on_round: called after every round; the place for checkpoints and logs.
    """

    def __init__(
        self,
        settings: Settings,
        method: LoraMethod,
        *,
        first_round: int = 1,
        on_start: Callable[[dict[str, Score]], None] | None = None,
        on_round: Callable[[LoraRound], None] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.method = method
        self.scores: dict[str, Score] = {}
        self._first_round = first_round
        self._on_start = on_start
        self._on_round = on_round
        self._clients: dict[int, int] = {}

    def summary(self) -> None:
        """Nothing: the run's own table says what happens."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[..., MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left.

        Args:
            grid: with all clients.
            initial_arrays: adapters before the first round of this call; empty where
                they stay with the clients.
            num_rounds: of the whole run; default the settings'.
            timeout: of a round's replies, seconds; default the settings'.
            train_config: not used, and so are the two below.
            evaluate_config: not used.
            evaluate_fn: not used; clients score their own held-out text.

        Raises:
            FederationError: clients are missing, or too many failed a round twice.
        """
        federation = self.settings.federation
        wait = timeout or federation.round_timeout
        arrays = initial_arrays
        with quiet_logger("flwr", logging.WARNING):  # the run's table says it better
            roster = Roster(federation.clients)
            roster.enrol(grid)
            self._clients = roster.clients
            if self._on_start is not None:
                self._on_start(
                    self._evaluate(grid, self._first_round - 1, arrays, wait)
                )
            for current in range(
                self._first_round, (num_rounds or federation.rounds) + 1
            ):
                arrays = self._one_round(grid, current, arrays, wait)
        return Result(arrays=arrays)

    def _one_round(
        self, grid: Grid, current: int, arrays: ArrayRecord, timeout: float
    ) -> ArrayRecord:
        begin = time.perf_counter()
        messages, replies = self._train(grid, current, arrays, timeout)
        trained = time.perf_counter()
        averaged, metrics = self.aggregate_train(current, replies)
        merged = time.perf_counter()
        assert averaged is not None and metrics is not None, "there are replies"
        scores: dict[str, Score] = {}
        if is_scored(self.settings, current):
            scores = self._evaluate(grid, current, averaged, timeout)
        if self._on_round is not None:
            seconds = {
                "train": trained - begin,
                "merge": merged - trained,
                "evaluate": time.perf_counter() - merged,
            }
            report = LoraRound(
                round=current,
                adapters=to_tensors(averaged),
                scores=scores,
                clients=len(replies),
                failed=len(messages) - len(replies),
                train_loss=float(metrics["train-loss"]),
                bytes_up=[adapter_bytes(reply) for reply in replies],
                bytes_down=[adapter_bytes(message) for message in messages],
                seconds=seconds,
            )
            self._on_round(report)
        return averaged

    def _train(
        self, grid: Grid, current: int, arrays: ArrayRecord, timeout: float
    ) -> tuple[list[Message], list[Message]]:
        """Messages and replies of a round, which is tried twice."""
        causes: list[str] = []
        for _ in range(2):
            messages = self.configure_train(current, arrays, ConfigRecord(), grid)
            answered = list(grid.send_and_receive(messages, timeout=timeout))
            replies = [reply for reply in answered if reply.has_content()]
            needed = self._needed(len(messages))
            if len(replies) >= needed:
                return messages, replies
            causes = [first_line(reply) for reply in answered if reply.has_error()]
        raise FederationError(
            f"round {current} had {len(replies)} replies, needed are {needed}, also when "
            f"it was tried again. {'; '.join(causes)}. Everything up to the round before "
            "is in the checkpoint: mend the clients and run it again"
        )

    def _needed(self, asked: int) -> int:
        """A client whose adapters stay with it may not miss a round."""
        if self.method.averaged:
            return min(asked, self.settings.federation.min_replies)
        return asked

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Requests to the round's clients, the same that a SAM-v2 run would ask."""
        count = self.settings.federation.clients_per_round or len(self._clients)
        chosen = sample_nodes(self._clients, count, self.settings.seed, server_round)
        groups = {node: [client] for node, client in chosen.items()}
        if self.method.pooled:
            groups = {next(iter(chosen)): list(chosen.values())}
        messages = []
        for node, clients in groups.items():
            asked = ConfigRecord({"server-round": server_round, "clients": clients})
            content = RecordDict({"arrays": arrays, "config": asked})
            messages.append(
                message_to(grid, node, content, MessageType.TRAIN, str(server_round))
            )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's mean, weighted by windows trained on; replies in node order."""
        ordered = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        return super().aggregate_train(server_round, ordered)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Requests to all clients to score their held-out text."""
        asked = ConfigRecord({"server-round": server_round})
        content = RecordDict({"arrays": arrays, "config": asked})
        return [
            message_to(grid, node, content, MessageType.EVALUATE, str(server_round))
            for node in self._clients
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord:
        """Perplexity by domain; the sums are in ``scores``."""
        length = self.settings.train.sequence_length
        believed = believed_scores(
            reported_scores(server_round, replies),
            clients=self._clients,
            domains={parse_domain(spec)[0] for spec in self.settings.data.domains},
            most_tokens=self.settings.federation.eval_windows * (length - 1),
        )
        self.scores = sum_scores(believed)
        return MetricRecord(
            {name: score.perplexity for name, score in self.scores.items()}
        )

    def _evaluate(
        self, grid: Grid, current: int, arrays: ArrayRecord, timeout: float
    ) -> dict[str, Score]:
        messages = self.configure_evaluate(current, arrays, ConfigRecord(), grid)
        self.aggregate_evaluate(
            current, grid.send_and_receive(messages, timeout=timeout)
        )
        return self.scores


def adapter_bytes(message: Message) -> int:
    """Bytes of the numbers in a message's arrays, without the arrays' headers."""
    arrays = message.content["arrays"]
    return sum(array.numpy().nbytes for array in arrays.values())


def start_arrays(adapters: dict[str, Tensor], method: LoraMethod) -> ArrayRecord:
    """What the server sends first: adapters, or nothing where they stay."""
    return to_arrays(adapters if method.averaged else {})
