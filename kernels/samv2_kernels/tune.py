"""Time tile configurations on this machine's GPU and keep the winners on disk.

``python -m samv2_kernels.tune`` runs every case of ``samv2_kernels.gpu.bench_cases`` with
every candidate of ``samv2_kernels.gpu.configs``. A candidate that does not compile, needs
more than the GPU has or fails to run loses and is reported; a case that no candidate
survives stores nothing. Winners are written after each case, so that an interrupted run
keeps what it measured.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from triton import testing

from samv2_kernels import tuned

Timer = Callable[[Callable[[], object]], float]
"""Milliseconds of a call, synchronised."""
Candidates = Callable[[str, str], Sequence[Mapping[str, int]]]
"""Configurations of a kernel on an architecture."""
Store = Callable[[str, tuned.Key, tuned.Config], None]

DESCRIPTION = """\
Time every candidate tile configuration on this machine's GPU and store the fastest ones.
samv2_kernels then uses them in place of its rules, for the same device, Triton, package
version, kernel source and shape. Needs a CUDA GPU."""
EPILOG = f"""\
environment
  {tuned.VARIABLE}   file of the winners in place of ~/.cache/samv2_kernels/tuned.json;
                        "off": neither read nor written

exit status
  0  every case has a winner
  1  some case has none: all its candidates failed
  2  there is no CUDA GPU, or the command was misused"""
NO_GPU = (
    "There is no CUDA GPU here: nothing was timed, nothing stored. Without tuning, "
    "configurations are chosen by rule (samv2_kernels/gpu/configs.py)."
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape and row count."""

    kernel: str
    key: Mapping[str, int | str]
    """What the kernel looks its configuration up by."""
    prepare: Callable[[], Callable[[], object]]
    """Makes the inputs and returns what runs the kernel on them."""

    def __str__(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.key.items())
        return f"{self.kernel} {shape}"


@dataclass(frozen=True)
class Outcome:
    """What the candidates of a case did."""

    case: Case
    config: tuned.Config | None
    """The fastest; of equals, the first. None: none survived."""
    milliseconds: float | None
    slowest_milliseconds: float | None
    failures: tuple[tuple[tuned.Config, str], ...] = field(default=())


def gpu_timer(run: Callable[[], object]) -> float:
    """Median of ``triton.testing.do_bench``: warmed up, L2 flushed between calls."""
    return testing.do_bench(run, warmup=50, rep=200, return_mode="median")


def tune_case(
    case: Case, candidates: Sequence[Mapping[str, int]], timer: Timer
) -> Outcome:
    """Time every candidate of a case.

    Args:
        case: its kernel must ask :func:`samv2_kernels.tuned.lookup` for its tiles.
        candidates: configurations to try, in order of preference.
        timer: milliseconds of a call; whatever it or the kernel raises, other than an
            interrupt, disqualifies the candidate.
    """
    run = case.prepare()
    times: list[tuple[float, int]] = []
    failures = []
    for index, candidate in enumerate(candidates):
        config = dict(candidate)
        try:
            with tuned.forced(case.kernel, config):
                times.append((timer(run), index))
        except Exception as error:  # Compilers and drivers raise anything.
            failures.append((config, f"{type(error).__name__}: {error}"))
    if not times:
        return Outcome(case, None, None, None, tuple(failures))
    best, index = min(times)
    return Outcome(case, dict(candidates[index]), best, max(times)[0], tuple(failures))


def tune(
    cases: Sequence[Case],
    *,
    candidates: Candidates,
    arch: str,
    store: Store,
    timer: Timer = gpu_timer,
) -> Iterator[Outcome]:
    """Tune cases one by one; each winner is stored before its outcome is given.

    Args:
        cases: what to time.
        candidates: of each case's kernel.
        arch: e.g. ``sm_86``.
        store: keeps a winner.
        timer: milliseconds of a call.
    """
    for case in cases:
        outcome = tune_case(case, candidates(case.kernel, arch), timer)
        if outcome.config is not None:
            store(case.kernel, case.key, outcome.config)
        yield outcome


def describe(outcome: Outcome) -> str:
    """One line about a case, one more for every candidate that failed."""
    if outcome.config is None:
        lines = [f"{outcome.case}: every candidate failed"]
    else:
        tiles = " ".join(f"{name}={value}" for name, value in outcome.config.items())
        lines = [
            f"{outcome.case}: {tiles}, {outcome.milliseconds:.4f} ms "
            f"(slowest candidate {outcome.slowest_milliseconds:.4f} ms)"
        ]
    for config, message in outcome.failures:
        lines.append(f"  failed: {config}: {message.splitlines()[0]}")
    return "\n".join(lines)


def run_command(
    cases: Sequence[Case],
    candidates: Candidates,
    arch: str,
    path: Path | None,
    timer: Timer = gpu_timer,
) -> int:
    """Tune, print a line a case, return the exit status; None as path stores nothing."""

    def store(kernel: str, key: tuned.Key, config: tuned.Config) -> None:
        if path is not None:
            tuned.store_tuned(kernel, key, config, path)

    status = 0
    options = dict(candidates=candidates, arch=arch, store=store, timer=timer)
    for number, outcome in enumerate(tune(cases, **options), start=1):
        print(f"[{number}/{len(cases)}] {describe(outcome)}", flush=True)
        status |= outcome.config is None
    print(f"stored in {path}" if path else f"not stored: {tuned.VARIABLE} is off")
    return int(status)


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    result = argparse.ArgumentParser(
        prog="python -m samv2_kernels.tune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--kernel", nargs="+", metavar="NAME", help="only kernels of these names"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    cases = importlib.import_module("samv2_kernels.gpu.bench_cases").cases()
    candidates = importlib.import_module("samv2_kernels.gpu.configs").candidates
    names = {case.kernel for case in cases}
    if unknown := set(arguments.kernel or ()) - names:
        command.error(f"no kernel {sorted(unknown)}; there are {sorted(names)}")
    wanted = [c for c in cases if not arguments.kernel or c.kernel in arguments.kernel]
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return run_command(wanted, candidates, arch, tuned.cache_path())


if __name__ == "__main__":
    sys.exit(main())
