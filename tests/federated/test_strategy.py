"""The real strategy against hostile replies: each costs itself and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
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

from samv2.common.errors import FederationError
from samv2.common.settings import Settings
from samv2.federated import strategy as strategy_module
from samv2.federated.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from samv2.federated.client_round import TrainReply, update_graph
from samv2.federated.client_state import (
    ClientState,
    load_client_state,
    save_client_state,
)
from samv2.federated.grid import (
    FIRST_NODE,
    EmbeddedGrid,
    reply_from_record,
    reply_to_record,
    request_from_record,
)
from samv2.federated.run_logs import metrics_row, write_merge
from samv2.federated.server_merge import ServerState
from samv2.federated.strategy import RoundReport, SamStrategy, TooFewReplies
from samv2.federated.usage import pack_usage
from samv2.updates.packing import Manifest, pack
from tests.federated.runs import (
    assert_same_bits,
    toy_counts,
    toy_manifest,
    toy_settings,
    toy_state,
    toy_update,
)

CLIENTS = 3
ATTACKER = 1
ATTACKER_NODE = FIRST_NODE + ATTACKER
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
    """An embedded grid on which one client's training replies are tampered with."""

    tamper: Tamper | None = None
    rounds: tuple[int, ...] = (1,)
    calls: int = 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        replies = super().send_and_receive(asked, timeout=timeout)
        requests = {message.metadata.dst_node_id: message for message in asked}
        found: list[Message] = []
        training = bool(asked) and asked[0].metadata.message_type == "train"
        self.calls += training
        for reply in replies:
            request = requests[reply.metadata.src_node_id]
            hit = (
                training
                and self.tamper is not None
                and reply.metadata.src_node_id == ATTACKER_NODE
                and int(request.metadata.group_id) in self.rounds
            )
            found += self.tamper(request, reply) if hit and self.tamper else [reply]
        return found


class Federation:
    """A toy federation in a folder, and what came of it."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root = root
        self.masks: list[tuple[int, int, Tensor]] = []
        self.settings: Settings = toy_settings(
            f"federation.clients={CLIENTS}",
            "federation.rounds=1",
            "edits.patience=1",
            "edits.cooldown=0",
            *overrides,
        )
        self.reports: list[RoundReport] = []
        self.states: list[ServerState] = [toy_state()]
        self.grid = HostileGrid(
            partial(toy_client_app, root / "clients", self.masks),
            [{"client": index} for index in range(CLIENTS)],
            {},
        )
        self.strategy = SamStrategy(
            self.states[0], toy_manifest(), self.settings, on_round=self._on_round
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


SMALLER = Manifest.of({key: torch.zeros(5) for key in range(9)})
FEWER = Manifest.of({0: torch.zeros(6)})
FOREIGN = Array(dtype="float32", shape=(6,), stype="numpy.ndarray", data=bytes(24))

ATTACKS: dict[str, tuple[Tamper, str]] = {
    "truncated frame": (altered(update=honest_frame()[:-3]), "frame_length"),
    "empty frame": (altered(update=b""), "truncated"),
    "garbage frame": (altered(update=b"\xff" * 300), "magic"),
    "flipped bit": (altered(update=honest_frame()[:-8] + bytes(8)), "body_hash"),
    "nan values": (altered(update=huge(torch.full((6,), torch.nan))), "nonfinite"),
    "inf values": (altered(update=huge(torch.full((6,), torch.inf))), "nonfinite"),
    "huge values": (altered(update=huge(torch.full((6,), 1e30))), "update_range"),
    "wrong shape": (
        altered(update=pack({0: torch.ones(5)}, SMALLER, round=1)),
        "fingerprint",
    ),
    "fewer tensors": (
        altered(update=pack({0: torch.ones(6)}, FEWER, round=1)),
        "fingerprint",
    ),
    "no experts": (altered(update=pack({}, toy_manifest(), round=1)), "empty_update"),
    "oversized update": (altered(update=bytes(5000)), "budget"),
    "stale round": (altered(update=honest_frame(0)), "round"),
    "future round": (altered(update=honest_frame(2)), "round"),
    "stale usage": (altered(usage=pack_usage(toy_counts(), round=3)), "round"),
    "boastful usage": (
        altered(usage=pack_usage(toy_counts(1, 4000), round=1)),
        "usage_range",
    ),
    "boastful layer": (
        altered(usage=pack_usage(toy_counts(1, 60), round=1)),
        "usage_range",
    ),
    "wrong graph version": (altered(graph_version=4), "graph_version"),
    "no examples": (altered(examples=0), "examples"),
    "negative examples": (altered(examples=-5), "examples"),
    "float examples": (metric(examples=2.5), "reply_shape"),
    "nan examples": (metric(examples=float("nan")), "reply_shape"),
    "bool examples": (metric(examples=True), "reply_shape"),
    "text examples": (metric(examples="8"), "reply_shape"),
    "endless examples": (metric(examples=10**5000), "reply_shape"),
    "no examples key": (metric(examples=None), "reply_shape"),
    "huge tokens": (altered(tokens=10**12), "tokens"),
    "nan loss": (altered(train_loss=float("nan")), "train_loss"),
    "huge loss": (altered(train_loss=1e308), "train_loss"),
    "endless loss": (metric(train_loss=10**400), "reply_shape"),
    "missing update": (arrays(lambda held: held.pop("update")), "reply_shape"),
    "missing usage": (arrays(lambda held: held.pop("usage")), "reply_shape"),
    "wrong stype": (arrays(lambda held: held.update(update=FOREIGN)), "reply_shape"),
    "numbers as payload": (
        of_kind("payload", MetricRecord({"update": 1})),
        "reply_shape",
    ),
    "bytes as payload": (
        of_kind("payload", ConfigRecord({"update": b"x", "usage": b"y"})),
        "reply_shape",
    ),
    "arrays as metrics": (
        of_kind("metrics", ArrayRecord({"graph-version": FOREIGN})),
        "reply_shape",
    ),
    "no records": (empty, "reply_shape"),
    "error": (failure("RuntimeError: out of memory\nTraceback"), "client_error"),
    "error without words": (failure(" \n "), "client_error"),
    "flooding error": (failure("\x1b[31mred\n" * 100_000), "client_error"),
    "no reply": (silence, "no_reply"),
}


@pytest.fixture(scope="module")
def without_attacker(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """The round as it is when the attacker says nothing."""
    federation = Federation(tmp_path_factory.mktemp("honest"))
    federation.run(silence)
    return federation


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_with_its_reason_and_changes_no_bit(
    tmp_path: Path, without_attacker: Federation, name: str
) -> None:
    tamper, reason = ATTACKS[name]
    federation = Federation(tmp_path)
    federation.run(tamper)
    refused = federation.refused()
    assert [(item["client"], item["reason"]) for item in refused] == [
        (ATTACKER, reason)
    ]
    detail = refused[0]["detail"]
    assert 0 < len(detail) <= 2000
    assert all(letter.isprintable() or letter == "\n" for letter in detail)
    assert_same_bits(federation.tensors(), without_attacker.tensors())
    row = metrics_row(federation.reports[0])
    assert (row["clients"], row["refused"]) == (CLIENTS - 1, 1)
    assert row["perplexity"] == {"python": pytest.approx(7.389, abs=1e-3)}


def test_a_round_tells_whom_it_asked_and_what_came(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    events: list[tuple[str, dict[str, Any]]] = []
    found.strategy = SamStrategy(
        found.states[0],
        toy_manifest(),
        found.settings,
        on_round=found._on_round,
        on_event=lambda name, **fields: events.append((name, fields)),
    )
    found.run(failure("out of memory"))
    assert [name for name, _ in events] == ["round_started", "replies", "refused"]
    asked = {"round": 1, "clients": list(range(CLIENTS))}
    assert events[0][1] == asked
    assert events[1][1]["clients"] == [0, 2]
    assert events[2][1]["client"] == ATTACKER
    (report,) = found.reports
    assert list(report.asked) == asked["clients"]
    assert sum(report.asked.values()) == report.bytes_down_all
    assert max(report.asked.values()) == report.bytes_down
    phases = sum(report.seconds[name] for name in ("train", "merge", "evaluate"))
    assert 0 < report.seconds["server"] < phases
    assert [reply.seconds for reply in report.merge.replies] == [0.1, 0.1]


def test_foreign_keys_in_a_reply_are_not_read(tmp_path: Path) -> None:
    honest, other = Federation(tmp_path / "a"), Federation(tmp_path / "b")
    honest.run()
    other.run(arrays(lambda held: held.update(evil=FOREIGN)))
    assert other.refused() == []
    assert_same_bits(honest.tensors(), other.tensors())


def test_a_reply_of_an_unasked_node_is_refused(
    tmp_path: Path, without_attacker: Federation
) -> None:
    federation = Federation(tmp_path)
    federation.run(from_elsewhere)
    found = [(item["client"], item["reason"]) for item in federation.refused()]
    assert found == [(-1, "unasked"), (ATTACKER, "no_reply")]
    assert "999" in federation.refused()[0]["detail"]
    assert_same_bits(federation.tensors(), without_attacker.tensors())


def test_a_second_reply_of_a_node_is_refused(tmp_path: Path) -> None:
    honest, federation = Federation(tmp_path / "a"), Federation(tmp_path / "b")
    honest.run()
    federation.run(lambda request, reply: [reply, *altered(examples=3)(request, reply)])
    found = [(item["client"], item["reason"]) for item in federation.refused()]
    assert found == [(ATTACKER, "duplicate")]
    assert_same_bits(federation.tensors(), honest.tensors())


def test_huge_example_counts_are_capped(tmp_path: Path) -> None:
    few, many = (
        Federation(tmp_path / name, "federation.max_examples=5") for name in "ab"
    )
    few.run(altered(examples=5))
    many.run(altered(examples=2**62))
    assert many.refused() == []
    assert_same_bits(few.tensors(), many.tensors())


def test_later_rounds_go_on_with_the_client_that_was_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "federation.rounds=4")
    federation.run(silence, rounds=(2,))
    assert [bool(federation.refused(n)) for n in (1, 2, 3, 4)] == [False, True] + [
        False
    ] * 2
    assert federation.states[-1].graph.version > 1
    for number, client, mask_LEE in federation.masks:
        expected = federation.states[number - 1].graph.edge_mask_LEE
        assert torch.equal(mask_LEE, expected), (number, client)


def test_a_client_that_kept_up_gets_edits_and_others_the_full_graph(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, "federation.rounds=3")
    sizes = []
    tamper: Tamper = lambda request, reply: sizes.append(
        "graph" in request.content["payload"]
    ) or [reply]
    federation.run(tamper, rounds=(1, 2, 3))
    assert sizes == [True, False, False]
    rows = [metrics_row(report) for report in federation.reports]
    assert rows[0]["bytes_down"] == CLIENTS * rows[0]["bytes_down_per_client"]


def fails_times(times: int) -> Tamper:
    """Silent a number of times, honest after."""
    left = [times]

    def tamper(request: Message, reply: Message) -> list[Message]:
        left[0] -= 1
        return [] if left[0] >= 0 else [reply]

    return tamper


def test_a_round_with_too_few_replies_is_tried_once_more(tmp_path: Path) -> None:
    options = ("federation.rounds=3", f"federation.min_replies={CLIENTS}")
    honest = Federation(tmp_path / "a", *options)
    honest.run()
    federation = Federation(tmp_path / "b", *options)
    federation.run(fails_times(1), rounds=(2,))
    assert (honest.grid.calls, federation.grid.calls) == (3, 4)
    assert_same_bits(federation.tensors(), honest.tensors())
    assert federation.refused(2) == []
    for number, client, mask_LEE in federation.masks:
        expected = federation.states[number - 1].graph.edge_mask_LEE
        assert torch.equal(mask_LEE, expected), (number, client)


def test_a_second_failure_stops_with_the_checkpoint_before_intact(
    tmp_path: Path,
) -> None:
    federation = Federation(
        tmp_path, "federation.rounds=3", f"federation.min_replies={CLIENTS}"
    )
    with pytest.raises(TooFewReplies) as caught:
        federation.run(failure("ValueError: boom\nlines"), rounds=(2,))
    message = str(caught.value)
    for part in ("round 2", "2 valid", "needed are 3", "client 1: ValueError: boom"):
        assert part in message
    assert "--resume" in message and "lines" not in message
    assert federation.grid.calls == 3
    assert federation.strategy.state is federation.states[1]
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    state, _ = load_checkpoint(path, model_fingerprint="toy")
    assert state.round == 1
    assert all(
        torch.equal(state.blocks[key], value)
        for key, value in federation.states[1].blocks.items()
    )
    assert not (tmp_path / "merge_round2.json").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_sampled_clients_depend_on_seed_and_round_alone(
    tmp_path: Path, count: int
) -> None:
    asked = []
    for name in "ab":
        federation = Federation(
            tmp_path / name,
            "federation.rounds=6",
            f"federation.clients_per_round={count}",
        )
        federation.run()
        asked.append([(number, client) for number, client, _ in federation.masks])
        for number, client, mask_LEE in federation.masks:
            expected = federation.states[number - 1].graph.edge_mask_LEE
            assert torch.equal(mask_LEE, expected), (number, client)
    assert asked[0] == asked[1] and len(asked[0]) == 6 * count
    assert len({client for _, client in asked[0]}) > 1


SCORED: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"nll.python": 20.0, "tokens.python": 10}, {"python": 10}),
    ({"nll.evil": 20.0, "tokens.evil": 10}, {}),
    ({"nll.python": float("nan"), "tokens.python": 10}, {}),
    ({"nll.python": float("inf"), "tokens.python": 10}, {}),
    ({"nll.python": -1.0, "tokens.python": 10}, {}),
    ({"nll.python": 1e300, "tokens.python": 10}, {}),
    ({"nll.python": 10**400, "tokens.python": 10}, {}),
    ({"nll.python": 20.0, "tokens.python": 0}, {}),
    ({"nll.python": 20.0, "tokens.python": 10**9}, {}),
    ({"nll.python": 20.0, "tokens.python": 2.5}, {}),
    ({"nll.python": 20.0}, {}),
    ({"nll.python": [1.0], "tokens.python": 10}, {}),
    ({"nll": 20.0, "tokens": 10}, {}),
]


def reply_from(node: int, content: RecordDict) -> Message:
    """An evaluation reply of a node."""
    grid = EmbeddedGrid(ClientApp, [{}] * 10, {})
    request = grid.create_message(RecordDict(), "evaluate", node, "1")
    return Message(content, reply_to=request)


@pytest.mark.parametrize(("metrics", "tokens"), SCORED)
def test_scores_that_cannot_be_are_left_out(
    metrics: dict[str, Any], tokens: dict[str, int]
) -> None:
    content = RecordDict({"metrics": MetricRecord(metrics)})
    found = strategy_module.sum_scores(
        [reply_from(FIRST_NODE, content)],
        nodes={FIRST_NODE},
        domains={"python", "pydoc"},
        most_tokens=100,
    )
    assert {name: score.tokens for name, score in found.items()} == tokens


def test_scores_count_once_for_every_node_that_was_asked() -> None:
    def content(nll: float) -> RecordDict:
        values = {"nll.python": nll, "tokens.python": 10}
        return RecordDict({"metrics": MetricRecord(values)})

    replies = [
        reply_from(102, content(1.0)),
        reply_from(100, content(2.0)),
        reply_from(102, content(40.0)),
        reply_from(109, content(800.0)),
        reply_from(101, RecordDict()),
        reply_from(103, RecordDict({"metrics": ArrayRecord({"nll.python": FOREIGN})})),
    ]
    found = strategy_module.sum_scores(
        replies, nodes={100, 101, 102, 103}, domains={"python"}, most_tokens=10
    )
    assert found["python"].nll == 3.0 and found["python"].tokens == 20


def test_a_client_that_cannot_score_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = EmbeddedGrid(ClientApp, [{}], {})
    request = grid.create_message(RecordDict(), "evaluate", FIRST_NODE, "1")
    failed = Message(Error(2, "ValueError: no text\nlines"), reply_to=request)
    strategy = Federation(tmp_path).strategy
    assert dict(strategy.aggregate_evaluate(4, [failed])) == {}
    (record,) = caplog.records
    assert record.getMessage().startswith("round 4: node 100 has not scored")
    assert record.getMessage().endswith("ValueError: no text")


def answering(answers: list[Any]) -> EmbeddedGrid:
    """A grid whose nodes name these clients (None: an error)."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        answer = answers[int(context.node_config["client"])]
        if answer is None:
            raise ValueError("no shard here")
        content = RecordDict({"metrics": MetricRecord({"client": answer})})
        return Message(content, reply_to=message)

    nodes = [{"client": index} for index in range(len(answers))]
    return EmbeddedGrid(lambda: app, nodes, {})


def test_enrolment_finds_each_client_under_any_node(tmp_path: Path) -> None:
    strategy = Federation(tmp_path).strategy
    strategy.enrol(answering([2, 0, -1, 1, 7, 1.5]))
    assert strategy._clients == {100: 2, 101: 0, 103: 1}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([0, 1, 1, 2], "two nodes hold client 1"),
        ([0, 1, None], r"clients \[2\] are not there .*no shard here"),
        ([0, 1, 5], r"clients \[2\] are not there"),
    ],
)
def test_enrolment_says_what_is_missing(
    tmp_path: Path, answers: list[Any], words: str
) -> None:
    with pytest.raises(FederationError, match=words):
        Federation(tmp_path).strategy.enrol(answering(answers))


def test_enrolment_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategy_module, "ENROL_SECONDS", 0.2)
    with pytest.raises(FederationError, match="1 of 3 clients are connected"):
        Federation(tmp_path).strategy.enrol(answering([0]))
