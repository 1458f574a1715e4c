"""What a bootstrap prints about its frontier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from samv2.common.telemetry import number_table
from samv2.federated.frontier import Frontier, Point
from samv2.federated.phases import duration

RATIO = "mean ratio to dense"
UNSEEN = "not in the\ncalibration text"
COST = "mean ratio to float"
"""Of the quantised model to the same with float blocks."""
BEFORE_AFTER = "a -> b: before and after expert blocks went to 4 bits"
PADDING = 3
"""Characters of a column beside its content."""


def show_frontier(
    frontier: Frontier,
    output: Path,
    console: Console,
    *,
    target: float | None = None,
    per_layer: bool = False,
) -> None:
    """Print the table, then what was chosen, what it took, and where it is.

    Args:
        frontier: of the bootstrap.
        output: the folder that was written.
        console: where it is printed.
        target: ``--target-ppl-ratio``.
        per_layer: whether each layer's visits and errors are shown.
    """
    for points in _pieces(frontier, console.width):
        console.print(_table(frontier, points))
    if per_layer:
        for table in _layer_tables(frontier, console.width):
            console.print(table)
    if target is not None:
        console.print(_choice(frontier, target))
    spent = ", ".join(
        f"{name[:1].lower()}{name[1:]} {duration(seconds)}"
        for name, seconds in frontier.seconds.items()
    )
    console.print(f"Time: {spent}. Peak memory: {frontier.peak_bytes / 1e9:.1f} GB.")
    kept = next(p for p in frontier.points if p.experts_per_token == frontier.kept)
    console.print(
        f"Saved {output}: K = {frontier.kept}, {_share(kept)} of the dense FFN "
        "arithmetic. The figures are in its frontier.json, frontier.png and layers.json.",
        markup=False,
    )


def _pieces(frontier: Frontier, width: int) -> Iterator[Sequence[Point]]:
    """Points that fit beside each other, with the dense model's column in each table."""
    points = frontier.points
    names = (*frontier.calibrated, *frontier.unseen, RATIO)
    cells = [_visits(point) for point in points]
    cells += [_heading(point, frontier.kept) for point in points]
    cells += [cell for point in points for cell in _perplexities(point).values()]
    beside = max(map(len, names)) + PADDING + 1
    fitting = (width - beside) // (max(map(len, cells)) + PADDING) - 1
    for start in range(0, len(points), max(1, fitting)):
        yield points[start : start + max(1, fitting)]


def _table(frontier: Frontier, points: Sequence[Point]) -> Table:
    dense = points[0].dense_perplexity
    table = number_table(
        "Held-out perplexity against FFN arithmetic",
        ["", "dense", *(_heading(point, frontier.kept) for point in points)],
        [],
        caption=_caption(frontier, points),
    )
    table.caption_justify = "left"

    def domains(names: Sequence[str]) -> None:
        for name in names:
            cells = [_perplexities(point)[name] for point in points]
            table.add_row(name, _number(dense[name]), *cells)

    table.add_row("visits a token", "", *(_visits(point) for point in points))
    table.add_row("FFN FLOPs", "100 %", *map(_share, points), end_section=True)
    domains(frontier.calibrated)
    ratios = [_pair(_ratio, p.unquantised_ratio, p.ratio, p) for p in points]
    table.add_row(RATIO, "1.000", *ratios, style="bold")
    if _quantised(points):
        table.add_row(COST, "", *(_ratio(_cost(point)) for point in points))
    table.add_section()
    if frontier.unseen:
        table.add_row(UNSEEN, style="italic")
        domains(frontier.unseen)
        ratios = [
            _pair(_ratio, p.unquantised_unseen_ratio, p.unseen_ratio, p) for p in points
        ]
        table.add_row(RATIO, "1.000", *ratios, style="bold")
    return table


def _caption(frontier: Frontier, points: Sequence[Point]) -> str | None:
    """What a reader needs to know of the cells."""
    lines = []
    if any(point.experts_per_token == frontier.kept for point in points):
        lines.append("* experts_per_token of the saved model")
    if _quantised(points):
        lines.append(BEFORE_AFTER)
    return "\n".join(lines) or None


def _quantised(points: Sequence[Point]) -> bool:
    return any(point.unquantised_perplexity is not None for point in points)


def _perplexities(point: Point) -> dict[str, str]:
    """By domain: perplexity, with that before quantising in front."""
    before = point.unquantised_perplexity or {}
    return {
        name: _pair(_number, before.get(name), value, point)
        for name, value in point.perplexity.items()
    }


def _pair(
    show: Callable[[float | None], str],
    before: float | None,
    after: float | None,
    point: Point,
) -> str:
    if point.unquantised_perplexity is None:
        return show(after)
    return f"{show(before)} -> {show(after)}"


def _cost(point: Point) -> float | None:
    """Mean perplexity after quantising over that before."""
    if point.ratio is None or point.unquantised_ratio is None:
        return None
    return point.ratio / point.unquantised_ratio


def _heading(point: Point, kept: int) -> str:
    k = point.experts_per_token
    return f"K = {k}{'*' if k == kept else ''}"


def _visits(point: Point) -> str:
    least, most = min(point.visits), max(point.visits)
    return str(least) if least == most else f"{least}-{most}"


def _share(point: Point) -> str:
    return f"{100 * point.ffn_flops_fraction:.0f} %"


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3f}"


def _layer_tables(frontier: Frontier, width: int) -> Iterator[Table]:
    """For each layer and K below E: visits, and the stream's error behind the layer."""
    ks = sorted(frontier.layers[0].visits)
    fitting = max(
        1, (width - len("layer") - PADDING - 1) // (len(_layer_cell(1, 0)) + 3)
    )
    for start in range(0, len(ks), fitting):
        some = ks[start : start + fitting]
        yield number_table(
            "Visits and relative stream error by layer",
            ["layer", *(f"K = {k}" for k in some)],
            [
                [
                    str(layer.layer),
                    *(_layer_cell(layer.visits[k], layer.error[k]) for k in some),
                ]
                for layer in frontier.layers
            ],
        )


def _layer_cell(visits: int, error: float) -> str:
    return f"{visits:3d}  {error:6.4f}"


def _choice(frontier: Frontier, target: float) -> str:
    """What became of ``--target-ppl-ratio``."""
    kept = next(p for p in frontier.points if p.experts_per_token == frontier.kept)
    whole = frontier.points[-1]
    if kept is not whole:
        return (
            f"K = {frontier.kept} is the least of these K whose mean ratio is at most "
            f"{target:g}: it has {_ratio(kept.ratio)}."
        )
    below = [p for p in frontier.points[:-1] if p.ratio is not None]
    best = min(below, key=lambda p: p.ratio or 0.0, default=None)
    found = (
        "none of them has a finite one"
        if best is None
        else f"the best is K = {best.experts_per_token} with {_ratio(best.ratio)}"
    )
    return (
        f"[yellow]No K below {whole.experts_per_token} has a mean ratio of at most "
        f"{target:g}; {found}. The model visits all {whole.experts_per_token} experts, "
        "which saves no arithmetic.[/yellow]"
    )
