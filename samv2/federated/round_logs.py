"""Everything that a finished round leaves in the run directory, in one call."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from samv2.common.event_log import EventLog
from samv2.common.settings import Settings
from samv2.common.telemetry import METRICS, MetricsLog, RowsFile, read_rows
from samv2.federated.client_rows import CLIENTS, client_rows
from samv2.federated.round_board import write_board
from samv2.federated.run_logs import (
    USAGE,
    append_pack_sizes,
    keep_counts,
    keep_frames,
    metrics_row,
    usage_row,
    write_merge,
)
from samv2.federated.server_merge import ServerState
from samv2.federated.strategy import RoundReport
from samv2.updates.packing import Manifest

Rows = tuple[dict[str, Any], list[dict[str, Any]]]
"""A round's object of ``metrics.jsonl``, and its clients' of ``clients.jsonl``."""


class RoundLogs:
    """Writes the files of rounds; rounds that will be run again are dropped from them.

    Args:
        root: the run directory.
        settings: of the run.
        manifest: of the blocks.
        events: of the run.
        first_biases_LE: (L, E) gate biases of the bootstrapped model.
        keep_rounds: rounds that an earlier start of the run has completed.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        manifest: Manifest,
        events: EventLog,
        *,
        first_biases_LE: Tensor,
        keep_rounds: int,
    ) -> None:
        self._root = root
        self._settings = settings
        self._manifest = manifest
        self._events = events
        self._first_biases_LE = first_biases_LE
        self._usage = RowsFile(root / USAGE, keep_rounds=keep_rounds)
        self._clients = RowsFile(root / CLIENTS, keep_rounds=keep_rounds)
        self._metrics = MetricsLog(root, keep_rounds=keep_rounds)

    def write(self, state: ServerState, report: RoundReport) -> Rows:
        """Write a round down, all but its checkpoint.

        The time that this takes counts as the server's in ``metrics.jsonl``.
        """
        begin = time.perf_counter()
        root, merge = self._root, report.merge
        write_merge(root, merge, report.drift.changes)
        append_pack_sizes(root, merge, self._manifest)
        self._usage.write(usage_row(merge))
        if self._settings.federation.keep_frames:
            keep_frames(root, merge)
            keep_counts(root, report.drift.frames, round=merge.round)
        clients = client_rows(
            merge, self._manifest, asked=report.asked, waited=report.waited
        )
        self._clients.write({"round": merge.round, "clients": clients})
        write_board(
            self._metrics.writer,
            state,
            merge,
            clients,
            first_biases_LE=self._first_biases_LE,
            all_clients=self._settings.federation.clients,
        )
        row = metrics_row(report)
        row["seconds"]["server"] += time.perf_counter() - begin
        self._metrics.write(row)
        self._tell(report, row)
        return row, clients

    def _tell(self, report: RoundReport, row: dict[str, Any]) -> None:
        merge = report.merge
        if merge.edits:
            edits = [
                [edit.layer, edit.src, edit.dst, edit.kind] for edit in merge.edits
            ]
            self._events.event("edits", round=merge.round, edits=edits)
        for change in report.drift.changes:
            self._events.event("sibling", round=merge.round, **asdict(change))
        self._events.event("round_finished", **row)

    def close(self) -> None:
        """Close the TensorBoard file."""
        self._metrics.close()


def read_rounds(root: Path) -> list[Rows]:
    """Rows of all rounds that a run has logged, with their clients where known."""
    clients = {row["round"]: row["clients"] for row in read_rows(Path(root) / CLIENTS)}
    rows = read_rows(Path(root) / METRICS)
    return [(row, clients.get(row["round"], [])) for row in rows]
