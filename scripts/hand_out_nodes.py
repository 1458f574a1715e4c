"""Prepare a run for a deployment, and give every node a folder with its own shard.

    python scripts/hand_out_nodes.py RUN_DIR CLIENTS NODES_DIR [RUN_CONFIG]

RUN_CONFIG are settings as `flwr run --run-config` takes them. A run that is prepared
already is only handed out again; a node's memory of earlier rounds stays.
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path

from flwr.common.config import parse_config_args

from samv2.common.config import flatten
from samv2.common.errors import SamError
from samv2.common.telemetry import make_console
from samv2.data.shard_files import client_file
from samv2.federated.prepare import prepare
from samv2.federated.run_config import settings_from_run_config
from samv2.federated.run_folder import RunFolder, open_run, run_model

APP = Path(__file__).parents[1] / "flower_app" / "pyproject.toml"


def main(arguments: list[str]) -> int:
    """Do it; returns the exit status."""
    if len(arguments) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    run_dir, clients, folder, *rest = arguments
    root = Path(run_dir).resolve()
    given = f"run-dir='{root}' federation.clients={clients} {''.join(rest)}"
    app = tomllib.loads(APP.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    try:
        config = flatten(app["config"]) | parse_config_args([given])
        settings, root = settings_from_run_config(config)
        started = RunFolder(root=root).config.exists()
        run = open_run(root, settings, resume=started, overwrite=False)
        prepare(run, settings, make_console())
        for client in range(settings.federation.clients):
            hand_out(
                run, run_model(run, settings), client, Path(folder) / f"node_{client}"
            )
    except (SamError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def hand_out(run: RunFolder, model: Path, client: int, folder: Path) -> None:
    """Write a node's folder: the model, linked where it can be, and its own shard.

    Args:
        run: prepared.
        model: the run's bootstrapped model.
        client: whose folder it is.
        folder: made anew but for the client's memory of earlier rounds.
    """
    node = RunFolder(root=folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in (node.model, node.shards):
        if part.exists():
            shutil.rmtree(part)
    shutil.copytree(model, node.model, copy_function=_link)
    node.shards.mkdir()
    shard = client_file(client)
    shutil.copy2(run.shards / shard, node.shards / shard)


def _link(source: str, target: str) -> str:
    """A second name for a file on the same disk, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
