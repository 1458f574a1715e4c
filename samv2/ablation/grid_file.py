"""A grid as it is written down: settings, and a ``[vary]`` table.

base = "demo"            # a shipped config or a file that the settings build on
one_at_a_time = true     # each factor alone, instead of every combination
[federation]
rounds = 5
[vary]
assembler = ["on", "off"]
"edits.tau_prune" = [0.1, 0.2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from samv2.common.config import given_values
from samv2.common.errors import ConfigError
from samv2.configs import config_path

PRESETS = Path(str(files("samv2.configs"))) / "grids"
"""Grids that ship with the product."""


@dataclass(frozen=True, kw_only=True)
class GridFile:
    """What a file, or several one over the other, say."""

    values: dict[str, Any]
    """Flat dotted settings, unchecked."""
    vary: dict[str, Any]
    """{factor: values}."""
    one_at_a_time: bool


def preset_path(name: str) -> Path:
    """A shipped grid by name.

    Raises:
        ConfigError: there is none; lists the names.
    """
    path = PRESETS / f"{name}.toml"
    if path.is_file():
        return path
    known = ", ".join(sorted(item.stem for item in PRESETS.glob("*.toml")))
    raise ConfigError([f"there is no preset {name!r}; use one of {known}"])


def read_grid(
    *,
    preset: str | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    vary: Mapping[str, Sequence[str]] | None = None,
    one_at_a_time: bool = False,
) -> GridFile:
    """Preset, then config, then what the command line says; later ones win.

    Where a config is given, it takes the place of the preset's base. What the command
    line varies is added to what the files vary.

    Raises:
        ConfigError: a file cannot be read, or an override has no value.
    """
    values: dict[str, Any] = {}
    varied: dict[str, Any] = {}
    alone = one_at_a_time
    paths = [preset_path(preset)] if preset else []
    paths += [config_path(config)] if config else []
    for path in paths:
        found = _read(path, with_base=not (config and preset and path == paths[0]))
        values |= found.values
        varied |= found.vary
        alone = alone or found.one_at_a_time
    given, faults = given_values(None, overrides)
    if faults:
        raise ConfigError(faults)
    return GridFile(
        values=values | given, vary=varied | dict(vary or {}), one_at_a_time=alone
    )


def to_grid_toml(grid: GridFile) -> str:
    """The grid as a file that :func:`read_grid` reads back."""
    tables = {"one_at_a_time": grid.one_at_a_time, "vary": dict(grid.vary)}
    nested: dict[str, Any] = {}
    for key, value in grid.values.items():
        section, _, name = key.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[name] = value
    return tomli_w.dumps(nested | tables)


def _read(path: Path, *, with_base: bool) -> GridFile:
    values, _ = given_values(path, ())
    base, alone = values.pop("base", None), values.pop("one_at_a_time", False)
    faults = []
    if base is not None and not isinstance(base, str):
        faults.append(f"base is {base!r} in {path}; write the name of a config or file")
    if not isinstance(alone, bool):
        faults.append(f"one_at_a_time is {alone!r} in {path}; write true or false")
    if faults:
        raise ConfigError(faults)
    below: dict[str, Any] = {}
    if base is not None and with_base:
        below, _ = given_values(config_path(base), ())
    own = {key: value for key, value in values.items() if not key.startswith("vary.")}
    vary = {
        key.removeprefix("vary."): value
        for key, value in values.items()
        if key.startswith("vary.")
    }
    return GridFile(values=below | own, vary=vary, one_at_a_time=alone)
