"""Bootstrap outside a run: convert, save, and measure quality against arithmetic.

options → :func:`bootstrap_with_frontier` → a folder with the expert graph and
``frontier.json``, ``layers.json``, ``cluster_stats.txt``, ``frontier.png``.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from samv2.common.files import write_bytes, write_json
from samv2.common.settings import Settings
from samv2.federated.frontier_choice import (
    FrontierOptions,
    check_options,
    repairs,
    smallest_k_within,
)
from samv2.federated.frontier_finish import finish
from samv2.federated.frontier_inputs import FrontierInputs, read_inputs
from samv2.federated.frontier_plot import draw_frontier
from samv2.federated.phases import Phases
from samv2.federated.prepare import write_stats
from samv2.federated.run_folder import check_output
from samv2.federated.run_logs import perplexities
from samv2.models.bootstrap import parse_layers
from samv2.models.conversion import LayerReport
from samv2.models.perplexity import Score
from samv2.models.save import CONFIG_FILE, CONFIG_KEY
from samv2.models.streamed_bootstrap import (
    SURVEY,
    StreamedBootstrap,
    bootstrap_to_folder,
)

TEXT = "Reading model and text"
SURVEYING, CONVERTING = "Surveying layers", "Converting layers"
"""What :func:`bootstrap_to_folder` calls its phases."""
SAVING = "Scoring held-out text, saving"


@dataclass(frozen=True, kw_only=True)
class Point:
    """The converted model at one K."""

    experts_per_token: int
    """K."""
    ffn_flops_fraction: float
    """FFN multiply-adds over the dense model's, dense layers counted as 1."""
    perplexity: dict[str, float | None]
    """By domain, on held-out text; None where it is beyond what a float holds."""
    dense_perplexity: dict[str, float | None]
    """The same of the dense model."""
    ratio: float | None
    """Geometric mean of perplexity over dense perplexity, domains of the calibration
    text; None where one of them is not finite."""
    unseen_ratio: float | None
    """The same of the other domains; None where there is none."""
    unquantised_perplexity: dict[str, float | None] | None
    """As ``perplexity``, before expert blocks were quantised; None where they were not."""
    unquantised_ratio: float | None
    """As ``ratio``, of it."""
    unquantised_unseen_ratio: float | None
    """As ``unseen_ratio``, of it."""
    visits: tuple[int, ...]
    """Visits of every converted layer."""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What a bootstrap made and measured."""

    points: tuple[Point, ...]
    """By rising K; the last visits every expert."""
    kept: int
    """experts_per_token of the saved model."""
    calibrated: tuple[str, ...]
    """Domains of the calibration text."""
    unseen: tuple[str, ...]
    """Domains that were scored only."""
    layers: tuple[LayerReport, ...]
    seconds: dict[str, float]
    """By phase."""
    peak_bytes: int
    """Most memory that the process held."""


def bootstrap_with_frontier(
    settings: Settings,
    output: Path,
    *,
    options: FrontierOptions = FrontierOptions(),
    overwrite: bool = False,
    console: Console,
) -> Frontier:
    """Convert ``settings.model.path`` into ``output``, and score it at several K.

    A conversion that was stopped goes on where it stored its work last, if model,
    settings and text are the same.

    Args:
        settings: sections ``model``, ``experts``, ``data`` and ``train`` are used.
        output: folder to write.
        options: how K is chosen, and what is scored beside the calibrated domains.
        overwrite: replace an expert graph there, and drop unfinished work.
        console: where progress is shown.

    Raises:
        CheckpointError: ``output`` exists and may not be replaced.
        SamError: an option, a setting, the model or the text does not fit.
    """
    check_options(options, settings)
    output = Path(output).expanduser().absolute()
    check_output(output, overwrite=overwrite, expert=True)
    if settings.experts.other_k and not repairs(settings.experts):
        console.print(
            "[yellow]experts.other_k is not used: it names K to repair, and these "
            "settings make no repairs.[/yellow]"
        )
    phases = Phases(console)
    with phases:
        phases.start(TEXT)
        inputs = read_inputs(settings, options, console)
        settings = inputs.settings
        if overwrite:
            shutil.rmtree(partial_folder(output), ignore_errors=True)
        made = bootstrap_to_folder(
            inputs.source,
            inputs.tokenizer,
            inputs.calibration_NS,
            inputs.heldout,
            settings,
            output,
            fingerprint=inputs.fingerprint,
            progress=_watch(phases, partial_folder(output), inputs),
            finish=partial(finish, inputs=inputs, phases=phases),
        )
    points = tuple(_point(k, made, inputs) for k in sorted(made.scores))
    kept = settings.experts.experts_per_token
    if options.target_ppl_ratio is not None:
        kept = smallest_k_within(options.target_ppl_ratio, points)
        _keep(output, kept)
    frontier = Frontier(
        points=points,
        kept=kept,
        calibrated=inputs.calibrated,
        unseen=inputs.unseen,
        layers=made.layers,
        seconds=phases.seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    _save(output, frontier, made, settings)
    return frontier


def partial_folder(output: Path) -> Path:
    """Where the unfinished work of a bootstrap into ``output`` is kept."""
    return output.parent / f".{output.name}.partial"


def _watch(
    phases: Phases, partial: Path, inputs: FrontierInputs
) -> Callable[[str, int, int], None]:
    """What shows the conversion's progress, and says where it goes on."""
    had_survey = (partial / f"{SURVEY}.json").is_file()
    if not had_survey:
        layers = parse_layers(inputs.settings.experts.layers, inputs.source.num_layers)
        phases.start(SURVEYING, total=layers[-1] + 1)

    def progress(phase: str, done: int, total: int) -> None:
        if phases.name == phase:
            phases.advance(done, total)
        else:
            if had_survey and phases.name == TEXT:
                phases.say(_found_work(phase, done))
            phases.start(phase, total=total, done=done)
        if phase == CONVERTING and done == total:
            phases.start(SAVING)

    return progress


def _found_work(phase: str, done: int) -> str:
    if phase == SURVEYING:
        return (
            "[yellow]Unfinished work of another model, settings or text was dropped; "
            "the bootstrap begins anew.[/yellow]"
        )
    if done == 0:
        return "Unfinished work found: going on behind its survey."
    return f"Unfinished work found: going on at layer {done}."


def _point(k: int, made: StreamedBootstrap, inputs: FrontierInputs) -> Point:
    found, dense, config = made.scores[k], made.dense_scores, made.config
    before = None if made.unquantised_scores is None else made.unquantised_scores[k]
    return Point(
        experts_per_token=k,
        ffn_flops_fraction=config.flops_fraction(inputs.source.config, k),
        perplexity=perplexities(found),
        dense_perplexity=perplexities(dense),
        ratio=_ratio(found, dense, inputs.calibrated),
        unseen_ratio=_ratio(found, dense, inputs.unseen),
        unquantised_perplexity=before and perplexities(before),
        unquantised_ratio=before and _ratio(before, dense, inputs.calibrated),
        unquantised_unseen_ratio=before and _ratio(before, dense, inputs.unseen),
        visits=tuple(
            config.layer_visits(position).get(k, k)
            for position in range(len(config.layers))
        ),
    )


def _ratio(
    found: Mapping[str, Score], dense: Mapping[str, Score], names: Sequence[str]
) -> float | None:
    """Geometric mean of perplexity over dense perplexity."""
    pairs = [(found[name].perplexity, dense[name].perplexity) for name in names]
    if not pairs or not all(map(math.isfinite, (x for pair in pairs for x in pair))):
        return None
    return math.exp(sum(math.log(ours / theirs) for ours, theirs in pairs) / len(pairs))


def _keep(folder: Path, k: int) -> None:
    """Make K the saved model's experts_per_token."""
    path = folder / CONFIG_FILE
    values = json.loads(path.read_text(encoding="utf-8"))
    values[CONFIG_KEY]["experts_per_token"] = k
    write_bytes(path, json.dumps(values, indent=1).encode())


def _save(
    output: Path, frontier: Frontier, made: StreamedBootstrap, settings: Settings
) -> None:
    write_json(output / "frontier.json", [asdict(point) for point in frontier.points])
    rows = [asdict(report) for report in frontier.layers]
    write_json(output / "layers.json", [_finite(row) for row in rows])
    write_stats(output, made.cluster_stats, settings)
    draw_frontier(
        output / "frontier.png",
        {
            label: [(p.experts_per_token, p.ffn_flops_fraction, y) for p, y in values]
            for label, values in _lines(frontier).items()
        },
    )


def _lines(frontier: Frontier) -> dict[str, list[tuple[Point, float | None]]]:
    lines = {"domains of the calibration text": [(p, p.ratio) for p in frontier.points]}
    if frontier.unseen:
        unseen = [(p, p.unseen_ratio) for p in frontier.points]
        lines["domains not in the calibration text"] = unseen
    return lines


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
