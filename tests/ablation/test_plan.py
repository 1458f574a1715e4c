"""From factors to runs; impossible ones are found before any starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from samv2.ablation.factors import read_factors
from samv2.ablation.plan import PlannedRun, impossible, plan_runs
from samv2.common.config import given_values
from samv2.common.errors import ConfigError
from tests.federated.runs import SMALL, small_settings


def plan(model: Path, vary: dict[str, Any], *, alone: bool = False) -> list[PlannedRun]:
    """A grid over :data:`SMALL` on a model."""
    values, _ = given_values(None, [*SMALL, f"model.path={model}"])
    return plan_runs(values, read_factors(vary, values), one_at_a_time=alone)


def test_every_combination_once(tiny_llama_folder: Path) -> None:
    runs = plan(tiny_llama_folder, {"K": [4, 8], "assembler": ["on", "16", "off"]})
    assert [run.levels for run in runs] == [
        {"K": k, "assembler": word} for k in ("4", "8") for word in ("on", "off")
    ]
    assert [run.name.rpartition("-")[0] for run in runs] == [
        f"K={k}_assembler={word}" for k in (4, 8) for word in ("on", "off")
    ]
    assert [run.settings.assembler.width for run in runs] == [16, 0, 16, 0]
    assert len({run.name for run in runs}) == 4
    again = plan(tiny_llama_folder, {"assembler": ["off"], "K": [8]})
    assert again[0].name.rpartition("-")[2] == runs[3].name.rpartition("-")[2]
    assert all(run.settings.federation.workers == 1 for run in runs)
    assert all(run.settings.federation.keep_frames for run in runs)


def test_each_factor_alone(tiny_llama_folder: Path) -> None:
    vary = {"K": [4, 8], "edits.rho_max": [0], "chains": ["on"]}
    runs = plan(tiny_llama_folder, vary, alone=True)
    assert [run.name.rpartition("-")[0] for run in runs] == [
        "base",
        "K=8",  # K = 4 is the base
        "rho_max=0",
        "chains=on",
    ]
    base = {"K": "4", "edits.rho_max": "8", "chains": "off"}
    assert [run.levels for run in runs] == [
        base,
        base | {"K": "8"},
        base | {"edits.rho_max": "0"},
        base | {"chains": "on"},
    ]


def test_runs_that_differ_in_training_share_a_conversion(
    tiny_llama_folder: Path,
) -> None:
    def ids(key: str, *values: Any) -> tuple[int, int, int]:
        runs = plan(tiny_llama_folder, {key: list(values)})
        assert len(runs) == len(values)
        return tuple(
            len({str(getattr(run, name)) for run in runs})
            for name in ("conversion", "trainables", "text")
        )

    assert ids("codec", "int4", "int8", "raw") == (1, 1, 1)
    assert ids("train.local_steps", 1, 2) == (1, 1, 1)
    assert ids("edits.rho_max", 1, 2) == (1, 1, 1)
    assert ids("rank", 2, 4) == (1, 2, 1)
    assert ids("assembler", "on", "off") == (1, 2, 1)
    assert ids("federation.clients", 1, 2) == (1, 1, 2)
    assert ids("federation.eval_windows", 1, 2) == (1, 1, 2)
    assert ids("K", 4, 8) == (2, 1, 1)
    assert ids("surrogates", "on", "off") == (2, 1, 1)
    assert ids("seed", 0, 1) == (2, 1, 2)
    assert ids("train.sequence_length", 32, 64) == (2, 1, 2)


def test_every_impossible_combination_is_named(tiny_llama_folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tiny_llama_folder, {"K": [4, 12], "E": [8, 3], "rank": [4, 65]})
    faults = caught.value.faults
    assert sum("E=3" in fault and "does not divide" in fault for fault in faults) == 0
    for label, words in {
        "K=4_E=3_rank=4": "experts.experts_per_token is 4",
        "K=12_E=8_rank=4": "experts.experts_per_token is 12",
        "K=4_E=8_rank=65": "adapter.rank is 65",
    }.items():
        assert any(f.startswith(f"{label}: ") and words in f for f in faults), label
    assert not any(fault.startswith("K=4_E=8_rank=4: ") for fault in faults)
    with pytest.raises(ConfigError, match="K=2_E=3: .*does not divide the FFN's 128"):
        plan(tiny_llama_folder, {"K": [2], "E": [3, 8]})


def test_faults_of_every_kind_are_found(
    tiny_llama_folder: Path, expert_folder: Path
) -> None:
    assert impossible(small_settings(tiny_llama_folder)) == []
    assert impossible(small_settings(expert_folder, "adapter.rank=2")) == []
    for model, override, word in (
        (tiny_llama_folder, "data.domains=pythn", "pythn"),
        (tiny_llama_folder, "experts.layers=7", "0..2"),
        (tiny_llama_folder, "model.path=no/such/place", "no/such/place"),
        (expert_folder, "experts.num_experts=16", "bootstrapped with 8"),
        (expert_folder, "adapter.rank=65", "1..64"),
    ):
        found = impossible(small_settings(model, override))
        assert len(found) == 1 and word in found[0], found
    two = small_settings(
        tiny_llama_folder,
        "federation.update_budget_bytes=4096",
        "data.domains=x",
        "adapter.rank=64",
        "federation.codec=raw",
    )
    assert len(impossible(two)) == 2


def test_a_bootstrapped_folder_brings_its_settings(expert_folder: Path) -> None:
    values, _ = given_values(
        None,
        [item for item in SMALL if not item.startswith(("experts.", "adapter."))]
        + [f"model.path={expert_folder}"],
    )
    runs = plan_runs(values, read_factors({"rank": [2, 4]}, values))
    assert [run.settings.adapter.rank for run in runs] == [2, 4]
    assert runs[0].settings.experts.num_experts == 8
    assert runs[0].conversion == runs[1].conversion
