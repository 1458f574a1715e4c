"""Where a round's frames wait for the merge: files, so that memory need not hold them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from samv2.federated.server_merge import ValidReply
from samv2.updates.stored import Stored, read_frame


class Spool:
    """Keeps the frames of valid replies until a round is merged and logged.

    Files are not flushed to disk: a round that is interrupted is asked for anew.

    Args:
        folder: is made where needed and removed by :meth:`empty`, also if an earlier
            start has left it; None keeps frames in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.empty()

    def keep(self, reply: ValidReply) -> ValidReply:
        """The reply with its frames where this spool keeps them."""
        item = reply.contribution
        update = self._store(f"client_{item.client:06d}.bin", item.data)
        usage = self._store(f"client_{item.client:06d}.usage.bin", reply.usage)
        return replace(reply, contribution=replace(item, data=update), usage=usage)

    def empty(self) -> None:
        """Forget all frames."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _store(self, name: str, frame: Stored) -> Stored:
        if self._folder is None:
            return frame
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        path.write_bytes(read_frame(frame))
        return path
