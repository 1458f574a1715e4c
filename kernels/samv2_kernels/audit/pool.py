"""Compile many specs in parallel processes that never run Triton as interpreter."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from samv2_kernels.audit.row import Failure, Row
from samv2_kernels.gpu.spec import KernelSpec

INTERPRET = "TRITON_INTERPRET"
Done = Callable[[], None]


@dataclass(frozen=True)
class FunctionName:
    """Where another process finds a kernel: compiled functions do not pickle."""

    module: str
    name: str

    def find(self) -> Any:
        """Import it."""
        return reduce(
            getattr, self.name.split("."), importlib.import_module(self.module)
        )


def name_of(function: Any) -> FunctionName:
    """Name of a ``triton.jit`` function, compiled or interpreted."""
    while hasattr(function, "fn"):
        function = function.fn
    if "<locals>" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} must be global for other processes")
    return FunctionName(function.__module__, function.__qualname__)


def portable(spec: KernelSpec) -> KernelSpec:
    """The same spec, with the function by name."""
    values = dict(signature=dict(spec.signature), constexprs=dict(spec.constexprs))
    return replace(
        spec, function=name_of(spec.function), options=dict(spec.options), **values
    )


def audit_one(spec: KernelSpec, arch: str) -> Row | Failure:
    """Compile a portable spec; runs in a child process."""
    from samv2_kernels.audit.compile import build
    from samv2_kernels.audit.row import make_row

    try:
        found = replace(spec, function=spec.function.find())
        return make_row(found, arch, build(found, arch))
    except Exception as error:  # Whatever the compiler raises becomes a row's verdict.
        return failure(spec, arch, causes(error))


def causes(error: BaseException | None) -> str:
    """An error and what it came from: Triton's compiler names the fault only there."""
    messages = []
    while error is not None:
        messages.append(f"{type(error).__name__}: {error}".strip())
        error = error.__cause__
    return "; because of ".join(messages)


def failure(spec: KernelSpec, arch: str, message: str) -> Failure:
    """That a spec did not compile, and why."""
    return Failure(spec.kernel, arch, spec.config, message)


@contextmanager
def without_interpreter() -> Iterator[None]:
    """Child processes started here compile kernels, whatever this process does."""
    old = os.environ.pop(INTERPRET, None)
    try:
        yield
    finally:
        if old is not None:
            os.environ[INTERPRET] = old


def run_together(
    tasks: Sequence[tuple[KernelSpec, str]], jobs: int, done: Done
) -> list[Row | Failure | None]:
    """Results in the order of the tasks; None: a child died before it was done."""
    results: list[Row | Failure | None] = [None] * len(tasks)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        futures: dict[Future[Row | Failure], int] = {}
        try:
            for index, task in enumerate(tasks):
                futures[pool.submit(audit_one, *task)] = index
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done()
        except BrokenProcessPool:
            pass  # Whoever is left without a result runs alone, below.
    return results


def run(
    specs: Sequence[KernelSpec],
    archs: Sequence[str],
    *,
    jobs: int | None = None,
    done: Done = lambda: None,
) -> list[Row | Failure]:
    """Audit every spec on every architecture.

    Args:
        specs: their functions must be global in an importable module.
        archs: one per spec.
        jobs: processes; default: the CPUs of this machine.
        done: called after every result.

    Returns:
        One result a spec, in order. LLVM aborts the process on, say, inline assembly with
        a wrong number of constraints: then those left run one a process, so that only the
        culprit fails.
    """
    tasks = [(portable(spec), arch) for spec, arch in zip(specs, archs, strict=True)]
    if not tasks:
        return []
    with without_interpreter():
        results = run_together(tasks, jobs or os.cpu_count() or 1, done)
        for index, result in enumerate(results):
            if result is None:
                results[index] = run_together([tasks[index]], 1, done)[0] or failure(
                    *tasks[index], "the compiler aborted its process"
                )
    return [result for result in results if result is not None]
