"""A round's messages out and its replies in, one by one, on whichever grid runs.

The embedded grid streams by itself. Flower's grids are asked for one reply after the
other: so one reply at a time is in memory, and one that cannot even be read costs
nobody else's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from samv2.common.errors import FrameError
from samv2.federated.grid import Again, EmbeddedGrid
from samv2.federated.refusals import refusal
from samv2.federated.server_merge import Refusal, ValidReply
from samv2.federated.workers import LATE, NO_REPLY, UNREADABLE, failed

log = logging.getLogger(__name__)

PULL_SECONDS = 2.0
"""For fetching a reply that has been announced, before others are looked at meanwhile: a
node that dies while it uploads can hold up Flower's fetching for minutes."""
PULLS = 64
"""Replies that are fetched at once at most."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 3.0
"""Seconds from one look for replies to the next; longer while nothing comes."""
REASONS = {LATE: "late", NO_REPLY: "no_reply", UNREADABLE: "unreadable"}


class Exchange:
    """Sends messages and yields replies; remembers which never came.

    A reply that comes after its deadline is dropped. On Flower's grids it shows in a
    later exchange, see :meth:`late_refusals`.
    """

    def __init__(self) -> None:
        self._overdue: dict[str, Message] = {}
        self._late: list[Message] = []
        self._pulls: dict[str, Future[Message | None]] = {}

    def late_refusals(self, clients: Mapping[int, int]) -> list[Refusal]:
        """Of training replies that came after their deadline, since last asked.

        Args:
            clients: {node id: client}.
        """
        late, self._late = self._late, []
        return [
            refusal(
                clients.get(item.metadata.dst_node_id, -1),
                "late",
                f"a reply to round {item.metadata.group_id} came after its deadline",
            )
            for item in late
            if item.metadata.message_type == MessageType.TRAIN
        ]

    def stream(
        self,
        grid: Grid,
        messages: Iterable[Message],
        *,
        timeout: float,
        again: Again | None = None,
    ) -> Iterator[Message]:
        """Replies as they come, until all are there or the deadline.

        Args:
            grid: to send on.
            messages: one per client.
            timeout: seconds from now.
            again: asked about every reply that comes in time, see :data:`Again`.
        """
        if isinstance(grid, EmbeddedGrid):
            yield from grid.stream(messages, timeout=timeout, again=again)
        else:
            yield from self._poll(grid, list(messages), timeout, again)

    def _poll(
        self, grid: Grid, messages: list[Message], timeout: float, again: Again | None
    ) -> Iterator[Message]:
        deadline = time.monotonic() + timeout
        waiting: dict[str, Message] = {}
        yield from _push(grid, messages, waiting)
        messages.clear()
        pause = FIRST_PAUSE
        try:
            while waiting:
                came = False
                for number in [*self._overdue, *waiting]:
                    asked = self._overdue.get(number) or waiting[number]
                    left = max(0.0, deadline - time.monotonic())
                    reply = self._fetch(grid, number, asked, min(PULL_SECONDS, left))
                    if reply is None:
                        continue
                    came = True
                    if self._overdue.pop(number, None) is not None:
                        self._late += [asked] if reply.has_content() else []
                        continue
                    del waiting[number]
                    on_time = again is not None and time.monotonic() < deadline
                    repeated = again(reply) if again and on_time else None
                    if repeated is None:
                        yield reply
                    else:
                        yield from _push(grid, [repeated], waiting)
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                pause = FIRST_PAUSE if came else min(2 * pause, LONGEST_PAUSE)
                time.sleep(min(pause, left) if waiting else 0)
        finally:
            self._overdue |= waiting

    def _fetch(
        self, grid: Grid, number: str, asked: Message, patience: float
    ) -> Message | None:
        """A reply, if it is there and can be fetched soon; else ask again later."""
        pull = self._pulls.get(number)
        if pull is None:
            if len(self._pulls) >= PULLS:
                return None
            pull = _in_thread(lambda: _pull(grid, number, asked))
            self._pulls[number] = pull
            wait([pull], timeout=patience)
        if not pull.done():
            return None
        del self._pulls[number]
        return pull.result()


def _in_thread(work: Callable[[], Message | None]) -> Future[Message | None]:
    """Do it in a thread; the process may end before it. (Threads of Flower's own that
    fetch parts of a reply are waited for.)"""
    future: Future[Message | None] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _push(
    grid: Grid, messages: list[Message], waiting: dict[str, Message]
) -> Iterator[Message]:
    """Send, and note what was sent without its content; yields what could not be."""
    numbers = list(grid.push_messages(messages))
    for index, message in enumerate(messages):
        number = numbers[index] if index < len(numbers) else None
        if number is None:
            yield failed(message, "the request could not be sent", NO_REPLY)
        else:
            waiting[number] = Message(content=RecordDict(), metadata=message.metadata)


def _pull(grid: Grid, number: str, asked: Message) -> Message | None:
    """One reply, under the name of the node that was asked, whatever it says itself."""
    try:
        found = list(grid.pull_messages([number]))
    except Exception as error:  # noqa: BLE001 - a reply's bytes can raise anything
        if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
            raise  # the link is down, which is no client's doing
        detail = f"the reply cannot be read ({type(error).__name__}: {error})"
        return failed(asked, detail, UNREADABLE)
    if not found:
        return None
    if found[0].has_content():
        return Message(found[0].content, reply_to=asked)
    return Message(found[0].error, reply_to=asked)


def sort_replies(
    replies: Iterable[Message],
    nodes: Mapping[int, int],
    check: Callable[[int, Message], ValidReply],
) -> tuple[list[ValidReply], list[Refusal]]:
    """Check replies one by one; name each client that failed or stayed silent.

    Args:
        replies: untrusted, in any order.
        nodes: {node id: client} of those asked; the first reply of each counts.
        check: (client, reply) to what is valid; raises FrameError for what is not.
    """
    silent = dict(nodes)
    valid: list[ValidReply] = []
    refusals: list[Refusal] = []
    for message in replies:
        node = message.metadata.src_node_id
        client = silent.pop(node, None)
        if node not in nodes:
            refusals.append(refusal(-1, "unasked", f"node {node} was not asked"))
        elif client is None:
            detail = "this client had already replied; its first reply counts"
            refusals.append(refusal(nodes[node], "duplicate", detail))
        elif message.has_error():
            refusals.append(error_refusal(client, message))
        else:
            try:
                valid.append(check(client, message))
            except FrameError as error:
                detail = str(error).removesuffix(f" [{error.reason}]")
                refusals.append(refusal(client, error.reason, detail))
    refusals += [
        refusal(client, "no_reply", "no reply in time") for client in silent.values()
    ]
    return valid, refusals


def error_refusal(client: int, message: Message) -> Refusal:
    """The refusal that an error message amounts to."""
    reason = REASONS.get(message.error.code, "client_error")
    return refusal(client, reason, message.error.reason or "the client gave no reason")


def first_line(reply: Message) -> str:
    """Why a reply is none, in one line."""
    if not reply.has_error():
        return f"node {reply.metadata.src_node_id} names no client"
    return refusal(-1, "client_error", reply.error.reason or "").detail.splitlines()[0]


def reported_scores(
    server_round: int, replies: Iterable[Message]
) -> dict[int, Mapping[str, Any]]:
    """{node: the numbers of its evaluation}, untrusted; errors go to the log.

    The first reply of a node counts.
    """
    found: dict[int, Mapping[str, Any]] = {}
    for message in replies:
        node = message.metadata.src_node_id
        if message.has_error():
            log.warning(
                "round %d: node %d has not scored its held-out text: %s",
                server_round,
                node,
                first_line(message),
            )
        else:
            found.setdefault(node, message.content.get("metrics") or {})
    return found
