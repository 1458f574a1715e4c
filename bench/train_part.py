"""One client's round in a process of its own; prints its peak memory and the estimate.

    python bench/train_part.py RUN_DIR CASE OVERRIDES

CASE and OVERRIDES are JSON: {"experts", "k", "micro"}, and a list of settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - not the model's memory
from process_memory import memory_bytes

import samv2.federated.client_app  # noqa: F401
from samv2.common.config import load_settings
from samv2.experts.graph import ExpertGraph
from samv2.experts.sub_graph import SubGraph
from samv2.federated.client_round import RoundRequest, load_runtime, train_round
from samv2.federated.graph_message import GraphMessage, pack_graph
from samv2.federated.memory import estimate_memory
from samv2.models.save import read_expert_config
from samv2.updates.packing import pack


def main(root: Path, case: dict[str, int], overrides: list[str]) -> dict[str, object]:
    """Train, and compare."""
    torch.set_num_threads(1)
    settings = load_settings(None, overrides)
    config, dense = read_expert_config(root / "model")
    layers, experts = len(config.layers), config.num_experts
    part = SubGraph(
        kept=(tuple(range(case["experts"])),) * layers,
        num_experts=experts,
        experts_per_token=case["k"],
        micro_batch=case["micro"],
    )
    graph = ExpertGraph(
        edge_mask_LEE=torch.eye(experts, dtype=torch.bool).repeat(layers, 1, 1),
        order_LE=torch.arange(experts).repeat(layers, 1),
    )
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    folders = (root / "model", root / "shards", root / "states")
    runtime = load_runtime(*folders, settings, part)
    request = RoundRequest(
        round=1,
        graph=GraphMessage(version=0, full=pack_graph(graph), edits=()),
        parameters=pack({}, runtime.manifest, round=1),
        part=part,
    )
    train_round(runtime, 0, request)
    train = settings.train
    windows = case["micro"] or train.batch_size
    estimate = estimate_memory(
        config,
        dense,
        experts=case["experts"],
        experts_per_token=case["k"],
        tokens=windows * train.sequence_length,
    )
    return {
        "measured": memory_bytes("VmHWM") - before,
        "parts": estimate.to_dict(),
    }


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
    print(json.dumps(found))
