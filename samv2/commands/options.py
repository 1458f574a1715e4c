"""Options that several verbs share."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

from samv2.common.config import given_values, load_settings
from samv2.common.settings import Settings
from samv2.common.settings_text import SettingText, setting_texts
from samv2.configs import config_path, shipped_names

HELP_WIDTH = 88


def add_settings_options(
    parser: argparse.ArgumentParser, *, default: str | None
) -> None:
    """``--config`` and ``--set``."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=default,
        help=f"TOML file, or a shipped config: {', '.join(shipped_names())}"
        + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one setting, e.g. federation.rounds=5 (repeatable); `samv2 train "
        "--help` lists all keys with what they mean",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--log-dir``, ``--resume``, ``--overwrite``."""
    parser.add_argument(
        "--log-dir",
        type=Path,
        default=Path("logs"),
        metavar="DIR",
        help="run directory (default: logs)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --log-dir"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in --log-dir"
    )


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Settings of the parsed ``--config`` and ``--set``.

    A bootstrapped folder as ``model.path`` brings its own conversion settings as
    defaults. A model's path becomes absolute, so that a run can be resumed from
    anywhere.
    """
    from samv2.models.save import conversion_settings, is_expert_model

    path = config_path(arguments.config) if arguments.config else None
    values, _ = given_values(path, arguments.overrides)
    given = str(values.get("model.path", "smollm2"))
    folder = Path(given).expanduser()
    if given == "smollm2" or not folder.exists():
        return load_settings(path, arguments.overrides)
    defaults = conversion_settings(folder) if is_expert_model(folder) else {}
    settings = load_settings(path, arguments.overrides, defaults=defaults)
    return replace(settings, model=replace(settings.model, path=str(folder.resolve())))


def settings_help() -> str:
    """Every setting with its default and meaning, for ``--help``."""
    texts = setting_texts()
    width = max(len(text.key) for text in texts)
    lines = ["settings (key, type, default; below them what they mean):"]
    for text in texts:
        lines.append(f"  {text.key:<{width}}  {text.kind:<5}  {text.default}".rstrip())
        lines += textwrap.wrap(
            _meaning(text),
            HELP_WIDTH,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
        )
    return "\n".join(lines)


def _meaning(text: SettingText) -> str:
    """In a sentence, with the values that the sentence does not name."""
    words = text.first_sentence.replace("``", "")
    if all(choice in words for choice in text.choices):
        return words
    return f"{words} One of: {', '.join(text.choices)}."
