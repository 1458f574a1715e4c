"""A Flower run config as settings.

A run config has every key of the app, and does not tell which of them somebody gave: the
others have the values of ``samv2/configs/demo.toml``, from which the app is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from samv2.common.config import load_settings, settings_from_flat, to_flat
from samv2.common.errors import ConfigError
from samv2.common.settings import Settings
from samv2.configs import config_path
from samv2.federated.run_folder import RunFolder
from samv2.models.save import conversion_settings, is_expert_model

RUN_DIR = "run-dir"


def settings_from_run_config(
    values: Mapping[str, Any], folder: Path | None = None
) -> tuple[Settings, Path]:
    """Settings and run directory of a Flower run config.

    Where ``model.path`` is bootstrapped already, conversion settings that have the app's
    own values are the model's: they need not be given again. A node may have that model
    in a folder of its own alone.

    Args:
        values: of Flower's context.
        folder: the run directory of a node that has its own; None: the run config's.

    Raises:
        ConfigError: unknown or wrong settings, or ``run-dir`` is not an absolute path
            (Flower runs apps in folders of its own).
        ModelError: the bootstrapped model is damaged.
    """
    root = folder if folder is not None else Path(str(values.get(RUN_DIR, "")))
    if not root.is_absolute():
        raise ConfigError(
            [
                f"run-dir is {str(root)!r}; give an absolute folder, e.g. "
                "--run-config 'run-dir=\"/data/run1\"'"
            ]
        )
    settings = {key: value for key, value in values.items() if key != RUN_DIR}
    places = [Path(str(settings.get("model.path", "")))]
    if folder is not None:
        places.append(RunFolder(root=folder).model)
    return settings_from_flat(settings | _of_model(settings, places)), root


def _of_model(settings: Mapping[str, Any], places: Sequence[Path]) -> dict[str, Any]:
    """What a bootstrapped model says of settings that are as the app has them.

    A model that the run itself made is not among the places: what it was asked for has
    to stand in its settings when it is started again.
    """
    found = next((place for place in places if is_expert_model(place)), None)
    if found is None:
        return {}
    return {
        key: value
        for key, value in conversion_settings(found).items()
        if settings.get(key) == _app_values()[key]
    }


@cache
def _app_values() -> dict[str, str | int | float | bool]:
    return to_flat(load_settings(config_path("demo")))
