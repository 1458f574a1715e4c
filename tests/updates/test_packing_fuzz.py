"""The fuzz target of the codec runs under sanitizers; scripts/fuzz_frames.sh says how."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/fuzz_frames.sh"


def fuzz_frames(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *options], cwd=ROOT, capture_output=True, text=True
    )


def test_help_teaches_and_wrong_usage_is_refused() -> None:
    told = fuzz_frames("--help")
    assert told.returncode == 0
    assert "--seconds S" in told.stdout and "wrong usage" in told.stdout
    for options in (["--second", "3"], ["--seconds"], ["--seconds", "soon"]):
        refused = fuzz_frames(*options)
        assert refused.returncode == 2 and "see --help" in refused.stderr


@pytest.mark.slow
def test_no_frame_breaks_a_property_in_half_a_minute(tmp_path: Path) -> None:
    if not (shutil.which("clang++") or shutil.which("g++")):
        pytest.skip("no C++ compiler: neither clang++ nor g++ is there")
    run = fuzz_frames("--seconds", "30", "--corpus", str(tmp_path / "corpus"))
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    (executions,) = [line for line in lines if line.startswith("executions ")]
    assert int(executions.split()[1]) > 5000
    (accepted,) = [line for line in lines if line.endswith("  accepted")]
    assert float(accepted.split()[1]) > 10
