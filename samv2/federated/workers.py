"""Client apps in processes of their own: one that dies or hangs costs its one reply."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from samv2.common.devices import device_named, number_process
from samv2.common.settings import Settings

CLIENT_FAILED = 2
"""Flower's error code for an exception in the client app."""
NO_REPLY, LATE, UNREADABLE = 101, 102, 103
"""Of errors that this side states: nothing came, too late, or not as a message."""


def worker_count(settings: Settings) -> int:
    """Processes that the embedded engine works with.

    Raises:
        ConfigError: ``train.device`` names a GPU that is not there.
    """
    device = device_named(settings.train.device)
    if settings.federation.workers:
        return settings.federation.workers
    if device.type == "cuda":
        on_any = settings.train.device in ("auto", "cuda")
        return torch.cuda.device_count() if on_any else 1
    return os.cpu_count() or 1


class Worker:
    """One process that answers messages until its pipe closes.

    Args:
        make_app: makes the client app, in the process.
        number: of the worker; its GPU, where there are some and it is left to choose.
    """

    def __init__(self, make_app: Callable[[], ClientApp], number: int = 0) -> None:
        self._make_app = make_app
        self._number = number
        self._process: SpawnProcess | None = None
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(self._make_app, self._number, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, message: Message, context: Context) -> None:
        """Hand over one message; a worker that was stopped or has died starts anew."""
        if self._process is None:
            self._start()
        try:
            self.connection.send((message, context))
        except OSError:
            self.stop()
            self._start()
            with suppress(OSError):  # a second death shows when the reply is received
                self.connection.send((message, context))

    def receive(self, message: Message) -> Message:
        """The reply to ``message``, or an error message if the worker died over it."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            code = self.stop()
            return failed(message, f"the worker process died (exit code {code})")

    def stop(self) -> int | None:
        """End the process; returns its exit code if it had ended by itself."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        self.connection.close()
        process.join(0.5)
        code = process.exitcode
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
        return code


def _serve(
    make_app: Callable[[], ClientApp], number: int, connection: Connection
) -> None:
    """A worker's main loop; an interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    number_process(number)
    app = make_app()
    while True:
        try:
            message, context = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(answer(app, message, context))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """The app's reply; an exception becomes an error message, as in Flower's engines.

    An app that returns nothing would keep Flower's engines waiting until the deadline;
    here it is an error at once.
    """
    try:
        reply = app(message, context)
    except Exception as error:  # noqa: BLE001 - whatever a client does ends here
        detail = traceback.format_exc(limit=3)
        return failed(message, f"{type(error).__name__}: {error}\n{detail}")
    if reply is None:
        return failed(message, "the client gave no reply", NO_REPLY)
    return reply


def failed(message: Message, reason: str, code: int = CLIENT_FAILED) -> Message:
    """An error in place of the reply to a message."""
    return Message(Error(code, reason), reply_to=message)
