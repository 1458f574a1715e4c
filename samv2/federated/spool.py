"""Where a round's frames wait for the merge: files, so that memory need not hold them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from samv2.federated.server_merge import ValidReply


class Spool:
    """Keeps the frames of valid replies until a round is merged and logged.

    Args:
        folder: is made where needed and removed by :meth:`empty`; None keeps frames in
            memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.empty()

    def keep(self, reply: ValidReply) -> ValidReply:
        """The reply with its frames as this spool keeps them."""
        return reply

    def empty(self) -> None:
        """Forget all frames."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
