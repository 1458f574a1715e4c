"""Compile every shipped kernel without a GPU and read what the compiler made of it.

``python -m samv2_kernels.audit`` prints the table; :func:`audit_specs` is the same as a
function. Registers, spills, shared memory and instruction counts are facts of the compiled
code; occupancy and the A40 bound are static models. No figure here is a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from samv2_kernels.audit.budgets import BUDGETS, Budget, broken
from samv2_kernels.audit.pool import run
from samv2_kernels.audit.row import Failure, Row
from samv2_kernels.gpu.spec import KernelSpec

__all__ = ["BUDGETS", "Budget", "Failure", "Row", "audit_specs", "broken", "run"]


def audit_specs(
    specs: Iterable[KernelSpec], arch: str, *, jobs: int | None = None
) -> list[Row]:
    """Compile specs for one architecture, in other processes.

    Call it under ``if __name__ == "__main__":`` in a script, as for any use of
    ``multiprocessing``. Works while this process has ``TRITON_INTERPRET`` set.

    Args:
        specs: their functions must be global in an importable module.
        arch: ``sm_80``, ``sm_86``, ``sm_89`` or ``sm_90``.
        jobs: processes; default: the CPUs of this machine.

    Returns:
        One row a spec, in order.

    Raises:
        RuntimeError: some do not compile; the message names all of them.
    """
    wanted: Sequence[KernelSpec] = list(specs)
    results = run(wanted, [arch] * len(wanted), jobs=jobs)
    failures = [r for r in results if isinstance(r, Failure)]
    if failures:
        raise RuntimeError(
            "\n".join(f"{f.kernel} {f.config} {f.arch}: {f.message}" for f in failures)
        )
    return [r for r in results if isinstance(r, Row)]
