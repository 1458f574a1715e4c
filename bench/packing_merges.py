"""A server's side: many payloads into one sum.

Adapters have the shapes of SmolLM2-135M's: 30 layers of 8 experts, each 192 rows of
three matrices with rank 16, and a gate row of 576.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from packing_cases import ROW, scattered
from packing_speed import ROUND
from torch import Tensor

from samv2.common.settings import FederationSettings
from samv2.updates.aggregate import Contribution
from samv2.updates.packing import Manifest, accumulate_all, pack, unpack
from samv2.updates.sparsify import select_blocks

LAYERS, EXPERTS, EXPERT_BLOCK = 30, 8, 3 * 192 * 16 + 576
BLOCKS = LAYERS * EXPERTS
FEDERATION = FederationSettings()
"""The product's defaults: codec and budget."""
CLIENTS = 1000


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Payloads of one large tensor."""

    name: str
    payloads: int
    distinct: int
    """Different payloads; they are taken again in turn."""
    numel: int
    density: float
    span: int = 1
    most_ms: float | None = None
    """Milliseconds a payload."""

    def tensor(self, index: int) -> Tensor:
        return scattered(self.numel, self.density, seed=index, span=self.span)

    @property
    def manifest(self) -> Manifest:
        return Manifest(ids=(0,), shapes=((self.numel,),), dtypes=(torch.float32,))

    def frames(self, most: int | None = None) -> list[bytes]:
        """The payloads, packed: all, or the first ``most``."""
        payloads = self.payloads if most is None else most
        packed = [
            pack({0: self.tensor(index)}, self.manifest, round=ROUND)
            for index in range(min(self.distinct, payloads))
        ]
        return [packed[i % self.distinct] for i in range(payloads)]


MERGES = {
    merge.name: merge
    for merge in (
        Merge(
            name="50 of 1 %, 64 MiB",
            payloads=50,
            distinct=50,
            numel=1 << 24,
            density=0.01,
            most_ms=1.5,
        ),
        Merge(
            name="1000 of 1 %, 16 MiB",
            payloads=1000,
            distinct=1000,
            numel=1 << 22,
            density=0.01,
        ),
        Merge(
            name="64 of 10 %, 64 MiB",
            payloads=64,
            distinct=8,
            numel=1 << 24,
            density=0.1,
            most_ms=6.0,
        ),
        Merge(
            name=f"64 of rows of {ROW}, 10 %, 64 MiB",
            payloads=64,
            distinct=8,
            numel=1 << 24,
            density=0.1,
            span=ROW,
            most_ms=0.8,
        ),
    )
}


def merge_all(
    frames: Sequence[bytes], manifest: Manifest, total: dict[int, Tensor]
) -> None:
    """Add every payload, with weight 1."""
    accumulate_all([(frame, 1.0) for frame in frames], manifest, total, round=ROUND)


ADAPTERS = ("the budget's experts", "a twentieth of the experts", "1 % of every expert")


@cache
def adapter_manifest() -> Manifest:
    return Manifest(
        ids=tuple(range(BLOCKS)),
        shapes=((EXPERT_BLOCK,),) * BLOCKS,
        dtypes=(torch.float32,) * BLOCKS,
    )


def contributions(kind: str, clients: int = CLIENTS) -> list[Contribution]:
    """One of every client, all different."""
    source = torch.from_numpy(
        np.random.default_rng(0).standard_normal(2 * BLOCKS * EXPERT_BLOCK, np.float32)
    )
    return [_contribution(kind, client, source) for client in range(clients)]


def _contribution(kind: str, client: int, source: Tensor) -> Contribution:
    rng = np.random.default_rng(client)
    update: dict[int, Tensor]
    if kind == ADAPTERS[2]:
        flat = scattered(BLOCKS * EXPERT_BLOCK, 0.01, seed=client)
        update = dict(enumerate(flat.split(EXPERT_BLOCK)))
    else:
        count = BLOCKS // 20 if kind == ADAPTERS[1] else _blocks_in_budget()
        begin = int(rng.integers(BLOCKS * EXPERT_BLOCK))
        parts = source[begin:].split(EXPERT_BLOCK)
        chosen = sorted(rng.choice(BLOCKS, size=count, replace=False).tolist())
        update = dict(zip(chosen, parts))
    return Contribution(
        client=client,
        data=pack(update, adapter_manifest(), round=ROUND, codec=FEDERATION.codec),
        weight=float(rng.integers(1, 100)),
        expert_ids=tuple(update),
    )


@cache
def _blocks_in_budget() -> int:
    sent = select_blocks(
        {id_: torch.ones(EXPERT_BLOCK) for id_ in range(BLOCKS)},
        codec=FEDERATION.codec,
        update_budget_bytes=FEDERATION.update_budget_bytes,
    )
    return len(sent)


def expected_mean(items: Sequence[Contribution]) -> dict[int, Tensor]:
    """The weighted mean per expert, dense and in float64."""
    sums: dict[int, Tensor] = {}
    weights: dict[int, float] = {}
    for item in items:
        for id_, value in unpack(item.read(), adapter_manifest(), round=ROUND).items():
            sums[id_] = sums.get(id_, 0) + item.weight * value.double()
            weights[id_] = weights.get(id_, 0) + item.weight
    return {id_: value / weights[id_] for id_, value in sums.items()}
