"""``samv2 bootstrap``: dense model to expert graph, with its quality frontier."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from samv2.commands.options import add_settings_options, settings_help


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "bootstrap",
        help="turn a dense model into an expert graph",
        description="Clusters the FFN rows of a Llama-style model into experts, "
        "calibrates gate and surrogates on text, and saves a folder for `samv2 train "
        "--set model.path=DIR`. Prints held-out perplexity against FFN arithmetic for "
        "several numbers of experts a token.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="hub id, local folder, GGUF file, or smollm2 (fetched)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an expert graph in DIR"
    )
    add_settings_options(parser, default=None)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.config import load_settings
    from samv2.common.telemetry import make_console, number_table
    from samv2.configs import config_path
    from samv2.federated.frontier import bootstrap_with_frontier

    path = config_path(arguments.config) if arguments.config else None
    overrides = [*arguments.overrides, f"model.path={arguments.model}"]
    settings = load_settings(path, overrides)
    console = make_console()
    frontier = bootstrap_with_frontier(
        settings, arguments.output, overwrite=arguments.overwrite, console=console
    )
    domains = list(frontier[0]["dense_perplexity"])
    rows = [["dense", "100%", *_cells(frontier[0]["dense_perplexity"], domains)]]
    for point in frontier:
        share = f"{point['ffn_flops_fraction']:.0%}"
        cells = _cells(point["perplexity"], domains)
        rows.append([f"K = {point['experts_per_token']}", share, *cells])
    console.print(
        number_table(
            "Held-out perplexity against FFN arithmetic",
            ["experts a token", "FFN FLOPs", *domains],
            rows,
        )
    )
    console.print(
        f"Saved {arguments.output}. Next: samv2 train --set "
        f"model.path={arguments.output}, or samv2 eval {arguments.output}"
    )
    return 0


def _cells(perplexity: dict[str, float | None], domains: list[str]) -> list[str]:
    values = [perplexity[name] for name in domains]
    return ["inf" if value is None else f"{value:.2f}" for value in values]
