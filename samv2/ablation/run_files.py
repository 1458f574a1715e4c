"""What a finished run left, read as it lies there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from samv2.common.settings import Settings
from samv2.common.telemetry import read_metrics
from samv2.federated.run_folder import RunFolder, run_model, stored_settings

FRAME = re.compile(r"round_(\d+)_client_(\d+)\.bin")
MERGE = re.compile(r"merge_round(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a finished run left, read when it is asked for."""

    root: Path

    @cached_property
    def settings(self) -> Settings:
        """As the run was started."""
        return stored_settings(self.root)

    @cached_property
    def model(self) -> Path:
        """The folder of the model that it started from."""
        return run_model(RunFolder(root=self.root), self.settings)

    @cached_property
    def metrics(self) -> dict[int, dict[str, Any]]:
        """By round."""
        return {row["round"]: row for row in read_metrics(self.root)}

    @cached_property
    def merges(self) -> dict[int, dict[str, Any]]:
        """``merge_round{N}.json`` by round."""
        found = {}
        for path in self.root.iterdir():
            if match := MERGE.fullmatch(path.name):
                found[int(match[1])] = _json(path)
        return dict(sorted(found.items()))

    @cached_property
    def frames(self) -> dict[tuple[int, int], bytes]:
        """Updates as they came, by (round, client)."""
        found = {}
        folder = self.root / "frames"
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if match := FRAME.fullmatch(path.name):
                found[int(match[1]), int(match[2])] = path.read_bytes()
        return found

    @cached_property
    def trace(self) -> list[dict[str, Any]]:
        """``expert_call_trace.json``."""
        return _json(self.root / "expert_call_trace.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``."""
        return _json(self.root / "summary.json")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the model, without reading it."""
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(self.model.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}
        return found

    def rounds(self) -> range:
        """Rounds that the run must have done."""
        return range(1, self.settings.federation.rounds + 1)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
