"""Options that several verbs share."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from samv2.common.config import describe_settings, given_values, load_settings
from samv2.common.settings import Settings
from samv2.configs import config_path


def add_settings_options(
    parser: argparse.ArgumentParser, *, default: str | None
) -> None:
    """``--config`` and ``--set``."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=default,
        help="TOML file, or the name of a shipped config"
        + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one setting, e.g. federation.rounds=5 (repeatable)",
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
    """Every setting with its default, for ``--help``."""
    rows = describe_settings()
    width = max(len(key) for key, _, _ in rows)
    lines = [f"  {key:<{width}}  {kind:<5}  {value}" for key, value, kind in rows]
    return "settings (key, type, default):\n" + "\n".join(lines)
