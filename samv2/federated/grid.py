"""Messages as Flower records, and the embedded grid that drives client apps in turn.

The embedded grid hands the same messages to the same ``ClientApp`` as Flower's own
engines do, in this process or in worker processes of one torch thread each. A client's
result depends on its message alone, so the bits do not depend on how many workers run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from flwr.app import (
    DEFAULT_TTL,
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from samv2.common.errors import FederationError, FrameError
from samv2.common.settings import FederationSettings
from samv2.common.threads import one_thread
from samv2.experts.sub_graph import SubGraph
from samv2.federated.client_round import RoundRequest, TrainReply
from samv2.federated.graph_message import GraphMessage, edits_from_json, edits_to_json
from samv2.federated.workers import LATE, NO_REPLY, Worker, answer, failed

FRAME_STYPE = "samv2.frame.v1"
GRAPH_STYPE = "samv2.graph.v1"
MEMORY_BUDGET, FLOPS_BUDGET = "memory-budget-bytes", "flops-budget"
"""Keys under which a client says what it can hold and compute."""
RUN_ID = 1
SERVER_NODE = 1
FIRST_NODE = 100
OnReply = Callable[[str, int, int], None]
"""Called with (message type, replies so far, messages sent)."""
Again = Callable[[Message], Message | None]
"""Called with a reply; a message that it returns is sent, and the reply forgotten."""
PATIENCE = FederationSettings().round_timeout
"""Deadlines from here on do not bind clients in this process, see `EmbeddedGrid`."""


def request_to_record(request: RoundRequest) -> RecordDict:
    """A round's request as a Flower record."""
    arrays = {"parameters": _array(request.parameters, FRAME_STYPE)}
    if request.graph.full is not None:
        arrays["graph"] = _array(request.graph.full, GRAPH_STYPE)
    config = ConfigRecord(
        {
            "round": request.round,
            "graph-version": request.graph.version,
            "edits": edits_to_json(request.graph.edits),
            "temperature": request.temperature,
        }
    )
    if request.part is not None:
        config["part"] = request.part.to_json()
    if request.told is not None:
        config["told"] = request.told
    return RecordDict({"payload": ArrayRecord(arrays), "config": config})


def request_from_record(record: RecordDict) -> RoundRequest:
    """The inverse of :func:`request_to_record`."""
    config, payload = record["config"], record["payload"]
    full = _bytes(payload["graph"], GRAPH_STYPE) if "graph" in payload else None
    return RoundRequest(
        round=int(config["round"]),
        graph=GraphMessage(
            version=int(config["graph-version"]),
            full=full,
            edits=edits_from_json(str(config["edits"])),
        ),
        parameters=_bytes(payload["parameters"], FRAME_STYPE),
        part=SubGraph.from_json(str(config["part"])) if "part" in config else None,
        temperature=float(config["temperature"]),
        told=int(config["told"]) if "told" in config else None,
    )


def reply_to_record(reply: TrainReply) -> RecordDict:
    """A client's reply as a Flower record."""
    arrays = {
        "update": _array(reply.update, FRAME_STYPE),
        "usage": _array(reply.usage, FRAME_STYPE),
    }
    metrics = MetricRecord(
        {
            "graph-version": reply.graph_version,
            "examples": reply.examples,
            "tokens": reply.tokens,
            "train-loss": reply.train_loss,
            "seconds": reply.seconds,
        }
    )
    return RecordDict({"payload": ArrayRecord(arrays), "metrics": metrics})


def reply_from_record(record: RecordDict) -> TrainReply:
    """Read an untrusted reply.

    Raises:
        FrameError: ``reply_shape`` where a record, array or number is missing or of
            another kind.
    """
    try:
        payload, metrics = record["payload"], record["metrics"]
        return TrainReply(
            update=_bytes(payload["update"], FRAME_STYPE),
            usage=_bytes(payload["usage"], FRAME_STYPE),
            graph_version=_whole(metrics["graph-version"]),
            examples=_whole(metrics["examples"]),
            tokens=_whole(metrics["tokens"]),
            train_loss=_real(metrics["train-loss"]),
            seconds=_real(metrics["seconds"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FrameError(
            "reply_shape",
            f"the reply is not of the agreed shape ({type(error).__name__}: {error})",
        ) from None


def counts_request(round: int) -> RecordDict:
    """The content of a query that asks for token counts of the text in a round."""
    wanted = ConfigRecord({"token-counts": True, "round": round})
    return RecordDict({"wanted": wanted})


def wants_counts(record: RecordDict) -> bool:
    """Whether a query asks for token counts."""
    return "wanted" in record and bool(record["wanted"].get("token-counts"))


def asked_round(record: RecordDict) -> int:
    """The round that a query is about; the first where it names none."""
    return int(record["wanted"].get("round", 1)) if "wanted" in record else 1


def counts_to_record(frame: bytes) -> ArrayRecord:
    """A client's token counts as a Flower record."""
    return ArrayRecord({"counts": _array(frame, FRAME_STYPE)})


def counts_from_record(record: Mapping[str, Any]) -> bytes:
    """Read an untrusted frame of token counts.

    Raises:
        FrameError: ``reply_shape`` where it is missing or of another kind.
    """
    try:
        return _bytes(record["counts"]["counts"], FRAME_STYPE)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FrameError(
            "reply_shape", f"the token counts are not of the agreed shape ({error})"
        ) from None


def message_to(
    grid: Grid, node: int, content: RecordDict, message_type: str, group: str
) -> Message:
    """A message from the server to a node, on whichever grid runs."""
    if isinstance(grid, EmbeddedGrid):
        return grid.create_message(content, message_type, node, group)
    return Message(content, node, message_type, group_id=group)


def _array(data: bytes, stype: str) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)


def _bytes(array: Array, stype: str) -> bytes:
    if array.stype != stype:
        raise ValueError(f"an array has stype {array.stype!r}, expected {stype!r}")
    return bytes(array.data)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"a {type(value).__name__} is not a whole number")
    if not -(2**63) <= value < 2**63:
        raise ValueError("a whole number is beyond 64 bits")
    return value


def _real(value: Any) -> float:
    if isinstance(value, float):
        return value
    return float(_whole(value))


class EmbeddedGrid(Grid):
    """A Flower grid inside this process.

    Args:
        make_app: makes the client app; must be picklable where ``workers`` > 1 (each
            worker process makes its own).
        node_configs: one per client; node ids follow their order.
        run_config: Flower's run config, the same for all clients.
        workers: processes; 1 runs clients in this one.
        on_reply: told after every reply how many of how many have come, and what was
            asked.

    A worker that dies or is late is replaced. A client in this process cannot be
    interrupted: with a deadline below the default of ``federation.round_timeout`` its
    reply is dropped when it comes too late; from the default on it is waited for.

    Use it as a context manager: leaving the block ends the workers.
    """

    def __init__(
        self,
        make_app: Callable[[], ClientApp],
        node_configs: Sequence[dict[str, Any]],
        run_config: dict[str, Any],
        *,
        workers: int = 1,
        on_reply: OnReply | None = None,
    ) -> None:
        self._contexts = {
            FIRST_NODE
            + index: Context(
                run_id=RUN_ID,
                node_id=FIRST_NODE + index,
                node_config=config,
                state=RecordDict(),
                run_config=run_config,
            )
            for index, config in enumerate(node_configs)
        }
        self._make_app = make_app
        self._app: ClientApp | None = None
        self._on_reply = on_reply
        self._sent = 0
        count = min(workers, len(self._contexts))
        self._workers = (
            [Worker(make_app, number) for number in range(count)] if count > 1 else []
        )

    def __enter__(self) -> EmbeddedGrid:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def set_run(self, run: Any) -> None:
        """Not needed: the grid serves one run."""

    @property
    def run(self) -> Any:
        """The grid serves one run that has no Flower record."""
        raise FederationError("the embedded grid has no Flower run record")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one client."""
        self._sent += 1
        metadata = Metadata(
            run_id=RUN_ID,
            message_id=f"{self._sent}",
            src_node_id=SERVER_NODE,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or DEFAULT_TTL,
            message_type=message_type,
            src_task_id=None,
            dst_task_id=None,
        )
        return Message(content=content, metadata=metadata)

    def get_node_ids(self) -> list[int]:
        """All clients, in order."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Not offered: replies come with :meth:`stream`."""
        raise FederationError("the embedded grid sends and receives in one call")

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Not offered: replies come with :meth:`stream`."""
        raise FederationError("the embedded grid sends and receives in one call")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """All of :meth:`stream`."""
        return list(self.stream(messages, timeout=timeout))

    def stream(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        again: Again | None = None,
    ) -> Iterator[Message]:
        """Replies as they come, one for each message, errors as error messages.

        Args:
            messages: one per client.
            timeout: seconds after which running workers are given up and replaced.
            again: asked about every reply that comes in time, see :data:`Again`.
        """
        queue = deque(messages)
        total, done = len(queue), 0
        what = queue[0].metadata.message_type if queue else ""
        answers = self._in_workers if self._workers else self._in_turn
        for reply in answers(queue, timeout, again or (lambda reply: None)):
            done += 1
            if self._on_reply is not None:
                self._on_reply(what, done, total)
            yield reply

    def _in_turn(
        self, queue: deque[Message], timeout: float | None, again: Again
    ) -> Iterator[Message]:
        bound = timeout if timeout is not None and timeout < PATIENCE else None
        deadline = None if bound is None else time.monotonic() + bound
        while queue:
            message = queue.popleft()
            if _left(deadline) == 0:
                yield failed(message, "not started in time", NO_REPLY)
                continue
            reply = self._here(message)
            if _left(deadline) == 0:
                detail = f"the reply came after the {bound:g} s of its deadline"
                yield failed(message, detail, LATE)
            elif (repeated := again(reply)) is not None:
                queue.append(repeated)
            else:
                yield reply

    def _here(self, message: Message) -> Message:
        if self._app is None:
            self._app = self._make_app()
        with one_thread():
            return answer(self._app, message, self._context(message))

    def _context(self, message: Message) -> Context:
        return self._contexts[message.metadata.dst_node_id]

    def _in_workers(
        self, queue: deque[Message], timeout: float | None, again: Again
    ) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        idle = list(self._workers)
        busy: dict[Connection, tuple[Worker, Message]] = {}
        try:
            while queue or busy:
                self._hand_out(queue, idle, busy)
                ready = wait(list(busy), _left(deadline))
                if not ready:
                    break
                replies = []
                for connection in ready:
                    worker, message = busy.pop(connection)
                    idle.append(worker)
                    reply = worker.receive(message)
                    repeated = None if _left(deadline) == 0 else again(reply)
                    queue.extend([] if repeated is None else [repeated])
                    replies += [reply] if repeated is None else []
                self._hand_out(queue, idle, busy)  # they work while replies are read
                yield from replies
            missing = [message for _, message in busy.values()]
        finally:
            for worker, _ in busy.values():
                worker.stop()
        for message in missing:
            yield failed(message, f"no reply within {timeout:g} s", NO_REPLY)
        for message in queue:
            yield failed(message, "not started in time", NO_REPLY)

    def _hand_out(
        self,
        queue: deque[Message],
        idle: list[Worker],
        busy: dict[Connection, tuple[Worker, Message]],
    ) -> None:
        while queue and idle:
            worker, message = idle.pop(), queue.popleft()
            worker.send(message, self._context(message))
            busy[worker.connection] = (worker, message)


def _left(deadline: float | None) -> float | None:
    """Seconds to a deadline, 0 after it; None where there is none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
