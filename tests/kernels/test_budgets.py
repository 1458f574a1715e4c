"""Every shipped configuration keeps its budgets: compiled here, no GPU needed."""

from __future__ import annotations

from functools import cache

import pytest

from samv2_kernels.audit import Failure, Row, run
from samv2_kernels.audit.cli import complaints
from samv2_kernels.audit.model import ARCHITECTURES
from samv2_kernels.gpu.specs import shipped_specs

JOBS = 2
FIRST = "sm_86"
"""Of the A40; the others need a few minutes of compilation."""
EVERY_ARCH = [
    pytest.param(arch, marks=[] if arch == FIRST else pytest.mark.slow)
    for arch in ARCHITECTURES
]


@cache
def results(arch: str) -> list[Row | Failure]:
    """What came of every shipped configuration."""
    specs = shipped_specs(arch)
    return run(specs, [arch] * len(specs), jobs=JOBS)


@pytest.mark.parametrize("arch", EVERY_ARCH)
def test_shipped_configurations_keep_their_budgets(arch: str) -> None:
    assert len(results(arch)) == len(shipped_specs(arch)) > 0
    assert complaints(results(arch)) == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kind_of_kernel_ships(arch: str) -> None:
    kinds = {(spec.direction, spec.weights) for spec in shipped_specs(arch)}
    matmuls = {
        (direction, weights)
        for direction in ("forward", "dx")
        for weights in ("nf4", "bf16")
    }
    assert matmuls | {("route", "none")} <= kinds


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_configurations_have_names_of_their_own(arch: str) -> None:
    names = [(spec.kernel, spec.config) for spec in shipped_specs(arch)]
    assert len(set(names)) == len(names)
