"""The layer rule: a file imports from lower layers and its own folder only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW: dict[str, set[str]] = {
    "common": set(),
    "data": {"common"},
    "experts": {"common"},
    "models": {"common", "experts"},
    "updates": {"common"},
    "federated": {"common", "configs", "data", "experts", "models", "updates"},
    "report": {"common", "federated", "models"},
    "ablation": {
        "common",
        "configs",
        "data",
        "experts",
        "models",
        "updates",
        "federated",
    },
}
"""What each folder of samv2 may import beside itself; the rest may import all."""
KERNEL_USERS = {"experts", "models", "federated"}
FLWR_FILES = {
    f"samv2/federated/{name}.py"
    for name in (
        "strategy",
        "roster",
        "exchange",
        "workers",
        "rehearsal_mod",
        "client_app",
        "server_app",
        "grid",
        "questions",
        "requests",
        "ask_counts",
        "drift_watch",
        "lora_strategy",
        "lora_app",
        "simulation_workers",
    )
}
PACKAGES = [*sorted((ROOT / "samv2").rglob("*.py"))]
KERNELS = [*sorted((ROOT / "kernels").rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, also inside functions and type checks."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_files_are_found() -> None:
    names = {name_of(path) for path in PACKAGES + KERNELS}
    assert "samv2/experts/moe_layers.py" in names
    assert "kernels/samv2_kernels/reference/walk.py" in names


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_a_file_imports_from_below_and_its_own_folder(path: Path) -> None:
    parts = path.relative_to(ROOT / "samv2").parts
    if len(parts) == 1 or parts[0] not in BELOW:
        return
    folder = parts[0]
    allowed = BELOW[folder] | {folder}
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "samv2":
            target = rest.partition(".")[0]
            own = target not in BELOW and not (ROOT / "samv2" / target).is_dir()
            extension = own and target.startswith("_")
            assert target in allowed or extension, f"imports {module}"
        if top == "samv2_kernels":
            assert folder in KERNEL_USERS, f"imports {module}"


@pytest.mark.parametrize("path", PACKAGES + KERNELS, ids=name_of)
def test_flower_stays_in_its_files(path: Path) -> None:
    if name_of(path) not in FLWR_FILES:
        assert not any(module.partition(".")[0] == "flwr" for module in imports(path))


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernels_need_torch_and_triton_only(path: Path) -> None:
    allowed = {"torch", "triton", "samv2_kernels"} | sys.stdlib_module_names
    assert {module.partition(".")[0] for module in imports(path)} <= allowed
