"""What may be varied, and how it is written."""

from __future__ import annotations

from typing import Any

import pytest

from samv2.ablation.factors import NAMES, parse_vary, read_factors
from samv2.common.config import field_kinds
from samv2.common.errors import ConfigError


def levels(name: str, values: Any, **base: Any) -> list[Any]:
    """The values of one factor."""
    flat = {key.replace("__", "."): value for key, value in base.items()}
    return [value for _, value in read_factors({name: values}, flat)[0].levels]


def test_readable_names_are_settings() -> None:
    assert set(NAMES.values()) <= field_kinds().keys()
    assert levels("K", ["8", 12]) == [8, 12]
    assert levels("experts.layers", ["1-", "4-20,25"]) == ["1-", "4-20,25"]
    assert levels("codec", "int4") == ["int4"]
    assert levels("train.train_mix", [True, "false"]) == [True, False]
    assert levels("experts.other_k", [[2, 3], "4,5"]) == [(2, 3), (4, 5)]


def test_on_and_off() -> None:
    assert levels("assembler", ["on", "off"]) == [16, 0]
    assert levels("assembler", ["on", "off", 7], assembler__width=5) == [5, 0, 7]
    assert levels("assembler", ["on"], assembler__width="0") == [16]
    assert levels("chains", [True, "off"]) == [True, False]
    assert levels("surrogates", ["on", "off"], experts__surrogate_rank="4") == [4, 0]
    assert levels("error_feedback", ["on", "off", "0.5"]) == [1.0, 0.0, 0.5]
    assert levels("shared", ["on", "off"]) == [2, 0]


def test_a_level_that_is_listed_twice_counts_once() -> None:
    assert levels("K", [8, "8", 12]) == [8, 12]


def test_values_on_the_command_line() -> None:
    assert parse_vary(["K=8, 12", "layers=1-;4-20,25", "x=1;"]) == {
        "K": ["8", "12"],
        "layers": ["1-", "4-20,25"],
        "x": ["1"],
    }
    with pytest.raises(ConfigError) as caught:
        parse_vary(["K", "E=1", "E=2"])
    assert len(caught.value.faults) == 2
    assert "write KEY=V1,V2" in str(caught.value) and "'E' twice" in str(caught.value)


def test_every_fault_is_listed() -> None:
    vary = {
        "codex": ["int4"],
        "K": ["few", "4"],
        "experts.experts_per_token": [8],
        "rank": [],
        "federation.workers": [2],
        "train.device": ["cpu", "cuda"],
        "distill.steps": [10],
        "experts.chains": ["on"],
    }
    with pytest.raises(ConfigError) as caught:
        read_factors(vary, {})
    faults = caught.value.faults
    assert len(faults) == 8
    for fault, word in zip(
        faults,
        (
            "did you mean codec?",
            "K is 'few'; write a whole number",
            "experts.experts_per_token and K are both",
            "rank has no values",
            "federation.workers says how runs are carried out",
            "train.device says how runs are carried out",
            "`samv2 bootstrap` alone",
            "experts.chains is 'on'; write true or false",
        ),
    ):
        assert word in fault
