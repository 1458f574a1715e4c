"""The settings of a federation benchmark: what all methods share, what one has alone.

A benchmark's TOML file holds ordinary settings, which all methods share, and tables
``[methods.NAME]`` of dotted keys for one method. What makes results comparable (model,
text, clients, steps, windows, seed) cannot be set for one method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samv2.common.config import given_values, settings_from_flat, to_flat
from samv2.common.errors import ConfigError
from samv2.common.settings import Settings
from samv2.federated.lora_methods import METHODS
from samv2.models.save import is_expert_model

SHARED = (
    "seed",
    "model.path",
    "model.dtype",
    "train.local_steps",
    "train.batch_size",
    "train.sequence_length",
    "federation.rounds",
    "federation.clients",
    "federation.clients_per_round",
    "federation.eval_windows",
)
"""Keys that are the same for all methods, beside all of ``data``."""
SAM_METHODS = ("samv2", "samv2-sparse")
DEFAULT_METHODS = (*METHODS, *SAM_METHODS)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A checked benchmark."""

    name: str
    """Of the protocol."""
    base: Settings
    """What all methods share."""
    methods: dict[str, Settings]
    """Settings by method, in the order asked for."""


def load_benchmark(
    path: Path, methods: Sequence[str], overrides: Iterable[str] = ()
) -> Benchmark:
    """Read a benchmark's file.

    Args:
        path: TOML file; its name is the protocol's.
        methods: to run: baselines (:data:`METHODS`), ``samv2``, ``samv2-sparse``, or a
            name that begins with ``samv2`` and has a table in the file.
        overrides: ``key=value``; ``methods.NAME.key=value`` for one method, whose own
            settings win over shared ones.

    Raises:
        ConfigError: with every fault found.
    """
    given, faults = given_values(path, overrides)
    shared, tables = _split(given)
    base, found = _settings(shared, "")
    faults += found
    known = (*METHODS, *dict.fromkeys([*SAM_METHODS, *_sam_tables(tables)]))
    for name in tables:
        if name not in known:
            faults.append(
                f"there is a table for method {name!r}; call it one of "
                f"{', '.join(known)}, or samv2-SOMETHING"
            )
    faults += _method_faults(methods, known)
    made: dict[str, Settings] = {}
    for name in dict.fromkeys([*methods, *tables]):
        own = tables.get(name, {})
        faults += [
            f"methods.{name}.{key} is set, but all methods share it; set {key} for all"
            for key in own
            if is_shared(key)
        ]
        settings, found = _settings({**shared, **own}, f"methods.{name}: ")
        faults += [fault for fault in found if base is not None]
        if settings is not None:
            made[name] = settings
    if base is not None and is_expert_model(Path(base.model.path)):
        faults.append(
            f"model.path is {base.model.path!r}, an expert graph; name the dense model "
            "that all methods start from"
        )
    if faults or base is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    return Benchmark(
        name=path.stem,
        base=_absolute(base),
        methods={name: _absolute(made[name]) for name in methods},
    )


def is_shared(key: str) -> bool:
    """Whether a setting is the same for all methods of a benchmark."""
    return key in SHARED or key.startswith("data.")


def common_settings(benchmark: Benchmark) -> dict[str, Any]:
    """Flat settings that all methods have alike."""
    flat = [to_flat(settings) for settings in benchmark.methods.values()]
    return {
        key: value
        for key, value in to_flat(benchmark.base).items()
        if all(other[key] == value for other in flat)
    }


def _split(
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Shared values, and those of each method's table."""
    shared: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        section, _, rest = key.partition(".")
        name, _, inner = rest.partition(".")
        if section == "methods" and inner:
            tables.setdefault(name, {})[inner] = value
        else:
            shared[key] = value
    return shared, tables


def _sam_tables(tables: Iterable[str]) -> list[str]:
    return [name for name in tables if name.startswith("samv2")]


def _method_faults(methods: Sequence[str], known: Sequence[str]) -> list[str]:
    if not methods:
        return [f"--methods names none; give some of {', '.join(known)}"]
    faults = [
        f"there is no method {name!r}; known are {', '.join(known)}"
        for name in methods
        if name not in known
    ]
    if len(set(methods)) != len(methods):
        faults.append(f"--methods names a method twice: {', '.join(methods)}")
    return faults


def _settings(
    values: Mapping[str, Any], prefix: str
) -> tuple[Settings | None, list[str]]:
    try:
        return settings_from_flat(values), []
    except ConfigError as error:
        return None, [prefix + fault for fault in error.faults]


def _absolute(settings: Settings) -> Settings:
    """The model's path made absolute, so that a benchmark goes on from anywhere."""
    path = Path(settings.model.path).expanduser()
    if settings.model.path == "smollm2" or not path.exists():
        return settings
    return replace(settings, model=replace(settings.model, path=str(path.resolve())))
