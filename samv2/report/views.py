"""What the page shows of each source: data and charts side by side, ready to print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samv2.report.ablation_plots import effect_charts, trade_chart
from samv2.report.expert_plots import difference_chart, share_chart
from samv2.report.graph_data import GraphFacts, read_graph
from samv2.report.layer_drawing import LayerDrawing, draw_layers, first_layer
from samv2.report.merge_data import Edit, RefusedReply
from samv2.report.merge_plots import edits_chart, visits_chart
from samv2.report.other_data import (
    RESULTS,
    Ablation,
    Comparison,
    FrontierPoint,
    csv_number,
    read_ablation,
    read_comparison,
    read_frontier,
)
from samv2.report.other_plots import frontier_chart, method_charts
from samv2.report.reading import Missing
from samv2.report.run_data import RunFacts, read_run
from samv2.report.run_plots import (
    bytes_chart,
    loss_chart,
    perplexity_chart,
    result_chart,
    runs_chart,
    seconds_chart,
)
from samv2.report.sources import Source
from samv2.report.svg import Chart
from samv2.report.words import division, headline, layer_label


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run on the page."""

    id: str
    name: str
    path: Path
    facts: RunFacts
    headline: tuple[str, ...]
    result: Chart | Missing
    rounds: tuple[Chart, ...] | Missing
    cost: tuple[Chart, ...] | Missing
    experts: tuple[Chart, ...] | Missing
    division: str
    layers: tuple[LayerDrawing, ...] | Missing
    shown_layer: int
    edges_origin: str | Missing
    edits_charts: tuple[Chart, ...] | Missing
    edits: tuple[Edit, ...]
    refused: tuple[RefusedReply, ...]
    layer_labels: tuple[str, ...]
    """By index of a converted layer."""
    frontier: Chart | Missing

    def layer_label(self, index: int) -> str:
        """A converted layer in words."""
        known = index < len(self.layer_labels)
        return self.layer_labels[index] if known else f"converted layer {index}"


@dataclass(frozen=True, kw_only=True)
class ComparisonView:
    """A ``federation.json`` on the page."""

    id: str
    name: str
    path: Path
    data: Comparison | Missing
    charts: tuple[Chart, ...]
    best: Mapping[str, float]
    """Lowest value of every domain, and of ``perplexity``, ``bytes_up``, ``seconds``."""


@dataclass(frozen=True, kw_only=True)
class AblationView:
    """An ``ablation.csv`` on the page."""

    id: str
    name: str
    path: Path
    data: Ablation | Missing
    effects: tuple[Chart, ...]
    trade: Chart | None
    """Perplexity against bytes."""
    best: Mapping[str, float]
    """Lowest value of every measured column."""


@dataclass(frozen=True, kw_only=True)
class FrontierView:
    """A bootstrapped folder on the page."""

    id: str
    name: str
    path: Path
    chart: Chart | Missing
    points: tuple[FrontierPoint, ...] | Missing


@dataclass(frozen=True, kw_only=True)
class ReportView:
    """Everything on the page."""

    runs: tuple[RunView, ...]
    runs_chart: Chart | None
    """All runs in one chart, where there are several."""
    comparisons: tuple[ComparisonView, ...]
    ablations: tuple[AblationView, ...]
    frontiers: tuple[FrontierView, ...]


def view_report(sources: Sequence[Source]) -> ReportView:
    """Read and draw all sources."""

    def views(kind: str, make: Callable) -> tuple:
        chosen = [source for source in sources if source.kind == kind]
        return tuple(make(s, f"{kind}{i}") for i, s in enumerate(chosen, 1))

    runs: tuple[RunView, ...] = views("run", view_run)
    lines = {}
    for run in runs:
        rounds, start = run.facts.rounds, None
        if not isinstance(run.facts.result, Missing):
            start = run.facts.result.mean("start")
        if not isinstance(rounds, Missing):
            lines[run.name] = (rounds, start)
    return ReportView(
        runs=runs,
        runs_chart=runs_chart(lines, name="all") if len(lines) > 1 else None,
        comparisons=views("comparison", view_comparison),
        ablations=views("ablation", view_ablation),
        frontiers=views("frontier", view_frontier),
    )


def view_run(source: Source, id: str) -> RunView:
    """A run directory."""
    facts = read_run(source.path)
    graph = read_graph(source.path, facts)
    merges = () if isinstance(facts.merges, Missing) else facts.merges
    edits = tuple(edit for merge in merges for edit in merge.edits)
    layers = draw_layers(graph, edits)
    number_of = len(layers) or max((len(m.usage_per_layer) for m in merges), default=0)
    labels = [
        layer_label(graph.layers, index).split()[-1] for index in range(number_of)
    ]
    return RunView(
        id=id,
        name=source.name,
        path=source.path,
        facts=facts,
        headline=headline(facts),
        result=_result(facts, id),
        rounds=_rounds(facts, id),
        cost=_cost(facts, id),
        experts=_experts(graph, labels, id),
        division=(
            ""
            if isinstance(graph.trace, Missing)
            else division(graph.trace, graph.layers)
        ),
        layers=layers or _no_layers(graph),
        shown_layer=first_layer(layers, edits) if layers else 0,
        edges_origin=(
            graph.edges if isinstance(graph.edges, Missing) else graph.edges.origin
        ),
        edits_charts=(
            facts.merges
            if isinstance(facts.merges, Missing)
            else (
                edits_chart(facts.merges, name=id),
                visits_chart(facts.merges, labels, name=id),
            )
        ),
        edits=edits,
        refused=tuple(reply for merge in merges for reply in merge.refused),
        layer_labels=tuple(
            layer_label(graph.layers, index) for index in range(number_of)
        ),
        frontier=_run_frontier(source.path, facts, id),
    )


def _result(facts: RunFacts, id: str) -> Chart | Missing:
    if isinstance(facts.result, Missing):
        return facts.result
    return result_chart(facts.result, name=id)


def _rounds(facts: RunFacts, id: str) -> tuple[Chart, ...] | Missing:
    if isinstance(facts.rounds, Missing):
        return facts.rounds
    start = {} if isinstance(facts.start, Missing) else facts.start
    return (
        perplexity_chart(facts.rounds, start, name=id),
        loss_chart(facts.rounds, name=id),
    )


def _cost(facts: RunFacts, id: str) -> tuple[Chart, ...] | Missing:
    if isinstance(facts.rounds, Missing):
        return facts.rounds
    result = None if isinstance(facts.result, Missing) else facts.result
    charts = [bytes_chart(facts.rounds, result and result.fedit_bytes, name=id)]
    if result is not None:
        charts.append(seconds_chart(result, facts.rounds, name=id))
    return tuple(charts)


def _experts(
    graph: GraphFacts, labels: Sequence[str], id: str
) -> tuple[Chart, ...] | Missing:
    if isinstance(graph.trace, Missing):
        return graph.trace
    layers = graph.trace.share_DLE.shape[1]
    labels = [*labels, *(str(index) for index in range(len(labels), layers))]
    charts = [share_chart(graph.trace, labels, name=id)]
    if len(graph.trace.domains) > 1:
        charts.append(difference_chart(graph.trace, labels, name=id))
    return tuple(charts)


def _no_layers(graph: GraphFacts) -> Missing:
    found = [part for part in (graph.edges, graph.trace) if isinstance(part, Missing)]
    what = " ".join(part.what for part in found)
    return Missing(what=what, remedy=" ".join(part.remedy for part in found))


def _run_frontier(root: Path, facts: RunFacts, id: str) -> Chart | Missing:
    """Of the run, or of the bootstrapped folder it was started from."""
    own = root / "frontier.json"
    if not own.is_file() and not isinstance(facts.settings, Missing):
        own = Path(facts.settings.model.path) / "frontier.json"
    points = read_frontier(own)
    return points if isinstance(points, Missing) else frontier_chart(points, name=id)


def view_comparison(source: Source, id: str) -> ComparisonView:
    """A ``federation.json``."""
    data = read_comparison(source.path)
    charts: tuple[Chart, ...] = ()
    best: dict[str, float] = {}
    if not isinstance(data, Missing):
        charts = tuple(method_charts(data, name=id))
        for part in ("perplexity", "bytes_up", "seconds"):
            _lowest(best, part, [getattr(m, part) for m in data.methods])
        for name in data.domains:
            found = [method.domains.get(name) for method in data.methods]
            _lowest(best, f"domain {name}", found)
    return ComparisonView(
        id=id, name=source.name, path=source.path, data=data, charts=charts, best=best
    )


def view_ablation(source: Source, id: str) -> AblationView:
    """An ``ablation.csv``."""
    data = read_ablation(source.path)
    effects: tuple[Chart, ...] = ()
    trade: Chart | None = None
    best: dict[str, float] = {}
    if not isinstance(data, Missing):
        effects = tuple(effect_charts(data, name=id))
        trade = trade_chart(data, name=id)
        for part in RESULTS:
            if part in data.columns:
                _lowest(best, part, [csv_number(cell) for cell in data.column(part)])
    return AblationView(
        id=id,
        name=source.name,
        path=source.path,
        data=data,
        effects=effects,
        trade=trade,
        best=best,
    )


def view_frontier(source: Source, id: str) -> FrontierView:
    """A ``frontier.json``."""
    points = read_frontier(source.path)
    chart = points if isinstance(points, Missing) else frontier_chart(points, name=id)
    return FrontierView(
        id=id, name=source.name, path=source.path, chart=chart, points=points
    )


def _lowest(best: dict[str, float], name: str, values: Sequence[float | None]) -> None:
    known = [value for value in values if value is not None and value > 0]
    if known:
        best[name] = min(known)
