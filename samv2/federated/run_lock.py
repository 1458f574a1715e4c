"""One server at a time in a run directory.

The system drops the lock when its process ends, however it ends, so nothing stale is
left behind by a server that was killed.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samv2.common.errors import CheckpointError
from samv2.common.settings import Settings
from samv2.federated.run_folder import RunFolder, check_flags, open_run

log = logging.getLogger(__name__)

LOCK = "server.lock"
WAIT_SECONDS = 60.0
"""A server whose SuperLink was killed, or a grid's worker, may live on for a while."""


@contextmanager
def sole_server(root: Path, *, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold a run directory as its only server.

    Args:
        root: the directory; made if needed.
        wait: seconds that another server is waited for.

    Raises:
        CheckpointError: another process holds the directory.
    """
    root.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    with (root / LOCK).open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise CheckpointError(
                        f"{root} is in use by another server ({LOCK} is held); wait "
                        "until that run ends, stop it (in Flower: `flwr ls`, `flwr stop "
                        "RUN_ID`), or choose another folder (--log-dir; in Flower "
                        "run-dir)"
                    ) from None
            except OSError as error:  # a file system without locks
                log.warning(
                    "%s cannot be locked (%s); start one server only", root, error
                )
                break
            time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
        yield


@contextmanager
def sole_run(
    root: Path, settings: Settings, *, resume: bool, overwrite: bool, wait: float = 0.0
) -> Iterator[RunFolder]:
    """Hold a run directory, opened, as its only server.

    Nothing in the directory is touched before it is held. Arguments are those of
    :func:`open_run`, and ``wait`` of :func:`sole_server`.

    Raises:
        CheckpointError: another process holds the directory, or :func:`open_run`
            refuses it.
    """
    check_flags(root, resume=resume, overwrite=overwrite)
    with sole_server(Path(root), wait=wait):
        yield open_run(root, settings, resume=resume, overwrite=overwrite)
