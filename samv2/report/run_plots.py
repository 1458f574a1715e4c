"""Charts of a run's result, rounds and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from samv2.report.axes import decades, draw_line, label_ends, log_axis, round_axis
from samv2.report.run_data import Domain, Result, Round
from samv2.report.svg import (
    INK,
    MUTED,
    PAPER,
    SERIES,
    Chart,
    Tips,
    chart,
    short,
)
from samv2.report.words import change, duration, perplexity, size

PHASES = {
    "load": "reading the model",
    "data": "preparing text",
    "dense_evaluation": "scoring the dense model",
    "bootstrap": "cutting it into experts",
    "trace": "tracing calls",
    "federation": "federated rounds",
    "train": "training",
    "merge": "merging",
    "evaluate": "scoring",
}
"""Names of a run's phases for people."""


def result_chart(result: Result, *, name: str) -> Chart:
    """Dense, start and end of every domain on one axis."""
    domains = [d for d in result.domains if d.final or d.start or d.dense]

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        for place, domain in enumerate(domains):
            _draw_domain(axes, place, domain, tips)
        for label, style in RESULT_MARKS.items():
            axes.plot([], [], linestyle="", label=label, **style)
        axes.set_yticks(range(len(domains)), [short(d.name) for d in domains])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(domains) - 0.4, -0.6)
        values = [v for d in domains for v in (d.dense, d.start, d.final) if v]
        log_axis(axes, "x", values)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("held-out perplexity, logarithmic; left is better")
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2)

    rows = [
        f"{d.name} {perplexity(d.start)} to {perplexity(d.final)} (dense "
        f"{perplexity(d.dense)})"
        for d in domains
    ]
    return chart(
        draw,
        name=f"{name}-result",
        title="Perplexity of each domain",
        alt=f"Held-out perplexity from start to end: {'; '.join(rows)}.",
        note="The line leads from the expert graph before training to the one after it.",
        inches=(5.2, 1.5 + 0.34 * len(domains)),
    )


RESULT_MARKS: dict[str, dict[str, object]] = {
    "dense model": {"marker": "|", "color": INK, "markersize": 12},
    "start": {"marker": "o", "color": SERIES[1], "markerfacecolor": PAPER},
    "end": {"marker": "o", "color": SERIES[0]},
}


def _draw_domain(axes: Axes, place: int, domain: Domain, tips: Tips) -> None:
    if domain.start and domain.final:
        axes.plot(
            [domain.start, domain.final], [place, place], color=MUTED, linewidth=1.2
        )
    parts = zip(RESULT_MARKS.items(), (domain.dense, domain.start, domain.final))
    for (label, style), value in parts:
        if value:
            tip = f"{domain.name}, {label}: {perplexity(value)}"
            if label == "end":
                tip += f" ({change(domain.change)})"
            axes.plot([value], [place], linestyle="", gid=tips(tip), **style)


def perplexity_chart(
    rounds: Sequence[Round], start: Mapping[str, float | None], *, name: str
) -> Chart:
    """Perplexity of every domain over rounds."""
    names = list(dict.fromkeys(key for row in rounds for key in row.perplexity))
    lines = {
        key: [(0, start.get(key)), *((r.round, r.perplexity.get(key)) for r in rounds)]
        for key in names
    }
    return _lines_chart(
        lines,
        name=f"{name}-perplexity",
        title="Held-out perplexity",
        y="perplexity, logarithmic",
        logarithmic=True,
        show=perplexity,
        note="Round 0 is the expert graph before training.",
    )


def loss_chart(rounds: Sequence[Round], *, name: str) -> Chart:
    """Training loss over rounds."""
    return _lines_chart(
        {"clients": [(row.round, row.train_loss) for row in rounds]},
        name=f"{name}-loss",
        title="Training loss",
        y="nats a token",
        show=lambda value: UNKNOWN_LOSS if value is None else f"{value:.3f}",
        note="Mean over the clients' own text, weighted by tokens; it was measured while "
        "they trained, so other text each round makes it jump.",
    )


UNKNOWN_LOSS = "not known"


def runs_chart(
    runs: Mapping[str, tuple[Sequence[Round], float | None]], *, name: str
) -> Chart:
    """Geometric mean over rounds, a line a run.

    Args:
        runs: by name: rounds, and the mean before the first.
        name: prefix of ids.
    """
    return _lines_chart(
        {
            key: [(0, start), *((row.round, row.mean) for row in rounds)]
            for key, (rounds, start) in runs.items()
        },
        name=f"{name}-runs",
        title="Held-out perplexity of each run",
        y="geometric mean, logarithmic",
        logarithmic=True,
        show=perplexity,
        note="Runs on other domains or other text are not comparable.",
    )


def _lines_chart(
    lines: Mapping[str, Sequence[tuple[int, float | None]]],
    *,
    name: str,
    title: str,
    y: str,
    show: Callable[[float | None], str],
    note: str = "",
    logarithmic: bool = False,
) -> Chart:
    shown = {
        key: [(x, v) for x, v in line if v is not None] for key, line in lines.items()
    }
    shown = {key: line for key, line in shown.items() if line}

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        ends = {}
        for index, (key, line) in enumerate(shown.items()):
            colour = draw_line(axes, line, index, key, tips, show=show)
            ends[key] = (*line[-1], colour)
        if logarithmic:
            log_axis(axes, "y", [v for line in shown.values() for _, v in line])
        else:
            axes.margins(y=0.15)
        round_axis(axes)
        axes.set_ylabel(y)
        if len(shown) > 1:
            label_ends(axes, ends, gap=0.062)

    told = [f"{key} ends at {show(line[-1][1])}" for key, line in shown.items()]
    return chart(
        draw,
        name=name,
        title=title,
        alt=f"{title} over rounds: {'; '.join(told) or 'no figures'}.",
        note=note,
        inches=(5.2, max(3.2, 0.9 + 0.2 * len(shown))),
    )


def bytes_chart(rounds: Sequence[Round], fedit: float | None, *, name: str) -> Chart:
    """What a client sends and gets in each round, beside FedIT."""
    up = [(row.round, row.bytes_up_per_client) for row in rounds]
    down = [(row.round, row.bytes_down_per_client) for row in rounds]

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        for index, (label, line) in enumerate((("uploaded", up), ("downloaded", down))):
            line = [(x, count) for x, count in line if count > 0]
            draw_line(axes, line, index, label, tips, show=size)
        if fedit:
            axes.axhline(
                fedit, color=INK, linestyle=":", label="FedIT, each way", linewidth=1.4
            )
        found = [count for _, count in (*up, *down, (0, fedit or 0)) if count > 0]
        log_axis(axes, "y", [*found, *(count / 2 for count in found)])
        axes.yaxis.set_major_formatter(lambda value, _: size(value))
        axes.yaxis.set_major_locator(FixedLocator(decades(found)))
        round_axis(axes)
        axes.set_ylabel("bytes of a client, logarithmic")
        figure.legend(loc="outside upper left", ncols=3)

    most = [size(max(count for _, count in line)) for line in (up, down)]
    against = f" FedIT would need {size(fedit)} each way." if fedit else ""
    return chart(
        draw,
        name=f"{name}-bytes",
        title="Bytes of a client in each round",
        alt=f"A client uploads {most[0]} at most and downloads {most[1]} at most in a "
        f"round.{against}",
        note="The client that sent or got most. FedIT is rank-8 LoRA on the same layers "
        "in float32.",
    )


def seconds_chart(result: Result, rounds: Sequence[Round], *, name: str) -> Chart:
    """Where the time went."""
    parts = [
        (PHASES.get(key, key), value or 0.0) for key, value in result.seconds.items()
    ]
    inside: dict[str, float] = {}
    for row in rounds:
        for key, value in row.seconds.items():
            label = f"  of it {PHASES.get(key, key)}"
            inside[label] = inside.get(label, 0.0) + (value or 0.0)
    server = [row.server_seconds for row in rounds if row.server_seconds is not None]
    if server:
        inside["  of it not waiting"] = sum(server)
    bars = [*parts, *inside.items()]

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        for place, (label, value) in enumerate(bars):
            colour = MUTED if label in inside else SERIES[0]
            axes.barh([place], [value], color=colour, height=0.62)
            axes.patches[-1].set_gid(tips(f"{label.strip()}: {duration(value)}"))
            axes.annotate(
                duration(value),
                (value, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
            )
        axes.set_yticks(range(len(bars)), [short(label) for label, _ in bars])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.32 * max([v for _, v in bars], default=1.0) or 1.0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")

    told = "; ".join(f"{label.strip()} {duration(value)}" for label, value in bars)
    return chart(
        draw,
        name=f"{name}-seconds",
        title="Where the time went",
        alt=f"Seconds by phase: {told}.",
        note="Not waiting: the server's own work in all phases of the rounds.",
        inches=(5.2, 1.0 + 0.3 * len(bars)),
    )
