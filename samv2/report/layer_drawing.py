"""One layer of the expert graph: experts on a line, walked edges as arcs above it.

Index order is topological order, so every arc leads from left to right. Only geometry
and words are made here; the template draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samv2.report.graph_data import EdgeUse, GraphFacts, Trace, Visit, busiest_edges
from samv2.report.merge_data import Edit
from samv2.report.reading import Missing
from samv2.report.words import layer_label, share

STEPS, WIDE, MARGIN = (24.0, 56.0), 900.0, 40.0
"""Pixels between experts, least and most; from first to last; beside them."""
HIGHEST, LOWEST = 200.0, 70.0
"""Of an arc that leads from the first expert to the last: above the line, and below."""
MOST_EDGES = 160
"""Arcs of a layer; the busiest are kept."""
RADII = (0.16, 0.27)
"""Of an expert, by how often it is visited, as a share of the step."""
WIDTHS = (0.7, 8.0)


@dataclass(frozen=True, kw_only=True)
class Node:
    """An expert."""

    x: float
    radius: float
    label: str
    tip: str
    shared: bool
    """Visited by every token."""


@dataclass(frozen=True, kw_only=True)
class Arc:
    """An edge."""

    path: str
    width: float
    kind: str
    """``first``: of the bootstrapped graph; ``added`` or ``removed`` by an edit;
    ``unused``: kept, never walked."""
    tip: str
    top: float
    """y of the point that is farthest from the line."""


@dataclass(frozen=True, kw_only=True)
class WalkDrawing:
    """One token's walk, below the line."""

    domain: str
    arcs: tuple[Arc, ...]
    order: tuple[tuple[float, int], ...]
    """(x, which visit) of each expert on it."""
    words: str


@dataclass(frozen=True, kw_only=True)
class LayerDrawing:
    """A layer of the graph."""

    index: int
    label: str
    width: float
    top: float
    bottom: float
    """Of the picture; the experts' line is at 0, y grows downwards."""
    nodes: tuple[Node, ...]
    arcs: tuple[Arc, ...]
    left_out: int
    """Walked edges that are not drawn."""
    walks: tuple[WalkDrawing, ...]
    shares: tuple[tuple[str, tuple[float, ...]], ...]
    """By domain: share of its tokens that visit each expert, in the nodes' order."""
    alt: str


def draw_layers(facts: GraphFacts, edits: Sequence[Edit]) -> tuple[LayerDrawing, ...]:
    """Every converted layer; as many as usage and trace tell of.

    Args:
        facts: a run's experts.
        edits: of all rounds.
    """
    trace = None if isinstance(facts.trace, Missing) else facts.trace
    edges = None if isinstance(facts.edges, Missing) else facts.edges
    if edges is not None:
        layers, experts = edges.walked_LEE.shape[:2]
    elif trace is not None:
        layers, experts = trace.share_DLE.shape[1:]
    else:
        return ()
    return tuple(
        _layer(facts, index, experts, trace, edges, edits) for index in range(layers)
    )


def places(experts: int) -> list[float]:
    """x of every expert of a layer, closer together where there are many."""
    least, most = STEPS
    step = min(most, max(least, WIDE / max(1, experts - 1)))
    return [MARGIN + step * place for place in range(experts)]


def _layer(
    facts: GraphFacts,
    index: int,
    experts: int,
    trace: Trace | None,
    edges: EdgeUse | None,
    edits: Sequence[Edit],
) -> LayerDrawing:
    order = list(range(experts)) if edges is None else edges.order_LE[index].tolist()
    x = places(experts)
    place_of = {expert: place for place, expert in enumerate(order)}
    here = [edit for edit in edits if edit.layer == index]
    arcs, left_out = ([], 0) if edges is None else _arcs(edges, index, order, x, here)
    fits = trace is not None and index < trace.share_DLE.shape[1]
    walks, shares = [], []
    if trace is not None and fits:
        share_DE = trace.share_DLE[:, index]
        for domain, name in enumerate(trace.domains):
            walks.append(_walk(name, trace.walks[domain][index], place_of, x))
            known = [share_DE[domain, e] if e < share_DE.shape[1] else 0 for e in order]
            shares.append((name, tuple(map(float, known))))
    label = layer_label(facts.layers, index)
    return LayerDrawing(
        index=index,
        label=label,
        width=x[-1] + MARGIN,
        top=min([-30.0, *(arc.top - 8 for arc in arcs)]),
        bottom=max([45.0, *(arc.top + 8 for walk in walks for arc in walk.arcs)]),
        nodes=tuple(_nodes(facts, index, order, x, edges, shares)),
        arcs=tuple(arcs),
        left_out=left_out,
        walks=tuple(walks),
        shares=tuple(shares),
        alt=_alt(label, edges, index, order),
    )


def _nodes(
    facts: GraphFacts,
    index: int,
    order: Sequence[int],
    x: Sequence[float],
    edges: EdgeUse | None,
    shares: Sequence[tuple[str, Sequence[float]]],
) -> list[Node]:
    """Circles by how many visits an expert gets."""
    if edges is not None:
        visits = edges.walked_LEE[index].sum(axis=0)
    elif shares:
        visits = np.mean([values for _, values in shares], axis=0)
        visits = visits / max(visits.sum(), 1e-12)
    else:
        visits = np.zeros(len(order))
    most = max(float(visits.max()), 1e-12)
    step = x[1] - x[0] if len(x) > 1 else STEPS[1]
    nodes = []
    for place, expert in enumerate(order):
        tip = f"expert {expert}: {share(float(visits[place]), 1)} of the visits"
        if edges is not None:
            entered = float(edges.walked_LEE[index, place, place])
            tip += f", {share(entered, 1)} as the start of a walk"
        shared = expert < facts.shared
        if shared:
            tip += "; shared: every token visits it"
        low, high = RADII
        radius = step * (low + (high - low) * float(visits[place] / most) ** 0.5)
        nodes.append(
            Node(
                x=x[place],
                radius=round(radius, 1),
                label=str(expert),
                tip=tip,
                shared=shared,
            )
        )
    return nodes


def _arcs(
    edges: EdgeUse,
    index: int,
    order: Sequence[int],
    x: Sequence[float],
    edits: Sequence[Edit],
) -> tuple[list[Arc], int]:
    """Kept edges that nobody walked first, so that the busy ones lie above them."""
    walked_EE = edges.walked_LEE[index]
    busy = busiest_edges(walked_EE, MOST_EDGES)
    all_walked = int((np.triu(walked_EE, k=1) > 0).sum())
    most = max((float(walked_EE[edge]) for edge in busy), default=1.0)
    edited = {(edit.src, edit.dst): edit for edit in edits}
    arcs = []
    if edges.kept_LEE is not None:
        rows, columns = np.triu(edges.kept_LEE[index], k=1).nonzero()
        quiet = [edge for edge in zip(rows.tolist(), columns.tolist())]
        quiet = [edge for edge in quiet if walked_EE[edge] == 0]
        for src, dst in quiet[: max(0, MOST_EDGES - len(busy))]:
            tip = f"{_step(order, src, dst)}: there, never walked"
            tip += _history(edited.get((src, dst)))
            arcs.append(_arc(x, src, dst, 0.0, "unused", tip))
    for src, dst in reversed(busy):
        part = float(walked_EE[src, dst])
        tip = f"{_step(order, src, dst)}: {share(part, 1)} of the visits"
        if edges.count_LEE is not None:
            tip += f" ({edges.count_LEE[index, src, dst]:,.0f})"
        edit = edited.get((src, dst))
        gone = edges.kept_LEE is not None and not edges.kept_LEE[index, src, dst]
        kind = "removed" if gone else "added" if edit is not None else "first"
        tip += _history(edit)
        arcs.append(_arc(x, src, dst, part / most, kind, tip))
    return arcs, all_walked - len(busy)


def _step(order: Sequence[int], src: int, dst: int) -> str:
    return f"expert {order[src]} → {order[dst]}"


def _history(edit: Edit | None) -> str:
    if edit is None:
        return ""
    done = {"promote": "added", "prune": "removed"}.get(edit.kind, edit.kind)
    return f"; {done} in round {edit.round}"


def _arc(
    x: Sequence[float], src: int, dst: int, part: float, kind: str, tip: str
) -> Arc:
    low, high = WIDTHS
    width = low + (high - low) * part**0.5
    top = -24 - HIGHEST * (x[dst] - x[src]) / (x[-1] - x[0])
    path = curve(x[src], x[dst], top)
    return Arc(path=path, width=round(width, 2), kind=kind, tip=tip, top=round(top, 1))


def curve(start: float, end: float, top: float) -> str:
    """An SVG path along the line at 0 that is ``top`` from it in its middle."""
    inward = (end - start) / 6
    return (
        f"M{start:g} 0C{start + inward:.1f} {top * 4 / 3:.1f} "
        f"{end - inward:.1f} {top * 4 / 3:.1f} {end:g} 0"
    )


def _walk(
    domain: str, visits: Sequence[Visit], place_of: dict[int, int], x: Sequence[float]
) -> WalkDrawing:
    known = [visit for visit in visits if visit.expert in place_of]
    arcs = []
    for visit in known:
        if visit.parent is not None and visit.parent in place_of:
            start, end = x[place_of[visit.parent]], x[place_of[visit.expert]]
            low = 30 + LOWEST * abs(end - start) / (x[-1] - x[0])
            arcs.append(
                Arc(
                    path=curve(start, end, low),
                    width=2.0,
                    kind="walk",
                    tip=f"expert {visit.parent} → {visit.expert}, depth {visit.depth}",
                    top=round(low, 1),
                )
            )
    order = tuple((x[place_of[v.expert]], number) for number, v in enumerate(known, 1))
    return WalkDrawing(
        domain=domain, arcs=tuple(arcs), order=order, words=walk_in_words(known)
    )


def walk_in_words(visits: Sequence[Visit]) -> str:
    """Experts in the order of the walk; an arrow says where a step came from."""
    return ", ".join(
        str(visit.expert) if visit.parent is None else f"{visit.parent}→{visit.expert}"
        for visit in visits
    )


def _alt(label: str, edges: EdgeUse | None, index: int, order: Sequence[int]) -> str:
    if edges is None:
        return f"The {len(order)} experts of {label}; the use of edges is not known."
    busy = busiest_edges(edges.walked_LEE[index], 3)
    told = ", ".join(_step(order, src, dst) for src, dst in busy) or "none"
    walked = int((np.triu(edges.walked_LEE[index], k=1) > 0).sum())
    return (
        f"The graph of {label}: {len(order)} experts in topological order, {walked} "
        f"walked edges; the busiest: {told}."
    )


def first_layer(layers: Sequence[LayerDrawing], edits: Sequence[Edit]) -> int:
    """The layer that is shown at first: the one with most edits, or the last."""
    counts = [sum(edit.layer == layer.index for edit in edits) for layer in layers]
    if not any(counts):
        return len(layers) - 1
    return max(range(len(layers)), key=lambda place: counts[place])
