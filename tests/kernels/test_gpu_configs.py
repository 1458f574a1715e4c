"""Which tile a launch gets, and what the tuner may try."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from samv2_kernels import tuned
from samv2_kernels.gpu.configs import TABLE, candidates, choose
from samv2_kernels.gpu.specs import shipped_specs


@pytest.mark.parametrize(
    "rows, expected",
    [(0.1, 16), (1, 16), (16, 16), (23.9, 16), (24, 32), (47, 32), (48, 64), (1e6, 64)],
)
def test_the_tile_grows_with_the_rows_an_expert_gets(
    rows: float, expected: int
) -> None:
    assert choose("gate_up", "nf4", rows, D=4096, F=688).rows == expected


def test_every_kernel_has_a_tile_for_any_number_of_rows() -> None:
    for (kernel, weights), options in TABLE.items():
        assert [option.rows for option in options] == sorted(
            {option.rows for option in options}
        )
        assert choose(kernel, weights, 0, D=64, F=1) == options[0]
        assert choose(kernel, weights, 1e9, D=64, F=1) == options[-1]


def test_wide_low_rank_terms_take_the_lowest_tile() -> None:
    assert choose("to_tokens", "nf4", 1e6, rank=64, D=4096, F=688).rows == 32
    assert choose("to_tokens", "nf4", 1e6, rank=65, D=4096, F=688).rows == 16


def test_a_measured_choice_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "tuned.json"))
    wanted = candidates("gate_up", "sm_86")[-1]
    key = {"weights": "nf4", "rows": 32, "D": 576, "F": 96}
    tuned.store_tuned("gate_up", key, wanted, tmp_path / "tuned.json")
    assert asdict(choose("gate_up", "nf4", 20, D=576, F=96)) == wanted
    assert asdict(choose("gate_up", "nf4", 32, D=576, F=96)) == wanted
    shipped = choose("gate_up", "nf4", 33, D=576, F=96)
    assert shipped in TABLE["gate_up", "nf4"]


def test_candidates_hold_what_ships_and_nothing_of_other_kernels() -> None:
    for kernel, weights in TABLE:
        tried = candidates(kernel, "sm_86")
        for option in TABLE[kernel, weights]:
            assert asdict(option) in tried
        assert len(tried) == len({tuple(each.items()) for each in tried})
    with pytest.raises(KeyError):
        choose("gate_up", "int3", 1, D=64, F=1)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_specs_cover_the_table(arch: str) -> None:
    specs = shipped_specs(arch)
    for (kernel, weights), options in TABLE.items():
        for option in options if weights != "float32" else ():
            named = [
                spec
                for spec in specs
                if spec.kernel == kernel
                and spec.config.startswith(f"{option} {weights}")
            ]
            assert named, (kernel, weights, str(option))
            for spec in named:
                arguments = set(spec.function.arg_names)
                assert set(spec.signature) | set(spec.constexprs) == arguments
                assert not set(spec.signature) & set(spec.constexprs)
