"""A deployment on loopback for tests: its commands, its processes, and their end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.federated.test_flower_app import REPOSITORY, free_port

SCRIPT = REPOSITORY / "scripts" / "flower_deployment.sh"
PATIENCE = 1800.0
"""Seconds for whatever a test waits for."""


class Deployment:
    """Keys, homes and addresses of one SuperLink and its nodes under a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keys = root / "keys"
        self.homes = root / "homes"
        self.nodes = root / "nodes"
        self.address = f"127.0.0.1:{free_port()}"
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",  # the bits of one thread, as the embedded engine has
            "PYTHONPATH": os.pathsep.join(
                [str(REPOSITORY), str(REPOSITORY / "kernels")]
            ),
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
        }

    def call(self, *arguments: Any, expect: int = 0) -> str:
        """Run a sub-command to its end; its output."""
        done = subprocess.run(
            [str(SCRIPT), *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        output = done.stdout + done.stderr
        assert done.returncode == expect, output
        return output

    def begin(self, name: str, *arguments: Any) -> subprocess.Popen[bytes]:
        """Start a sub-command; its output goes to ``name.log``."""
        with (self.root / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(
                [str(SCRIPT), *map(str, arguments)],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started.append(started)
        return started

    def log(self, name: str) -> str:
        """What a started sub-command has said."""
        return (self.root / f"{name}.log").read_text(errors="replace")

    def superlink(self) -> subprocess.Popen[bytes]:
        """Start the SuperLink and wait until it answers."""
        started = self.begin(
            "superlink", "superlink", self.keys, self.homes / "superlink", self.address
        )
        said = self.log("superlink").count("Application startup complete")
        wait_for(
            lambda: self.log("superlink").count("Application startup complete") > said,
            lambda: self.log("superlink"),
            alive=started,
        )
        return started

    def supernode(self, node: int, folder: Path) -> subprocess.Popen[bytes]:
        """Start a node."""
        home = self.homes / f"node_{node}"
        return self.begin(
            f"node_{node}", "supernode", self.keys, home, self.address, node, folder
        )

    def known_nodes(self) -> dict[str, str]:
        """{node id: status} of all that the SuperLink lists."""
        done = subprocess.run(
            ["flwr", "supernode", "list", "--verbose", "--format", "json"],
            env=self.environment | {"FLWR_HOME": str(self.homes / "user")},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        nodes = json.loads(done.stdout)["nodes"]
        return {node["node-id"]: node["status"] for node in nodes}

    def processes(self, home: str = "", name: str = "") -> list[psutil.Process]:
        """What was started in a home (or in any), with a name in its command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                where = process.environ().get("FLWR_HOME", "")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            line = " ".join(process.info["cmdline"] or [])
            inside = Path(where).is_relative_to(self.homes / home)
            if where and inside and name in line:
                found.append(process)
        return found


@contextmanager
def deployment(root: Path) -> Iterator[Deployment]:
    """A deployment, of which nothing is left when the block ends."""
    made = Deployment(root)
    made.homes.mkdir(parents=True)
    try:
        yield made
    finally:
        made.call("stop", made.homes)
        for started in made.started:
            started.wait(60)
        assert made.processes() == []


def wait_for(
    happened: Callable[[], bool],
    explain: Callable[[], str],
    *,
    alive: subprocess.Popen[bytes] | None = None,
) -> None:
    """Wait for something; with an explanation where it does not come."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert alive is None or alive.poll() is None, explain()
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)
