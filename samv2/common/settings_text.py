"""What settings mean, in words: their docstrings, for ``--help`` and docs/settings.md."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, is_dataclass
from typing import get_type_hints

from samv2.common import settings as source
from samv2.common.config import describe_settings
from samv2.common.settings import Settings
from samv2.common.settings_checks import CHOICES

_SENTENCE_END = re.compile(r"(?<!e\.g)\. ")


@dataclass(frozen=True, kw_only=True)
class SettingText:
    """One setting, for people."""

    key: str
    """Dotted."""
    kind: str
    """Name of its type."""
    default: str
    """As it is written on the command line."""
    meaning: str
    """Its docstring in one line; code is in double backticks."""
    choices: tuple[str, ...]
    """All values that it may have; empty where they are not listed."""

    @property
    def section(self) -> str:
        """Its table in a TOML file; empty for the top."""
        return self.key.rpartition(".")[0]

    @property
    def first_sentence(self) -> str:
        """Of its meaning."""
        return _SENTENCE_END.split(self.meaning, 1)[0].removesuffix(".") + "."


def setting_texts() -> list[SettingText]:
    """Every setting, in order."""
    words = _docstrings()
    hints = get_type_hints(Settings)
    found = []
    for key, default, kind in describe_settings():
        section, _, name = key.rpartition(".")
        owner = hints[section] if section else Settings
        found.append(
            SettingText(
                key=key,
                kind=kind,
                default=str(default).lower() if kind == "bool" else str(default),
                meaning=words[owner.__name__, name],
                choices=CHOICES.get(key, ()),
            )
        )
    return found


def section_texts() -> dict[str, str]:
    """{section: what its settings are about}, in order; the top has no name."""
    return {"": inspect.getdoc(Settings) or ""} | {
        name: inspect.getdoc(kind) or ""
        for name, kind in get_type_hints(Settings).items()
        if is_dataclass(kind)
    }


def _docstrings() -> dict[tuple[str, str], str]:
    """{(class, field): the string below the field}; no run time keeps these."""
    found = {}
    for node in ast.parse(inspect.getsource(source)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item, below in zip(node.body, node.body[1:]):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                words = " ".join(str(below.value.value).split())
                found[node.name, item.target.id] = words
    return found
