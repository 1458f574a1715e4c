"""Every error the product raises on purpose derives from :class:`SamError`.

A message names the thing, the value it had, the value it needed, and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence


class SamError(Exception):
    """Base of all errors that SAM-v2 raises on purpose."""


class ConfigError(SamError):
    """One or more settings are wrong; ``faults`` lists all of them.

    Args:
        faults: one sentence per wrong setting.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{len(self.faults)} setting(s) need a change:\n{lines}")


class ModelError(SamError):
    """A model cannot be loaded, converted, saved or exported as asked."""


class DataError(SamError):
    """Text is missing, empty, or cannot be divided as asked."""


class FetchError(SamError):
    """A download failed: no network, or the bytes are not the expected ones."""


class GraphError(SamError):
    """An expert graph, mask or edit breaks the graph's invariants."""


class CheckpointError(SamError):
    """A run directory or checkpoint is missing, damaged, or of another run."""


class FederationError(SamError):
    """A federated run cannot go on, e.g. too few valid replies in a round."""


class FrameError(SamError):
    """A packed frame was refused.

    Args:
        reason: machine-readable slug, e.g. ``"truncated"`` or ``"body_hash"``.
        message: the same for a person: what was found and what was expected.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"{message} [{reason}]")
