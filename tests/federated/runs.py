"""Small federations for tests: settings, states, replies and whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from samv2.common.config import load_settings
from samv2.common.settings import Settings
from samv2.data.shards import (
    ClientShard,
    FederatedIndex,
    FederatedText,
    save_federated_text,
)
from samv2.experts.graph import ExpertGraph
from samv2.federated import round_logs
from samv2.federated.client_round import TrainReply
from samv2.federated.run_logs import write_merge
from samv2.federated.server_app import run_embedded
from samv2.federated.server_merge import MergeReport, ServerState, initial_state
from samv2.federated.usage import EdgeCounts, pack_usage, zero_counts
from samv2.updates.packing import Manifest, pack

SMALL = (
    "model.dtype=float32",
    "experts.num_experts=8",
    "experts.experts_per_token=4",
    "experts.num_shared=1",
    "experts.layers=all",
    "experts.surrogate_rank=4",
    "experts.calibration_tokens=1024",
    "adapter.rank=4",
    "assembler.prefix_tokens=8",
    "data.domains=python,pydoc",
    "data.train_bytes=65536",
    "data.heldout_bytes=16384",
    "data.calibration_bytes=16384",
    "train.sequence_length=64",
    "train.local_steps=3",
    "federation.rounds=3",
    "federation.clients=2",
    "federation.update_budget_bytes=16384",
    "federation.workers=1",
    "edits.patience=1",
)
"""Settings that fit the tiny model and text that every machine has."""

LAYERS, EXPERTS = 2, 4


def small_settings(model: Path | str, *overrides: str) -> Settings:
    """:data:`SMALL` on a model, with changes."""
    return load_settings(None, [*SMALL, f"model.path={model}", *overrides])


def quiet() -> Console:
    """A console that nobody reads."""
    return Console(quiet=True)


class Interrupted(Exception):
    """What ends a run in :func:`interrupt`."""


def interrupt(settings: Settings, root: Path, *, in_round: int) -> None:
    """Run until a round is merged but not yet logged."""

    def stop(folder: Path, report: MergeReport, *rest: Any) -> None:
        if report.round == in_round:
            raise Interrupted
        write_merge(folder, report, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_logs, "write_merge", stop)
        with pytest.raises(Interrupted):
            run_embedded(settings, root, console=quiet())


def checkpoint_tensors(root: Path, round: int) -> dict[str, Tensor]:
    """All tensors of a run's checkpoint."""
    return load_file(root / "checkpoints" / f"round_{round:04d}" / "state.safetensors")


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Two sets of tensors are the same bit for bit."""
    assert left.keys() == right.keys()
    different = [
        name
        for name, tensor in left.items()
        if tensor.dtype != right[name].dtype
        or not torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8),
            right[name].contiguous().view(-1).view(torch.uint8),
        )
    ]
    assert not different, f"tensors differ: {different[:5]}"


def save_one_client(tokens_N: Tensor, folder: Path) -> None:
    """Shards of one client with 2,000 tokens, and too little held-out text of "tiny"."""
    shard = ClientShard(
        index=0,
        train=tokens_N[:2000],
        heldout={"python": tokens_N[-1000:], "tiny": tokens_N[:5]},
        category_counts={"python": 1},
        description="client 0",
        tokenizer_fingerprint="-",
    )
    index = FederatedIndex(
        domains=("python",),
        split="domain",
        seed=0,
        category_counts=({"python": 1},),
        train_tokens=(2000,),
        category_heterogeneity=0.0,
        token_heterogeneity=0.0,
        tokenizer_fingerprint="-",
        corpus_sha256={},
    )
    save_federated_text(
        FederatedText(clients=(shard,), calibration={}, index=index), folder
    )


def toy_graph(version: int = 0, *, order: Sequence[int] | None = None) -> ExpertGraph:
    """Two layers of four experts: all entries, and edges 0 -> 1, 1 -> 3."""
    mask_LEE = torch.eye(EXPERTS, dtype=torch.bool).repeat(LAYERS, 1, 1)
    mask_LEE[:, 0, 1] = mask_LEE[:, 1, 3] = True
    order_E = torch.tensor(list(order) if order else list(range(EXPERTS)))
    return ExpertGraph(
        edge_mask_LEE=mask_LEE, order_LE=order_E.repeat(LAYERS, 1), version=version
    )


def toy_state() -> ServerState:
    """A server state of eight blocks of 6 numbers and one of 10."""
    blocks = {key: torch.zeros(6) for key in range(LAYERS * EXPERTS)}
    return initial_state(blocks | {LAYERS * EXPERTS: torch.zeros(10)}, toy_graph())


def toy_manifest() -> Manifest:
    """Of :func:`toy_state`'s blocks."""
    return Manifest.of(toy_state().blocks)


def toy_settings(*overrides: str) -> Settings:
    """Settings for the toy state: K = 2, no shared expert, four steps of two windows."""
    return load_settings(
        None,
        [
            "experts.num_experts=4",
            "experts.experts_per_token=2",
            "experts.num_shared=0",
            "train.local_steps=4",
            "train.batch_size=2",
            "train.sequence_length=8",
            "assembler.prefix_tokens=4",
            "data.domains=python,pydoc",
            "federation.update_budget_bytes=4096",
            *overrides,
        ],
    )


def toy_counts(seed: int = 0, largest: int = 30) -> EdgeCounts:
    """Random counts in the upper triangle."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, EXPERTS, EXPERTS)
    usage = torch.randint(largest + 1, shape, generator=generator).triu()
    demand = torch.randint(largest + 1, shape, generator=generator).triu()
    return EdgeCounts(usage_LEE=usage, demand_LEE=demand)


def toy_update(seed: int = 0, ids: Sequence[int] = (0, 3, 8)) -> dict[int, Tensor]:
    """Random blocks of the toy state."""
    generator = torch.Generator().manual_seed(seed)
    sizes = toy_state().blocks
    return {key: torch.randn(sizes[key].shape, generator=generator) for key in ids}


def toy_reply(**changes: Any) -> TrainReply:
    """A valid reply to the toy state's first round."""
    values: dict[str, Any] = {
        "update": pack(toy_update(), toy_manifest(), round=1),
        "usage": pack_usage(zero_counts(LAYERS, EXPERTS), round=1),
        "graph_version": 0,
        "examples": 8,
        "tokens": 64,
        "train_loss": 4.5,
        "seconds": 0.1,
    }
    return TrainReply(**(values | changes))
