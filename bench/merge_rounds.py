"""A round's replies in files, merged as the server does it.

Run as a script, it merges them in a process of its own and prints seconds and memory as
JSON: ``python bench/merge_rounds.py FOLDER CLIENTS [held] [KEY=VALUE ...]``; ``held``
keeps all frames in memory. Seconds are of CPU time, reading the files included: other
processes on the machine take time on the clock.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from packing_merges import (
    ADAPTERS,
    BLOCKS,
    CLIENTS,
    EXPERT_BLOCK,
    EXPERTS,
    LAYERS,
    adapter_manifest,
    contributions,
)
from packing_speed import ROUND
from process_memory import memory_bytes

from samv2.common.config import load_settings
from samv2.common.settings import Settings
from samv2.experts.graph import ExpertGraph
from samv2.federated.server_merge import (
    ServerState,
    ValidReply,
    initial_state,
    server_merge,
)
from samv2.federated.usage import EdgeCounts, pack_usage
from samv2.updates.aggregate import Contribution
from samv2.updates.stored import Stored

INDEX = "replies.json"
KEY = bytes(32)
HELD = "held"


def write_replies(folder: Path, clients: int = CLIENTS) -> None:
    """The budget's experts and usage counts of every client, and an index of them."""
    rows = []
    for item in contributions(ADAPTERS[0], clients):
        (folder / f"{item.client}.bin").write_bytes(item.read())
        generator = torch.Generator().manual_seed(item.client)
        shape = (LAYERS, EXPERTS, EXPERTS)
        usage, demand = (
            torch.randint(500, shape, generator=generator).triu() for _ in range(2)
        )
        counts = EdgeCounts(usage_LEE=usage, demand_LEE=demand)
        frame = pack_usage(counts, round=ROUND)
        (folder / f"{item.client}.usage.bin").write_bytes(frame)
        rows.append([item.client, item.weight, list(item.expert_ids)])
    (folder / INDEX).write_text(json.dumps(rows))


def read_replies(folder: Path, clients: int, *, held: bool = False) -> list[ValidReply]:
    """Replies whose frames stay in their files, unless they are ``held`` in memory."""

    def stored(name: str) -> Stored:
        return (folder / name).read_bytes() if held else folder / name

    return [
        ValidReply(
            contribution=Contribution(
                client=client,
                data=stored(f"{client}.bin"),
                weight=weight,
                expert_ids=tuple(expert_ids),
            ),
            usage=stored(f"{client}.usage.bin"),
            edge_visits=1,
            bytes_up=1,
            train_loss=1.0,
            tokens=5120,
        )
        for client, weight, expert_ids in json.loads((folder / INDEX).read_text())
        if client < clients
    ]


def start() -> ServerState:
    """The server before the round: SmolLM2's blocks, and a graph of chains."""
    blocks = {key: torch.zeros(EXPERT_BLOCK) for key in range(BLOCKS)}
    mask_EE = torch.eye(EXPERTS).bool() | torch.ones(EXPERTS - 1).diag(1).bool()
    order_LE = torch.arange(EXPERTS).repeat(LAYERS, 1)
    mask_LEE = mask_EE.repeat(LAYERS, 1, 1)
    graph = ExpertGraph(edge_mask_LEE=mask_LEE, order_LE=order_LE, version=0)
    return replace(initial_state(blocks, graph), round=ROUND - 1)


def settings_of(*overrides: str) -> Settings:
    """The product's defaults on this graph."""
    return load_settings(
        None,
        [
            f"experts.num_experts={EXPERTS}",
            "experts.experts_per_token=4",
            "assembler.width=0",
            f"federation.clients={CLIENTS}",
            *overrides,
        ],
    )


def merge(replies: list[ValidReply], settings: Settings) -> ServerState:
    """The state after the round."""
    state, _ = server_merge(start(), replies, [], adapter_manifest(), settings, key=KEY)
    return state


def merge_elsewhere(folder: Path, clients: int, *overrides: str) -> dict[str, float]:
    """What this file prints as a script."""
    command = [sys.executable, __file__, str(folder), str(clients), *overrides]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    torch.set_num_threads(1)
    folder, clients, *rest = sys.argv[1:]
    settings = settings_of(*(item for item in rest if item != HELD))
    before = memory_bytes("VmRSS")
    replies = read_replies(Path(folder), int(clients), held=HELD in rest)
    begin = time.process_time()
    merge(replies, settings)
    seconds = time.process_time() - begin
    grown = (memory_bytes("VmHWM") - before) / 1e6
    print(json.dumps({"seconds": seconds, "grown_MB": grown}))


if __name__ == "__main__":
    main()
