"""Memory of a client's training, measured against the estimate, on real SmolLM2.

    pytest bench/bench_memory.py --benchmark-enable -s

Each case trains in a process of its own: the model is bootstrapped once, a client's text
is the calibration text of a built-in domain. Measured is the growth of the resident set
from before the model is read to its peak while training; freed memory is given back to
the system at once (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_), so that the peak is
what is live and not what malloc keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 0.10
SETTINGS = [
    "experts.num_experts=16",
    "experts.experts_per_token=8",
    "experts.num_shared=2",
    "experts.layers=1-",
    "experts.cluster_starts=1",
    "experts.calibration_tokens=4096",
    "experts.surrogate_rank=16",
    "assembler.width=0",
    "train.train_gate=false",
    "train.local_steps=2",
    "edits.rho_max=0",
    "data.domains=python,pydoc",
    "federation.clients=2",
    "federation.rounds=1",
    "federation.eval_windows=1",
]
CASES = {
    "whole, 4 windows": {"experts": 16, "k": 8, "micro": 0},
    "whole, 1 window": {"experts": 16, "k": 8, "micro": 1},
    "half of the experts, 4 windows": {"experts": 8, "k": 8, "micro": 0},
    "half of the experts, 1 window": {"experts": 8, "k": 8, "micro": 1},
    "a quarter, K = 4, 1 window": {"experts": 4, "k": 4, "micro": 1},
    "whole, K = E, 2 windows": {"experts": 16, "k": 16, "micro": 2},
}


@pytest.fixture(scope="module", params=["none", "nf4"])
def bootstrapped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A run directory with a bootstrapped model and shards, and its settings."""
    from rich.console import Console

    from samv2.common.config import load_settings
    from samv2.federated.prepare import prepare
    from samv2.federated.run_folder import open_run

    root = tmp_path_factory.mktemp("memory") / "run"
    overrides = [*SETTINGS, f"experts.quantise={request.param}"]
    settings = load_settings(None, overrides)
    run = open_run(root, settings, resume=False, overwrite=False)
    prepare(run, settings, Console(quiet=True))
    return root, overrides


def measure(root: Path, overrides: list[str], case: dict[str, int]) -> dict[str, Any]:
    """One client's round in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(root), json.dumps(case), json.dumps(overrides)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "train_part.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_within_a_tenth(
    benchmark: Any, bootstrapped: tuple[Path, list[str]], name: str
) -> None:
    found = benchmark.pedantic(
        measure, args=(*bootstrapped, CASES[name]), rounds=1, iterations=1
    )
    measured, parts = found["measured"], found["parts"]
    ratio = parts["total"] / measured
    shown = "  ".join(f"{k} {v / 1e6:.0f}" for k, v in parts.items())
    kind = bootstrapped[1][-1].rpartition("=")[2]
    print(f"\n{kind:4} {name}: measured {measured / 1e6:.0f} MB, {shown}, {ratio:.2f}")
    benchmark.extra_info["estimate_over_measured"] = ratio
    assert 1 - MARGIN <= ratio <= 1 + MARGIN
