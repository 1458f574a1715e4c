"""Workers of Flower's simulation that come back when they die.

Flower 1.41 gives a worker (a Ray actor) back to its pool whatever became of it. One that
was killed, by the kernel for want of memory say, fails every message at once, is idle
again at once, and so takes most messages of all later rounds: the run goes on with ever
fewer replies and calls itself complete. Ray can restart an actor and repeat the call that
died with it, but Flower has no setting for that.

A call may be repeated: a round's work depends on its message and on the client's state
of an earlier round alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.metadata import version

log = logging.getLogger(__name__)

KNOWN = "1.41."
"""Versions of flwr whose engine was read."""
ENGINE = "flwr.server.superlink.fleet.vce.vce_api"
RESTARTS = -1
"""Of a worker: as often as needed."""
RETRIES = 1
"""Of a message whose worker died. A client that dies of its own work, again and again, is
reported after the second death as one that failed."""


def revive_workers() -> bool:
    """Let Ray restart the workers of the simulation in this process, if there is one.

    Has to be called before the engine makes its workers: where the client app is made,
    which the engine loads first.

    Returns:
        Whether workers will be restarted; False also where no simulation runs here.
    """
    if ENGINE not in sys.modules:
        return False
    found = version("flwr")
    try:
        import ray
        from flwr.server.superlink.fleet.vce.backend import raybackend
        from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor

        current = raybackend.ClientAppActor
    except (ImportError, AttributeError) as error:
        current, found = None, f"{found} ({error})"
    if current is None or not found.startswith(KNOWN):
        log.warning(
            "flwr is %s, known is %sx: a simulation worker that dies is not restarted, "
            "and later rounds lose the messages it is given",
            found,
            KNOWN,
        )
        return False

    class RevivedActor(VirtualClientEngineActor):
        """Flower's worker, made with other options."""

        def __init__(self, on_actor_init_fn: Callable[[], None] | None = None) -> None:
            super().__init__()
            if on_actor_init_fn is not None:
                on_actor_init_fn()

        @ray.method(max_task_retries=0)
        def terminate(self) -> None:
            """End it for good: nothing is repeated."""
            super().terminate()

    raybackend.ClientAppActor = ray.remote(
        max_restarts=RESTARTS, max_task_retries=RETRIES
    )(RevivedActor)
    return True
