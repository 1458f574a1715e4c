"""``samv2 eval``: held-out perplexity per domain, dense and expert graph side by side."""

from __future__ import annotations

import argparse
import json
from typing import Any

from samv2.commands.options import add_settings_options


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "eval",
        help="held-out perplexity of a run or model",
        description="Scores a run directory, a bootstrapped folder or a dense model on "
        "held-out text per domain. A run is scored on its own clients' held-out text, "
        "together with the dense model it was made from.",
    )
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="run directory, folder, hub id, smollm2"
    )
    parser.add_argument(
        "--text",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="score your own text instead (repeatable)",
    )
    parser.add_argument(
        "--experts", type=int, metavar="K", help="experts a token visits"
    )
    parser.add_argument(
        "--windows", type=int, metavar="N", help="held-out windows a domain"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    add_settings_options(parser, default=None)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.telemetry import make_console, number_table
    from samv2.configs import config_path
    from samv2.federated.evaluation import evaluate

    progress = make_console(stderr=True)
    result = evaluate(
        arguments.model,
        texts=arguments.text,
        experts_per_token=arguments.experts,
        eval_windows=arguments.windows,
        config=config_path(arguments.config) if arguments.config else None,
        overrides=arguments.overrides,
        console=progress,
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
        return 0
    columns = ["domain", *result["models"]]
    rows = [
        [
            name,
            *(_cell(result["models"][model].get(name)) for model in result["models"]),
        ]
        for name in result["domains"]
    ]
    console = make_console()
    console.print(
        number_table(
            f"Held-out perplexity of {result['name']}",
            columns,
            rows,
            caption=f"{result['windows']} windows of {result['sequence_length']} tokens "
            "a client and domain at most",
        )
    )
    return 0


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
