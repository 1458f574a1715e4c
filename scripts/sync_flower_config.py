"""Write the demo's settings into the Flower app's run config.

Flower only lets `flwr run --run-config` change keys that the app's pyproject.toml names,
so every setting has to stand there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from samv2.common.config import load_settings, to_flat
from samv2.configs import config_path

APP = Path(__file__).parents[1] / "flower_app" / "pyproject.toml"
TABLE = "[tool.flwr.app.config]"


def main() -> None:
    """Replace everything from the config table to the end of the file."""
    nested: dict[str, Any] = {"run-dir": ""}
    for key, value in to_flat(load_settings(config_path("demo"))).items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    text = APP.read_text(encoding="utf-8")
    head = text[: text.index(TABLE)]
    body = tomli_w.dumps({"tool": {"flwr": {"app": {"config": nested}}}})
    APP.write_text(head + body, encoding="utf-8")


if __name__ == "__main__":
    main()
