"""Which experts fire for which text, and which edges of the graph are walked.

Shapes: L converted layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samv2.federated.checkpoint import latest_checkpoint, load_graph
from samv2.federated.run_folder import RunFolder, run_model
from samv2.federated.run_logs import USAGE
from samv2.models.save import conversion_settings, is_expert_model
from samv2.report.reading import (
    DAMAGE,
    Missing,
    index_below,
    number,
    read_json,
    read_piece,
    said,
    text,
    whole,
)
from samv2.report.run_data import RunFacts

TRACE = "expert_call_trace.json"
MOST_EXPERTS = 1024
"""Of a layer; a damaged file must not ask for more memory than that takes."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One expert on a walk."""

    expert: int
    parent: int | None
    """The expert the walk came from; None where it entered here."""
    depth: int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """``expert_call_trace.json``: a passage of every domain, before the first round."""

    domains: tuple[str, ...]
    tokens: tuple[int, ...]
    """Length of each domain's passage."""
    share_DLE: np.ndarray
    """Share of a domain's tokens that visit an expert, 0..1."""
    walks: tuple[tuple[tuple[Visit, ...], ...], ...]
    """By domain and layer: the walk of the passage's last token."""

    def difference_DLE(self) -> np.ndarray:
        """Share less the mean over domains."""
        return self.share_DLE - self.share_DLE.mean(axis=0)


@dataclass(frozen=True, kw_only=True)
class EdgeUse:
    """How the graph was used."""

    walked_LEE: np.ndarray
    """Share of a layer's visits, upper triangle, in positions: entries on the diagonal,
    edges above; sums to 1 in each layer that was used."""
    count_LEE: np.ndarray | None
    """The same as counts; None where only shares are known."""
    kept_LEE: np.ndarray | None
    """bool: edges of the newest graph; None where there is no checkpoint."""
    order_LE: np.ndarray
    """The expert at each position."""
    origin: str
    """Where the figures are from, for a caption."""


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """A run's experts."""

    layers: tuple[int, ...]
    """The model's layer of every converted one; empty where it is not known."""
    shared: int
    """Experts below this are visited by every token."""
    trace: Trace | Missing
    edges: EdgeUse | Missing


def read_graph(root: Path, facts: RunFacts) -> GraphFacts:
    """A run's experts.

    Args:
        root: the run directory.
        facts: the rest of the run.
    """
    run = RunFolder(root=Path(root))
    return GraphFacts(
        layers=_layers(run, facts),
        shared=(
            0
            if isinstance(facts.settings, Missing)
            else facts.settings.experts.num_shared
        ),
        trace=read_json(
            run.root / TRACE,
            parse_trace,
            remedy="`samv2 train` writes it before the first round.",
        ),
        edges=_edges(run),
    )


def _layers(run: RunFolder, facts: RunFacts) -> tuple[int, ...]:
    if isinstance(facts.settings, Missing):
        return ()
    folder = run_model(run, facts.settings)
    try:
        if not is_expert_model(folder):
            return ()
        layers = str(conversion_settings(folder)["experts.layers"])
        return tuple(int(layer) for layer in layers.split(","))
    except DAMAGE:
        return ()


def parse_trace(value: Any) -> Trace:
    """The content of ``expert_call_trace.json``.

    Raises:
        ValueError, KeyError, ...: it is not of that form.
    """
    layers = len(value[0]["layers"])
    if not layers or any(len(item["layers"]) != layers for item in value):
        raise ValueError("its sequences have different layers")
    fired = [
        [
            {whole(int(k)): number(n) for k, n in layer["fired"].items()}
            for layer in item["layers"]
        ]
        for item in value
    ]
    experts = 1 + max(max(layer, default=0) for item in fired for layer in item)
    tokens = tuple(max(1, whole(item["tokens"])) for item in value)
    share_DLE = np.zeros((len(value), layers, index_below(experts, MOST_EXPERTS)))
    for domain, item in enumerate(fired):
        for layer, counts in enumerate(item):
            for expert, count in counts.items():
                share_DLE[domain, layer, index_below(expert, experts)] = count
        share_DLE[domain] /= tokens[domain]
    return Trace(
        domains=tuple(text(item["sequence"]) for item in value),
        tokens=tokens,
        share_DLE=share_DLE,
        walks=tuple(
            tuple(
                tuple(
                    Visit(
                        expert=index_below(visit["expert"], MOST_EXPERTS),
                        parent=(
                            None
                            if visit["parent"] is None
                            else index_below(visit["parent"], MOST_EXPERTS)
                        ),
                        depth=whole(visit["depth"]),
                    )
                    for visit in layer["walk_of_last_token"]
                )
                for layer in item["layers"]
            )
            for item in value
        ),
    )


def parse_usage(lines: str) -> tuple[np.ndarray, int]:
    """The content of ``usage.jsonl``, up to a last line that was cut short.

    Returns:
        (L, E, E) counts, summed over rounds, and how many rounds.

    Raises:
        ValueError, KeyError, ...: it is not of that form.
    """
    rows = []
    for line in lines.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    if not rows:
        raise ValueError("it holds no round")
    experts = index_below(rows[0]["experts"], MOST_EXPERTS)
    where = np.triu_indices(experts)
    total_LP = np.zeros((len(rows[0]["usage"]), len(where[0])))
    for row in rows:
        counts_LP = np.asarray(row["usage"], dtype=float)
        if counts_LP.shape != total_LP.shape or not (counts_LP >= 0).all():
            raise ValueError(f"round {row['round']} does not fit the rounds before")
        total_LP += counts_LP
    count_LEE = np.zeros((len(total_LP), experts, experts))
    count_LEE[:, *where] = total_LP
    return count_LEE, len(rows)


def _edges(run: RunFolder) -> EdgeUse | Missing:
    counted = read_piece(
        run.root / USAGE,
        parse_usage,
        remedy="Every round of `samv2 train` adds to it.",
    )
    path = latest_checkpoint(run.checkpoints)
    graph = memory = None
    try:
        if path is not None:
            graph, memory, _ = load_graph(path)
    except DAMAGE as error:
        if isinstance(counted, Missing):
            what = f"{counted.what} The checkpoint cannot be read: {said(error)}."
            return Missing(what=what, remedy=counted.remedy)
    kept_LEE = None if graph is None else graph.edge_mask_LEE.numpy()
    order_LE = None if graph is None else graph.order_LE.numpy()
    if not isinstance(counted, Missing):
        count_LEE, rounds = counted
        if kept_LEE is not None and kept_LEE.shape != count_LEE.shape:
            return Missing(
                what=f"{USAGE} and the checkpoint are of different graphs.",
                remedy=f"Remove {USAGE}, or run again with `--overwrite`.",
            )
        origin = f"counted over {rounds} round{'s' * (rounds > 1)}"
        return _use(count_LEE, count_LEE, kept_LEE, order_LE, origin)
    if memory is None or memory.rounds == 0:
        return counted
    origin = (
        f"from the newest checkpoint, which remembers recent rounds more than early "
        f"ones (this run has no {USAGE} with the counts of every round)"
    )
    return _use(memory.usage_LEE.numpy(), None, kept_LEE, order_LE, origin)


def _use(
    weight_LEE: np.ndarray,
    count_LEE: np.ndarray | None,
    kept_LEE: np.ndarray | None,
    order_LE: np.ndarray | None,
    origin: str,
) -> EdgeUse:
    layers, experts = weight_LEE.shape[:2]
    total_L = weight_LEE.sum(axis=(1, 2), keepdims=True)
    return EdgeUse(
        walked_LEE=weight_LEE / np.where(total_L > 0, total_L, 1.0),
        count_LEE=count_LEE,
        kept_LEE=kept_LEE,
        order_LE=(
            np.tile(np.arange(experts), (layers, 1)) if order_LE is None else order_LE
        ),
        origin=origin,
    )


def busiest_edges(walked_EE: np.ndarray, most: int) -> Sequence[tuple[int, int]]:
    """The edges of a layer that were walked, the busiest first.

    Args:
        walked_EE: share of visits; the diagonal is left out.
        most: edges at most.
    """
    rows, columns = np.triu_indices(len(walked_EE), k=1)
    weights = walked_EE[rows, columns]
    order = np.argsort(-weights, kind="stable")[:most]
    return [(int(rows[i]), int(columns[i])) for i in order if weights[i] > 0]
