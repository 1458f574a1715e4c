"""Settings: defaults, documentation, and the faults they report."""

from __future__ import annotations

import ast
import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import get_type_hints

import pytest

from samv2.common import settings as module
from samv2.common.config import settings_from_flat
from samv2.common.errors import ConfigError, SamError
from samv2.common.settings import ExpertSettings, Settings


def test_defaults_are_valid_and_frozen() -> None:
    settings = Settings()
    with pytest.raises(FrozenInstanceError):
        settings.seed = 1
    with pytest.raises(TypeError):
        ExpertSettings(16)


def test_every_field_is_documented() -> None:
    tree = ast.parse(inspect.getsource(module))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name == "Settings":
            continue
        assert ast.get_docstring(node)
        for item, following in zip(node.body, node.body[1:] + [None]):
            if isinstance(item, ast.AnnAssign):
                assert isinstance(following, ast.Expr), ast.unparse(item)
                assert isinstance(following.value, ast.Constant), ast.unparse(item)


def test_sections_are_dataclasses_and_fields_plain() -> None:
    for kind in get_type_hints(Settings).values():
        if is_dataclass(kind):
            kinds = set(get_type_hints(kind).values())
            lists = {tuple[str, ...], tuple[int, ...], tuple[float, ...]}
            assert kinds <= {int, float, str, bool} | lists


FAULTS = [
    ("seed", -1, "seed is -1; use a whole number in 0..4294967295"),
    ("seed", 2**32, "seed is 4294967296"),
    (
        "model.dtype",
        "float64",
        "model.dtype is 'float64'; use one of float32, bfloat16",
    ),
    ("experts.num_experts", 0, "experts.num_experts is 0; use at least 1"),
    ("experts.experts_per_token", 17, "is 17; it counts the 2 shared .* in 2..16"),
    ("experts.experts_per_token", 1, "experts_per_token is 1; it counts the 2 shared"),
    ("experts.num_shared", -1, "experts.num_shared is -1; use at least 0"),
    ("experts.num_shared", 16, "num_shared is 16; at least one of the 16 experts must"),
    ("experts.feature", "x", "experts.feature is 'x'; use one of coactivation, gate"),
    ("experts.quantise", "int4", "quantise is 'int4'; use one of none, nf4"),
    ("experts.gate", "x", "experts.gate is 'x'; use one of ridge, ridge_log, avg_k"),
    ("experts.combine", "x", "experts.combine is 'x'; use one of unit, softmax"),
    ("experts.surrogate_rank", -1, "surrogate_rank is -1; use at least 0"),
    ("experts.calibration_tokens", 255, "calibration_tokens is 255; use at least 256"),
    ("experts.chain_degree", -1, "chain_degree is -1; use at least 0"),
    ("adapter.rank", 0, "adapter.rank is 0; use at least 1"),
    ("assembler.width", -1, "assembler.width is -1; use at least 0"),
    ("assembler.prefix_tokens", 0, "prefix_tokens is 0; use at least 1"),
    ("assembler.temperature_start", 0.0, "temperature_start is 0.0; use at least 0.01"),
    ("assembler.temperature_end", -1.0, "temperature_end is -1.0; use at least 0.01"),
    ("data.split", "x", "data.split is 'x'; use one of domain, shards, dirichlet"),
    ("data.domains", (), "data.domains is empty"),
    ("data.domains", ("a", "a"), "names a domain twice: a, a"),
    ("data.alpha", 0.0, "data.alpha is 0.0; use a positive number"),
    ("data.train_bytes", 1023, "data.train_bytes is 1023; use at least 1024"),
    ("train.local_steps", 0, "train.local_steps is 0; use at least 1"),
    ("train.sequence_length", 7, "sequence_length is 7; use at least 8"),
    ("train.learning_rate", 0.0, "learning_rate is 0.0; use a positive number"),
    ("federation.rounds", 0, "federation.rounds is 0; use at least 1"),
    ("federation.clients_per_round", 5, "clients_per_round is 5, .* only 4 clients"),
    ("federation.min_replies", 5, "min_replies is 5, but only 4 clients"),
    (
        "federation.update_budget_bytes",
        1,
        "update_budget_bytes is 1; use at least 4096",
    ),
    ("federation.codec", "zip", "federation.codec is 'zip'; use one of raw, bf16"),
    ("federation.normalise", "x", "federation.normalise is 'x'; use one of"),
    ("federation.error_feedback", 1.1, "error_feedback is 1.1; use a share in 0..1"),
    ("federation.clip_update_norm", -0.1, "clip_update_norm is -0.1; use at least 0"),
    ("edits.rho_max", -1, "edits.rho_max is -1; use at least 0"),
    ("edits.patience", 0, "edits.patience is 0; use at least 1"),
    ("edits.momentum", 1.0, "edits.momentum is 1.0; use a share in 0..1, below 1"),
    ("edits.tau_promote", 0.0, "edits.tau_promote is 0.0; use positive shares"),
    ("edits.vote_cap", 0.0, "edits.vote_cap is 0.0; use a share above 0"),
    ("edits.min_voters", 0, "edits.min_voters is 0; use at least 1"),
    ("federation.retries", -1, "federation.retries is -1; use at least 0"),
    ("federation.quarantine", -1, "federation.quarantine is -1; use at least 0"),
    ("aggregation.rule", "x", "aggregation.rule is 'x'; use one of mean, trimmed"),
    ("aggregation.optimizer", "x", "optimizer is 'x'; use one of fedavg, fedavgm"),
    ("aggregation.trim", 0.5, "aggregation.trim is 0.5; use a share in 0..0.5"),
    ("aggregation.quorum", 0, "aggregation.quorum is 0; use at least 1"),
    ("aggregation.clip_to_median", -1.0, "clip_to_median is -1.0; use at least 0"),
    ("aggregation.learning_rate", 0.0, "learning_rate is 0.0; use a positive number"),
    ("aggregation.momentum", 1.0, "aggregation.momentum is 1.0; use a share"),
    ("aggregation.beta2", 1.0, "aggregation.beta2 is 1.0; use a share"),
    ("aggregation.epsilon", 0.0, "aggregation.epsilon is 0.0; use a positive number"),
    ("privacy.noise", -1.0, "privacy.noise is -1.0; use at least 0"),
    ("privacy.noise", 1.0, "noise is 1.0 and edits.rho_max 8; .* use 0"),
    ("privacy.clip", 0.0, "privacy.clip is 0.0; use a positive number"),
    ("privacy.delta", 1.0, "privacy.delta is 1.0; use a number between 0 and 1"),
    ("budgets.memory_bytes", (1, -1), "budgets.memory_bytes names -1; use 0"),
    ("budgets.flops", (-0.5,), "budgets.flops names -0.5; use 0"),
    ("drift.detect", True, "drift.detect is true and adapter.siblings 1"),
    ("drift.reserve", -1, "drift.reserve is -1; use at least 0"),
    ("drift.threshold", 0.0, "drift.threshold is 0.0; use a positive number"),
    ("drift.tolerance", -0.1, "drift.tolerance is -0.1; use at least 0"),
    ("drift.distance", 0.0, "drift.distance is 0.0; use a positive number"),
    ("drift.patience", 0, "drift.patience is 0; use at least 1"),
    ("rehearsal.fail", 1.0, "rehearsal.fail is 1.0; use a share in 0..1, below 1"),
    ("rehearsal.hostile", -0.1, "rehearsal.hostile is -0.1; use a share in 0..1"),
    ("rehearsal.attacks", ("x",), "rehearsal.attacks is 'x'; use one of nan, sign"),
]


@pytest.mark.parametrize("key, value, message", FAULTS)
def test_a_value_out_of_range_is_refused_by_name(
    key: str, value: object, message: str
) -> None:
    section, _, name = key.rpartition(".")
    settings = Settings()
    with pytest.raises(ConfigError, match=message):
        if section:
            part = replace(getattr(settings, section), **{name: value})
            replace(settings, **{section: part})
        else:
            replace(settings, **{name: value})


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("aggregation.rule", "median", "aggregation.rule 'median'; .* use 'mean'"),
        ("aggregation.clip_to_median", 2.0, "aggregation.clip_to_median 2.0; .* use 0"),
        ("adapter.siblings", 2, "adapter.siblings 2; .* use 1"),
        ("train.train_gate", False, "train.train_gate false; .* use true"),
    ],
)
def test_privacy_refuses_what_its_noise_does_not_cover(
    key: str, value: object, message: str
) -> None:
    private = {"privacy.noise": 0.5, "edits.rho_max": 0}
    assert settings_from_flat(private).privacy.noise == 0.5
    with pytest.raises(
        ConfigError, match=f"^1 setting.*\n.*noise is 0.5 and {message}"
    ):
        settings_from_flat(private | {key: value})


def test_all_faults_are_reported_at_once() -> None:
    values = {key: value for key, value, _ in FAULTS}
    del values[
        "federation.min_replies"
    ]  # compared with clients_per_round, itself wrong
    with pytest.raises(ConfigError) as caught:
        settings_from_flat(values)
    text = str(caught.value)
    assert isinstance(caught.value, SamError)
    assert all(key.rpartition(".")[2] in text for key in values)
    assert text.startswith(f"{len(caught.value.faults)} setting(s) need a change:")


def test_every_section_has_a_key() -> None:
    names = [item.name for item in fields(Settings)]
    assert names[0] == "seed" and len(names) == len(set(names))
