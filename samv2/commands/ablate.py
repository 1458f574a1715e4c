"""``samv2 ablate``: a grid of settings to one table, a row a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from samv2.ablation.factors import ENGINE, NAMES, SWITCHES
from samv2.commands.options import add_settings_options, settings_help

DESCRIPTION = """\
Runs a federation for every combination of the settings that are varied, and writes
ablation.csv: a row a run with all settings, results, and a column for each bound that
was checked on what the run wrote (masks upper triangular, edits, experts and bytes sent
within their budgets, bytes and FLOPs as reported). Everything is checked before anything
runs. Runs are resumed: the same command goes on where it was stopped, and a run that
finished is not run again. Runs that differ in training alone share one converted model.

Exit status 1 says that a run failed or broke a bound; the table says which.
"""
EXAMPLES = f"""\
readable names of factors (others are varied by their key):
  {', '.join(SWITCHES)}    on, off, or a number
  {', '.join(name for name in NAMES if name not in SWITCHES)}
no factors:
  {', '.join(ENGINE)}
      (how runs are carried out), and distill.* (of `samv2 bootstrap`)
examples:
  samv2 ablate --config demo --vary K=8,12 --vary codec=int8,int4 --log-dir grids/1
      four runs
  samv2 ablate --preset components --log-dir grids/2
      the demo, and the demo without each of its parts
  samv2 ablate --config my-grid.toml
      a settings file with a table [vary], e.g.  K = [8, 12]  and, at its top,
      one_at_a_time = true  and  base = "demo"
  samv2 ablate --set model.path=my-experts --vary "layers=1-;10-" --one-at-a-time
      values that hold commas are separated by semicolons

"""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "ablate",
        help="run a grid of settings and compare",
        description=DESCRIPTION,
        epilog=EXAMPLES + settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings_options(parser, default=None)
    parser.add_argument(
        "--vary",
        metavar="KEY=V1,V2,...",
        action="append",
        default=[],
        help="vary a setting (repeatable; every combination is run)",
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="run the base, and each value alone, instead of every combination",
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="a shipped grid: components, budget or graph"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="runs side by side, one thread each (default: what cores and memory allow)",
    )
    parser.add_argument(
        "--recheck",
        action="store_true",
        help="check the bounds of finished runs again, on the files as they are now",
    )
    parser.add_argument(
        "--log-dir",
        type=Path,
        default=Path("ablation"),
        metavar="DIR",
        help="directory of the grid (default: ablation)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.ablation.ablate import ablate
    from samv2.ablation.factors import parse_vary
    from samv2.ablation.grid_file import read_grid
    from samv2.ablation.results import CSV, DONE, effects_table
    from samv2.common.telemetry import make_console

    console = make_console()
    grid = read_grid(
        preset=arguments.preset,
        config=arguments.config,
        overrides=arguments.overrides,
        vary=parse_vary(arguments.vary),
        one_at_a_time=arguments.one_at_a_time,
    )
    found = ablate(
        grid,
        arguments.log_dir,
        jobs=arguments.jobs,
        recheck=arguments.recheck,
        console=console,
    )
    if found.effects:
        console.print()
        console.print(effects_table(found.effects))
    unsound = [row for row in found.rows if row["status"] != DONE]
    console.print(
        f"{len(found.rows)} runs, {len(unsound)} of them failed or outside a bound. "
        f"The table is {arguments.log_dir / CSV}.",
        soft_wrap=True,
    )
    for row in unsound:
        console.print(f"  {row['name']}: {row['status']}", markup=False)
    return 0 if found.sound else 1
