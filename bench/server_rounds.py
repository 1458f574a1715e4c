"""A server's round without its clients' training: the real strategy and grid.

Run as a script, it runs one round in a process of its own and prints CPU seconds by phase
and memory as JSON: ``python bench/server_rounds.py FRAMES WORK CLIENTS``. FRAMES is a
folder that ``write_replies`` of merge_rounds filled, WORK one for spool and checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from merge_rounds import settings_of, start
from packing_merges import adapter_manifest
from process_memory import memory_bytes

from samv2.federated.checkpoint import save_checkpoint
from samv2.federated.client_round import TrainReply
from samv2.federated.grid import EmbeddedGrid, reply_to_record
from samv2.federated.server_merge import ServerState, broadcast_frame
from samv2.federated.spool import Spool
from samv2.federated.strategy import RoundReport, SamStrategy

ROOT = Path(__file__).resolve().parents[1]
DISTINCT = 20
"""Different replies; clients take them in turn."""


def client_app(folder: Path, spent: list[float]) -> ClientApp:
    """Clients that send what is in the folder; ``spent`` gets the CPU seconds of each."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"client": int(context.node_config["client"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        begin = time.process_time()
        name = int(context.node_config["client"]) % DISTINCT
        reply = TrainReply(
            update=(folder / f"{name}.bin").read_bytes(),
            usage=(folder / f"{name}.usage.bin").read_bytes(),
            graph_version=0,
            examples=20,
            tokens=5120,
            train_loss=3.0,
            seconds=1.0,
        )
        answer = Message(reply_to_record(reply), reply_to=message)
        spent.append(time.process_time() - begin)
        return answer

    return app


def one_round(folder: Path, work: Path, clients: int) -> dict[str, float]:
    """CPU seconds of a round by phase, and how many replies were merged."""
    state = start()
    generator = torch.Generator().manual_seed(0)
    blocks = {
        key: torch.randn(value.shape, generator=generator)
        for key, value in state.blocks.items()
    }
    state, manifest = replace(state, blocks=blocks), adapter_manifest()
    found: dict[str, float] = {}
    begin = time.process_time()
    broadcast_frame(state, manifest)
    found["broadcast"] = time.process_time() - begin

    def on_round(current: ServerState, report: RoundReport) -> None:
        found["replies"] = len(report.merge.replies)
        now = time.process_time()
        save_checkpoint(work / "checkpoints", current, model_fingerprint="bench")
        found["checkpoint"] = time.process_time() - now

    settings = settings_of(
        f"federation.clients={clients}", "federation.eval_every=1000000"
    )
    spent: list[float] = []
    grid = EmbeddedGrid(
        partial(client_app, folder, spent),
        [{"client": index} for index in range(clients)],
        {},
    )
    spool = Spool(work / "spool")
    strategy = SamStrategy(state, manifest, settings, on_round=on_round, spool=spool)
    strategy.enrol(grid)
    begin = time.process_time()
    strategy._one_round(grid, 3600.0)
    found["round"] = time.process_time() - begin - sum(spent)
    return found


def round_elsewhere(folder: Path, work: Path, clients: int) -> dict[str, float]:
    """What this file prints as a script."""
    command = [sys.executable, __file__, str(folder), str(work), str(clients)]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout)


def main() -> None:
    torch.set_num_threads(1)
    folder, work, clients = sys.argv[1:]
    before = memory_bytes("VmRSS")
    found = one_round(Path(folder), Path(work), int(clients))
    most = memory_bytes("VmHWM")
    print(json.dumps(found | {"grown_MB": (most - before) / 1e6}))


if __name__ == "__main__":
    main()
