"""The command ``python -m samv2_kernels.audit``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence

from samv2_kernels.audit.budgets import BUDGETS, broken
from samv2_kernels.audit.model import ARCHITECTURES
from samv2_kernels.audit.pool import run
from samv2_kernels.audit.row import Failure, Row
from samv2_kernels.audit.table import NOTE, print_table, progress
from samv2_kernels.gpu.spec import KernelSpec

SHIPPED = "samv2_kernels.gpu.specs:shipped_specs"
DESCRIPTION = """\
Compile every kernel in every shipped configuration, ahead of time and without a GPU, and
read the machine code: registers, spills, shared memory, tensor-core share of the main
loop, width of the weight loads, instructions and load/store instructions per weight.
Occupancy and what binds on an A40 are static models. Nothing is timed."""
EPILOG = """\
columns
  regs, spill B   registers and bytes of spilled registers, per thread
  smem KB         shared memory per block
  blk/SM, occup.  blocks an SM holds at once, share of its warps (static model)
  HMMA            tensor-core instructions over all of the main loop
  load B          widest load of the weights by one thread, in the main loop
  instr/w, LSU/w  thread instructions of the main loop per weight it consumes
  A40 bound       slowest of issue, LSU, tensor cores and DRAM, and its time over the
                  larger one of the last two (static model; sm_86 only)

exit status
  0  every row keeps the budgets (listed by --budgets)
  1  a row breaks one, or a kernel does not compile; the rows are named
  2  the command was misused

examples
  python -m samv2_kernels.audit --arch sm_86
  python -m samv2_kernels.audit --arch sm_80 sm_90 --kernel gate_up --json
  python -m samv2_kernels.audit --specs my_module:candidates"""


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    result = argparse.ArgumentParser(
        prog="python -m samv2_kernels.audit",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--arch",
        nargs="+",
        choices=tuple(ARCHITECTURES),
        default=list(ARCHITECTURES),
        help="architectures to compile for (default: all)",
    )
    result.add_argument(
        "--kernel", nargs="+", metavar="NAME", help="only kernels of these names"
    )
    result.add_argument("--json", action="store_true", help="print a list of JSON rows")
    result.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that compile (default: %(default)s, the CPUs of this machine)",
    )
    result.add_argument(
        "--specs",
        default=SHIPPED,
        metavar="MODULE:FUNCTION",
        help="what returns the KernelSpecs of an architecture (default: %(default)s)",
    )
    result.add_argument(
        "--budgets", action="store_true", help="print the budgets and compile nothing"
    )
    return result


def load(name: str) -> Callable[[str], Sequence[KernelSpec]]:
    """The function that ``MODULE:FUNCTION`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def select(
    specs_of: Callable[[str], Sequence[KernelSpec]],
    archs: Sequence[str],
    kernels: Sequence[str] | None,
) -> list[tuple[KernelSpec, str]]:
    """Specs and architectures to compile.

    Raises:
        ValueError: a kernel is asked for that no architecture ships, or none is left.
    """
    everything = [(spec, arch) for arch in archs for spec in specs_of(arch)]
    names = {spec.kernel for spec, _ in everything}
    if unknown := set(kernels or ()) - names:
        raise ValueError(f"no kernel {sorted(unknown)}; there are {sorted(names)}")
    chosen = [pair for pair in everything if not kernels or pair[0].kernel in kernels]
    if not chosen:
        raise ValueError(f"no kernel ships for {', '.join(archs)}")
    return chosen


def complaints(results: Sequence[Row | Failure]) -> list[str]:
    """One line for every broken budget and every kernel that does not compile."""
    lines = []
    for result in results:
        name = f"{result.arch} {result.kernel} [{result.config}]"
        if isinstance(result, Failure):
            lines.append(f"{name}: does not compile: {result.message}")
        else:
            lines += [f"{name}: {message}" for message in broken(result)]
    return lines


def print_budgets() -> None:
    """One line a budget."""
    for budget in BUDGETS:
        word = "at least" if budget.at_least else "at most"
        limit = "by row" if callable(budget.limit) else f"{budget.limit:g}"
        print(f"{budget.figure:<26} {word} {limit:<7} {budget.meaning}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.budgets:
        print_budgets()
        return 0
    try:
        tasks = select(load(arguments.specs), arguments.arch, arguments.kernel)
    except ValueError as error:
        command.error(str(error))
    with progress(len(tasks)) as done:
        specs, archs = zip(*tasks, strict=True)
        results = run(specs, archs, jobs=arguments.jobs, done=done)
    rows = [result for result in results if isinstance(result, Row)]
    if arguments.json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
    else:
        for arch in arguments.arch:
            print_table(arch, [row for row in rows if row.arch == arch])
        print(NOTE)
    lines = complaints(results)
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0
