"""What the folders and files that a report is asked for are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from samv2.common.config import load_settings
from samv2.common.errors import CheckpointError, ConfigError
from samv2.federated.checkpoint import latest_checkpoint
from samv2.federated.run_folder import RunFolder

Kind = Literal["run", "comparison", "ablation", "frontier"]
FILES: dict[str, Kind] = {
    "federation.json": "comparison",
    "ablation.csv": "ablation",
    "frontier.json": "frontier",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One thing to report on."""

    kind: Kind
    path: Path
    """The run directory, or the file."""
    name: str
    """Short, and its own among the sources of a report."""


def find_sources(arguments: Sequence[Path]) -> tuple[Source, ...]:
    """What the arguments of ``samv2 report`` name, in their order.

    A folder can be several things at once; a frontier inside a run is part of the run.

    Args:
        arguments: run directories, folders or files of :data:`FILES`.

    Raises:
        CheckpointError: an argument is none of these.
    """
    found: list[tuple[Kind, Path]] = []
    for path in arguments:
        kinds = _kinds(Path(path))
        if not kinds:
            raise CheckpointError(_refusal(Path(path)))
        found += [kind for kind in kinds if kind not in found]
    folders = [path if kind == "run" else path.parent for kind, path in found]
    names = _short_names(folders)
    return tuple(
        Source(kind=kind, path=path, name=name)
        for (kind, path), name in zip(found, names)
    )


def _kinds(path: Path) -> list[tuple[Kind, Path]]:
    if path.is_file():
        return [(FILES[path.name], path)] if path.name in FILES else _by_ending(path)
    found: list[tuple[Kind, Path]] = []
    if _is_run(path):
        found.append(("run", path))
    for name, kind in FILES.items():
        inside = path / name
        if inside.is_file() and not (kind == "frontier" and found):
            found.append((kind, inside))
    return found


def _by_ending(path: Path) -> list[tuple[Kind, Path]]:
    """A table under another name; JSON could be anything."""
    return [("ablation", path)] if path.suffix == ".csv" else []


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's, be it one whose ``config.toml`` is lost or damaged."""
    run = RunFolder(root=folder)
    if run.prepared.is_file() or latest_checkpoint(run.checkpoints) is not None:
        return True
    try:
        return run.config.is_file() and bool(load_settings(run.config))
    except ConfigError:
        return False


def _refusal(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; name the --log-dir of a run, e.g. logs"
    known = ", ".join(FILES)
    if path.is_file():
        return (
            f"{path} is no file that a report can show; name a run's folder, or {known}"
        )
    return (
        f"{path} holds nothing to report on: neither config.toml of a run nor {known}; "
        f"make a run with `samv2 train --log-dir {path}`"
    )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many before it as tell them apart."""
    whole = [folder.resolve() for folder in folders]
    distinct = set(whole)
    for depth in range(1, 1 + max((len(path.parts) for path in whole), default=0)):
        names = {path: "/".join(path.parts[-depth:]) for path in distinct}
        if len(set(names.values())) == len(distinct):
            break
    return [names[path] for path in whole]
