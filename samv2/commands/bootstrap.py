"""``samv2 bootstrap``: dense model to expert graph, with its quality frontier."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from samv2.commands.options import add_settings_options, settings_help

DESCRIPTION = """\
Turns a dense Llama-style model into a graph of experts, without training: the rows of
each FFN are clustered into E experts, and for each K a closed-form repair brings the
model that visits K of them back to the dense one, layer by layer, on calibration text.
One layer is in memory at a time. Prints held-out perplexity against FFN arithmetic, and
writes a folder for `samv2 train --set model.path=DIR` and `ExpertModel.from_pretrained`.

A bootstrap that was stopped goes on from the work it stored (.NAME.partial beside DIR)
when the same command is given again.
"""
EXAMPLES = """\
examples:
  samv2 bootstrap my-org/my-llama --output my-experts --flops 0.5
      K is what half of the dense FFN arithmetic pays for
  samv2 bootstrap smollm2 --config frontier --also-score factbook,politics,math \\
        --output smol-experts
      the shipped settings for quality, scored on domains it was not calibrated on too
  samv2 bootstrap smollm2 --set experts.quantise=nf4 --output small-experts
      expert blocks in 4 bits; the table shows perplexity before and after

"""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "bootstrap",
        help="turn a dense model into an expert graph",
        description=DESCRIPTION,
        epilog=EXAMPLES + settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="hub id, local folder, GGUF file, or smollm2 (fetched)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an expert graph in DIR, and begin anew",
    )
    parser.add_argument(
        "--flops",
        type=float,
        metavar="F",
        help="choose the largest K at no more than this share of the dense FFN "
        "arithmetic, e.g. 0.5; dense layers count",
    )
    parser.add_argument(
        "--target-ppl-ratio",
        type=float,
        metavar="R",
        help="convert for K = E/8, E/4, E/2, 3E/4 too, and keep the smallest K whose "
        "held-out perplexity is at most R times the dense one, e.g. 1.2",
    )
    parser.add_argument(
        "--also-score",
        action="append",
        default=[],
        metavar="NAME[=PATH],...",
        help="domains to score that the model is not calibrated on (repeatable)",
    )
    parser.add_argument(
        "--per-layer", action="store_true", help="print visits and error of each layer"
    )
    add_settings_options(parser, default=None)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.config import load_settings
    from samv2.common.telemetry import make_console
    from samv2.configs import config_path
    from samv2.federated.frontier import bootstrap_with_frontier
    from samv2.federated.frontier_choice import FrontierOptions
    from samv2.federated.frontier_report import show_frontier

    path = config_path(arguments.config) if arguments.config else None
    overrides = [*arguments.overrides, f"model.path={arguments.model}"]
    settings = load_settings(path, overrides)
    listed = ",".join(arguments.also_score).split(",")
    options = FrontierOptions(
        flops=arguments.flops,
        target_ppl_ratio=arguments.target_ppl_ratio,
        also_score=tuple(name.strip() for name in listed if name.strip()),
    )
    console, output = make_console(), arguments.output
    try:
        frontier = bootstrap_with_frontier(
            settings,
            output,
            options=options,
            overwrite=arguments.overwrite,
            console=console,
        )
    except KeyboardInterrupt:
        console.print(
            (
                f"Stopped; {output} is what it was before, and --overwrite begins anew."
                if output.exists()
                else "Stopped. The same command, without --overwrite, goes on from there."
            ),
            markup=False,
        )
        return 130
    show_frontier(
        frontier,
        output,
        console,
        target=options.target_ppl_ratio,
        per_layer=arguments.per_layer,
    )
    again = ["samv2", "eval", str(output)]
    again += ["--config", arguments.config] if arguments.config else []
    again += [part for item in arguments.overrides for part in ("--set", item)]
    train = ["samv2", "train", "--set", f"model.path={output}"]
    console.print(f"Next: {shlex.join(train)}", soft_wrap=True, markup=False)
    console.print(f"      {shlex.join(again)}", soft_wrap=True, markup=False)
    return 0
