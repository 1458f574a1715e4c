"""Settings in and out: TOML files, ``--set key=value``, and flat dotted keys."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w

from samv2.common.errors import ConfigError
from samv2.common.settings import Settings


def load_settings(
    path: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Read a TOML file and ``key=value`` overrides.

    Args:
        path: the file; None means defaults alone.
        overrides: dotted assignments, e.g. ``federation.rounds=5``; lists are
            comma-separated.
        defaults: flat dotted values below the file and the overrides.

    Raises:
        ConfigError: with every fault found: unreadable file, unknown keys (with the
            nearest known one), values of the wrong type, values out of range.
    """
    given, faults = given_values(path, overrides)
    plain = {key: v for key, v in given.items() if not key.startswith("methods.")}
    if len(plain) < len(given):
        faults.append(
            "tables under [methods] are for `samv2 bench-federation`; leave them out, or "
            "give their settings without methods.NAME"
        )
    settings, found = _read_flat({**(defaults or {}), **plain})
    if settings is None or faults:
        raise ConfigError(faults + found)
    return settings


def given_values(
    path: Path | None, overrides: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """The flat dotted values of a file and of overrides as they stand, unchecked.

    Returns:
        The values, and the overrides at fault as sentences.

    Raises:
        ConfigError: the file cannot be read.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values |= flatten(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None
        except UnicodeDecodeError as error:
            raise ConfigError([f"{path} is not UTF-8 text: {error}"]) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError([f"{path} is not valid TOML: {error}"]) from None
    faults = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if equals:
            values[key.strip()] = text.strip()
        else:
            faults.append(f"--set {item!r} has no '='; write key=value")
    return values, faults


def settings_from_flat(values: Mapping[str, Any]) -> Settings:
    """Settings from flat dotted keys; strings are read as the field's type.

    Raises:
        ConfigError: listing every unknown key, value of the wrong type and value out of
            range.
    """
    settings, faults = _read_flat(values)
    if settings is None:
        raise ConfigError(faults)
    return settings


def _read_flat(values: Mapping[str, Any]) -> tuple[Settings | None, list[str]]:
    """The settings, or None and every fault; ranges are checked on what can be read."""
    kinds = field_kinds()
    faults: list[str] = []
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kinds:
            faults.append(f"there is no setting {key!r}{nearest(key, kinds)}")
            continue
        try:
            converted = read_value(value, kinds[key])
        except ValueError as error:
            faults.append(f"{key} is {value!r}; {error}")
            continue
        section, _, name = key.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[name] = converted
    hints = get_type_hints(Settings)
    built = {
        name: hints[name](**value) if is_dataclass(hints[name]) else value
        for name, value in nested.items()
    }
    try:
        settings = Settings(**built)
    except ConfigError as error:
        return None, faults + list(error.faults)
    return (None, faults) if faults else (settings, [])


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error: the known word that was meant, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def field_kinds() -> dict[str, type]:
    """Every dotted key with its type."""
    kinds: dict[str, type] = {}
    for name, kind in get_type_hints(Settings).items():
        if is_dataclass(kind):
            for inner, inner_kind in get_type_hints(kind).items():
                kinds[f"{name}.{inner}"] = inner_kind
        else:
            kinds[name] = kind
    return kinds


def flatten(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as flat dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def to_flat(settings: Settings) -> dict[str, str | int | float | bool]:
    """All settings as flat scalars (tuples joined by commas), e.g. for Flower."""
    return {
        key: ",".join(map(str, value)) if isinstance(value, tuple) else value
        for key, value in flatten(asdict(settings)).items()
    }


def to_toml(settings: Settings) -> str:
    """The settings as a TOML file that :func:`load_settings` reads back."""
    return tomli_w.dumps(_lists(asdict(settings)))


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def read_value(value: Any, kind: type) -> Any:
    """A value as a field's type; strings are read.

    Raises:
        ValueError: it is none; the message says what to write.
    """
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError("write true or false")
    if kind is int:
        if isinstance(value, bool) or isinstance(value, float):
            raise ValueError("write a whole number")
        try:
            return int(str(value).replace("_", ""))
        except ValueError:
            raise ValueError("write a whole number") from None
    if kind is float:
        if isinstance(value, bool):
            raise ValueError("write a number")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError("write a number") from None
        if not math.isfinite(number):
            raise ValueError("write a finite number")
        return number
    if kind is str:
        if not isinstance(value, str):
            raise ValueError("write a string")
        return value
    if isinstance(value, str):
        value = tuple(item.strip() for item in value.split(",") if item.strip())
    if kind == tuple[int, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError("write a list of whole numbers")
        return tuple(read_value(item, int) for item in value)
    if kind == tuple[float, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError("write a list of numbers")
        return tuple(read_value(item, float) for item in value)
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ValueError("write a list of strings")


def describe_settings() -> list[tuple[str, Any, str]]:
    """(dotted key, default, type name) of every setting, in order."""
    defaults = to_flat(Settings())
    kinds = field_kinds()
    names = [item.name for item in fields(Settings)]
    ordered = sorted(kinds, key=lambda key: names.index(key.split(".")[0]))
    return [(key, defaults[key], _type_name(kinds[key])) for key in ordered]


def _type_name(kind: type) -> str:
    return kind.__name__ if isinstance(kind, type) else "list"
