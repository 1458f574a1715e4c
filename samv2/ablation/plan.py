"""From a base and what is varied to the runs of a grid, all checked before any starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from samv2.ablation.factors import ENGINE, SWITCHES, Factor, word_of
from samv2.common.config import field_kinds, read_value, settings_from_flat, to_flat
from samv2.common.errors import ConfigError, ModelError, SamError
from samv2.common.settings import Settings
from samv2.data.drift import parse_drifts
from samv2.data.sources import parse_domains
from samv2.federated.prepare import check_budget, check_conversion
from samv2.models.bootstrap import check_convertible
from samv2.models.llama_loader import peek_config
from samv2.models.save import (
    conversion_settings,
    is_expert_model,
    read_expert_config,
)

TRAINABLE = {
    "adapter.rank": "adapter_rank",
    "adapter.scale": "adapter_scale",
    "adapter.siblings": "siblings",
    "assembler.width": "assembler_width",
    "assembler.prefix_tokens": "prefix_tokens",
}
"""Conversion settings that another folder of the same experts can be made for, with
their names in :func:`samv2.models.trainables.with_trainables`."""
CONVERTED_BY = (
    "seed",
    "data.domains",
    "data.train_bytes",
    "data.heldout_bytes",
    "data.calibration_bytes",
    "train.sequence_length",
)
"""What a conversion depends on, beside the sections ``model`` and ``experts``."""
SCORED_BY = (
    "data.split",
    "data.alpha",
    "federation.clients",
    "federation.eval_windows",
)
"""What the dense model's perplexity depends on, beside :data:`CONVERTED_BY` and the
section ``model``."""
LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a grid."""

    name: str
    """Short and readable, with a hash of all settings; also its folder."""
    levels: dict[str, str]
    """{factor: word} of every factor."""
    settings: Settings

    @property
    def conversion(self) -> str:
        """Of the conversion that this run starts from; equal ones are made once."""
        flat = to_flat(self.settings)
        if is_expert_model(Path(self.settings.model.path)):
            return short_hash(self.settings.model.path)
        return short_hash(_part(flat, ("model.", "experts."), CONVERTED_BY))

    @property
    def trainables(self) -> dict[str, Any]:
        """Of :data:`TRAINABLE`: what is trained on top of the conversion."""
        flat = to_flat(self.settings)
        return {key: flat[key] for key in TRAINABLE}

    @property
    def text(self) -> str:
        """Of the held-out text and dense model; equal ones are scored once."""
        flat = to_flat(self.settings)
        return short_hash(_part(flat, ("model.",), (*CONVERTED_BY, *SCORED_BY)))


def plan_runs(
    base: Mapping[str, Any], factors: Sequence[Factor], *, one_at_a_time: bool = False
) -> list[PlannedRun]:
    """The runs of a grid, without repetitions.

    Args:
        base: flat dotted values, as given.
        factors: what is varied.
        one_at_a_time: the base, and each factor alone, instead of every combination.

    Raises:
        ConfigError: every fault of every combination, with the combination's name.
    """
    runs: dict[str, PlannedRun] = {}
    faults: dict[str, None] = {}
    for label, chosen in _combinations(factors, one_at_a_time):
        found: list[str] = []
        values = {**base, **{factor.key: value for factor, (_, value) in chosen}}
        settings = _settings(values, found)
        if settings is not None:
            settings = as_job(settings)
            found += impossible(settings)
            flat = to_flat(settings)
            kept = {key: value for key, value in flat.items() if key not in ENGINE}
            name = f"{label}-{short_hash(kept)}"
            levels = {factor.name: word for factor, (word, _) in chosen}
            levels |= {
                factor.name: _base_word(factor, flat)
                for factor in factors
                if factor.name not in levels
            }
            run = PlannedRun(name=name, levels=levels, settings=settings)
            runs.setdefault(short_hash(kept), run)
        faults |= dict.fromkeys(f"{label}: {fault}" for fault in found)
    if faults:
        raise ConfigError(list(faults))
    return list(runs.values())


def impossible(settings: Settings) -> list[str]:
    """All that keeps a run with these settings from starting, found without long work."""
    path = Path(settings.model.path)
    faults: list[str] = []
    _try(faults, lambda: parse_domains(settings.data.domains))
    _try(
        faults,
        lambda: parse_drifts(settings.data.drift, settings.federation.clients),
    )
    dense = _try(faults, lambda: dense_config(settings))
    if dense is None:
        return faults
    if is_expert_model(path):
        _try(faults, lambda: check_conversion(path, settings, free=TRAINABLE))
        rank, width = settings.adapter.rank, dense.hidden_size
        if rank > width:
            faults.append(f"adapter.rank is {rank}; it must lie in 1..{width}")
    else:
        _try(faults, lambda: check_convertible(dense, settings))
    _try(faults, lambda: check_budget(dense, settings))
    return faults


def as_job(settings: Settings, *, model: str | None = None) -> Settings:
    """As a worker runs it: in one process, with frames kept for the checks.

    Args:
        settings: as planned.
        model: another path of the model.
    """
    path = settings.model.path if model is None else model
    return replace(
        settings,
        model=replace(settings.model, path=path),
        federation=replace(settings.federation, workers=1, keep_frames=True),
    )


def short_hash(value: Any) -> str:
    """Eight hexadecimal digits of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def dense_config(settings: Settings) -> PretrainedConfig:
    """The config of the dense model that the settings name, or were converted from."""
    path = settings.model.path
    if is_expert_model(Path(path)):
        return read_expert_config(Path(path))[1]
    return _peeked(path)


@lru_cache(maxsize=64)
def _peeked(path: str) -> PretrainedConfig:
    return peek_config(path)


def _try(faults: list[str], check: Callable[[], Any]) -> Any:
    """What a check returns, or None with its faults added."""
    try:
        return check()
    except ConfigError as error:
        faults += error.faults
    except SamError as error:
        faults.append(str(error))
    return None


def _combinations(
    factors: Sequence[Factor], one_at_a_time: bool
) -> Iterator[tuple[str, list[tuple[Factor, tuple[str, Any]]]]]:
    """(label, chosen levels) of every run; factors that stay at the base are left out."""
    if one_at_a_time or not factors:
        yield "base", []
        for factor in factors:
            for level in factor.levels:
                yield _label([(factor, level)]), [(factor, level)]
        return
    for levels in product(*(factor.levels for factor in factors)):
        chosen = list(zip(factors, levels))
        yield _label(chosen), chosen


def _label(chosen: Sequence[tuple[Factor, tuple[str, Any]]]) -> str:
    """``K=8_codec=int4``, as a folder may be called."""
    parts = [
        f"{factor.name.rpartition('.')[2]}={Path(word).name if '/' in word else word}"
        for factor, (word, _) in chosen
    ]
    return re.sub(r"[^\w.=+-]", "-", "_".join(parts))[:LONGEST_NAME]


def _base_word(factor: Factor, flat: Mapping[str, Any]) -> str:
    """What the base's value of a factor is called."""
    base = read_value(flat[factor.key], field_kinds()[factor.key])
    same = [word for word, value in factor.levels if value == base]
    if not same and factor.name in SWITCHES and isinstance(base, bool):
        return "on" if base else "off"
    return same[0] if same else word_of(base)


def _settings(values: Mapping[str, Any], faults: list[str]) -> Settings | None:
    """Settings as `samv2 train` reads them: a folder brings its conversion settings."""
    flat = dict(values)
    folder = Path(str(flat.get("model.path", "smollm2"))).expanduser()
    if str(folder) != "smollm2" and folder.exists():
        flat["model.path"] = str(folder.resolve())
        if is_expert_model(folder):
            try:
                flat = {**conversion_settings(folder), **flat}
            except ModelError as error:
                faults.append(str(error))
                return None
    try:
        return settings_from_flat(flat)
    except ConfigError as error:
        faults += error.faults
        return None


def _part(
    flat: Mapping[str, Any], sections: tuple[str, ...], keys: Sequence[str]
) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if key.startswith(sections) or key in keys
    }
