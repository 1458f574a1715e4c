"""What a grid varies: settings by their dotted keys, or by the names people use.

A *factor* is one setting with its *levels*, e.g. ``codec`` at ``int8`` and ``int4``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samv2.common.config import field_kinds, nearest, read_value, to_flat
from samv2.common.errors import ConfigError
from samv2.common.settings import Settings

NAMES = {
    "assembler": "assembler.width",
    "chains": "experts.chains",
    "surrogates": "experts.surrogate_rank",
    "error_feedback": "federation.error_feedback",
    "shared": "experts.num_shared",
    "K": "experts.experts_per_token",
    "E": "experts.num_experts",
    "rank": "adapter.rank",
    "siblings": "adapter.siblings",
    "codec": "federation.codec",
    "rho_max": "edits.rho_max",
    "layers": "experts.layers",
}
"""Readable names of the usual factors."""
SWITCHES = ("assembler", "chains", "surrogates", "error_feedback", "shared")
"""Factors that also take ``on`` and ``off``; ``on`` is the base's value, or the default
where the base has it off."""
ENGINE = (
    "federation.workers",
    "federation.keep_frames",
    "federation.round_timeout",
    "train.device",
)
"""Settings that say how a run is carried out, not what it is: no factors, and no part of
a run's name."""
UNUSED = ("distill.steps", "distill.batch_size", "distill.learning_rate")
"""Settings that only `samv2 bootstrap` reads."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One setting and the values that it takes."""

    name: str
    """As the user calls it."""
    key: str
    """Dotted key of the setting."""
    levels: tuple[tuple[str, Any], ...]
    """(word for people, value) in the order given."""


def parse_vary(items: Iterable[str]) -> dict[str, list[str]]:
    """``KEY=V1,V2,...`` as {key: words}.

    Values are separated by commas, or by semicolons where there is one, so that a value
    may hold commas: ``layers=1-;4-20,25``.

    Raises:
        ConfigError: an item has no ``=``, or a key is given twice.
    """
    found: dict[str, list[str]] = {}
    faults = []
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals:
            faults.append(f"--vary {item!r} has no '='; write KEY=V1,V2")
        elif key in found:
            faults.append(f"--vary names {key!r} twice; list its values once")
        else:
            parts = text.split(";" if ";" in text else ",")
            found[key] = [part.strip() for part in parts if part.strip()]
    if faults:
        raise ConfigError(faults)
    return found


def read_factors(
    vary: Mapping[str, Sequence[Any] | Any], base: Mapping[str, Any]
) -> list[Factor]:
    """Factors of {name or dotted key: values}, in the order given.

    Args:
        vary: values as a TOML file or the command line has them.
        base: flat values of the settings that are varied; give ``on`` its value.

    Raises:
        ConfigError: every unknown name, value that is none, and factor without values.
    """
    faults: list[str] = []
    factors: list[Factor] = []
    for name, values in vary.items():
        listed = values if isinstance(values, list) else [values]
        factor = _factor(name, listed, base, faults)
        if factor is None:
            continue
        twice = [other.name for other in factors if other.key == factor.key]
        if twice:
            faults.append(f"{name} and {twice[0]} are both {factor.key}; keep one")
        factors.append(factor)
    if faults:
        raise ConfigError(faults)
    return factors


def _factor(
    name: str, values: Sequence[Any], base: Mapping[str, Any], faults: list[str]
) -> Factor | None:
    key = NAMES.get(name, name)
    kinds = field_kinds()
    if key not in kinds:
        faults.append(f"there is no factor {name!r}{nearest(name, (*NAMES, *kinds))}")
        return None
    if key in ENGINE:
        faults.append(
            f"{key} says how runs are carried out, not what they are; leave it out"
        )
        return None
    if key in UNUSED:
        faults.append(
            f"{key} is used by `samv2 bootstrap` alone; bootstrap a folder with each "
            "value, and vary model.path"
        )
        return None
    if not values:
        faults.append(f"{name} has no values; list at least one")
        return None
    levels: dict[str, Any] = {}
    for given in values:
        value = _switched(name, key, given, base)
        try:
            levels.setdefault(word_of(given), read_value(value, kinds[key]))
        except ValueError as error:
            faults.append(f"{name} is {given!r}; {error}")
    return Factor(name=name, key=key, levels=tuple(levels.items()))


def _switched(name: str, key: str, given: Any, base: Mapping[str, Any]) -> Any:
    """What ``on`` and ``off`` stand for; other values as they are."""
    word = word_of(given)
    if name not in SWITCHES or word not in ("on", "off", "true", "false"):
        return given
    default = to_flat(Settings())[key]
    if word in ("off", "false"):
        return False if isinstance(default, bool) else 0
    try:
        return read_value(base.get(key, default), field_kinds()[key]) or default or True
    except ValueError:
        return default or True  # the base itself is refused, with its reason


def word_of(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)
