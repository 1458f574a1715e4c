"""``samv2 demo``: the whole story on a small real model and real text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from samv2.commands.options import add_run_options, add_settings_options, settings_from

STORY = """\
[bold]SAM-v2 demo[/bold]: one pre-trained LLM, {clients} clients with different text, \
{rounds} rounds.
  1. fetch SmolLM2-135M-Instruct and real text (once, into {cache})
  2. cut the model's FFNs into {experts} experts a layer; a token visits {visits}
  3. every client trains on its own text and sends only the experts that changed most
  4. the server merges them and edits the expert graph
"""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "demo",
        help="fetch a small real model and real text, and run a federation (minutes)",
        description="Fetches a 135M-parameter model and real text of six domains (about "
        "190 MB, once), turns the model into an expert graph, trains it across six "
        "clients, and reports. Takes a few minutes on two CPU cores.",
    )
    add_settings_options(parser, default="demo")
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.commands.summary import show_summary
    from samv2.common.fetch import cache_dir
    from samv2.common.telemetry import make_console
    from samv2.federated.server_app import run_embedded

    settings = settings_from(arguments)
    console = make_console()
    story = STORY.format(
        clients=settings.federation.clients,
        rounds=settings.federation.rounds,
        cache=cache_dir(),
        experts=settings.experts.num_experts,
        visits=settings.experts.experts_per_token,
    )
    console.print(story)
    root: Path = arguments.log_dir
    summary = run_embedded(
        settings,
        root,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        console=console,
    )
    show_summary(summary, root, console)
    return 0
