"""A server's round: merging the replies of a thousand clients, which lie in files.

Run with ``pytest bench/bench_merging.py --benchmark-enable -s``. Blocks are those of
SmolLM2-135M's adapters, updates the product's defaults (int8, a budget of 256 KiB). Time
and memory are taken in a process of its own (merge_rounds.py); the bars hold for the
defaults, and the table shows what the other rules cost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from merge_rounds import (
    HELD,
    merge,
    merge_elsewhere,
    read_replies,
    settings_of,
    write_replies,
)
from packing_merges import CLIENTS, expected_mean
from rich.console import RenderableType

from samv2.common.telemetry import number_table

MOST_SECONDS = 3.0
MOST_GROWTH_MB = 8.0
"""What 1,000 replies may need beyond 100: client indices, weights, paths."""
LEAST_HELD_MB = 200.0
"""What 1,000 frames in memory take beyond 100: shows that the measure sees them."""
CASES = {
    "mean": (),
    "mean, frames in memory": (HELD,),
    "trimmed mean": ("aggregation.rule=trimmed_mean",),
    "median": ("aggregation.rule=median",),
    "clip to median": ("aggregation.clip_to_median=2.0",),
    "vote cap": ("edits.vote_cap=0.01",),
    "FedAvgM": ("aggregation.optimizer=fedavgm",),
    "FedAdam": ("aggregation.optimizer=fedadam",),
    "private": ("privacy.noise=1.0", "edits.rho_max=0"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The round's replies, one file a frame."""
    made = tmp_path_factory.mktemp("replies")
    write_replies(made)
    return made


@pytest.fixture(scope="module")
def found(
    tables: list[RenderableType],
) -> Iterator[dict[str, dict[int, dict[str, float]]]]:
    """{case: {clients: figures}}; printed in the end."""
    measured: dict[str, dict[int, dict[str, float]]] = {}
    yield measured
    rows = []
    for name, sizes in measured.items():
        few, many = sizes[CLIENTS // 10], sizes[CLIENTS]
        rows.append(
            [
                name,
                f"{many['seconds']:.2f}",
                f"{few['grown_MB']:.0f}",
                f"{many['grown_MB']:.0f}",
            ]
        )
    columns = ["rule", "s", f"MB, {CLIENTS // 10} clients", f"MB, {CLIENTS}"]
    tables.append(
        number_table(
            f"Merging {CLIENTS} replies from files",
            columns,
            rows,
            caption="CPU seconds; MB: the most resident memory, over that before the replies are read",
        )
    )


def test_the_mean_is_the_plain_one(folder: Path) -> None:
    replies = read_replies(folder, 20)
    blocks = merge(replies, settings_of()).blocks
    expected = expected_mean([reply.contribution for reply in replies])
    assert expected
    for key, value in expected.items():
        torch.testing.assert_close(blocks[key].double(), value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_merge(
    benchmark: Callable[..., object],
    folder: Path,
    found: dict[str, dict[int, dict[str, float]]],
    request: pytest.FixtureRequest,
    name: str,
) -> None:
    if name == "private" and importlib.util.find_spec("dp_accounting") is None:
        pytest.skip("dp-accounting is missing: pip install -e '.[dp]'")
    few = merge_elsewhere(folder, CLIENTS // 10, *CASES[name])
    many = benchmark.pedantic(  # type: ignore[attr-defined]
        merge_elsewhere, (folder, CLIENTS, *CASES[name]), rounds=1, iterations=1
    )
    found[name] = {CLIENTS // 10: few, CLIENTS: many}
    benchmark.extra_info.update(many)  # type: ignore[attr-defined]
    more = many["grown_MB"] - few["grown_MB"]
    if HELD in CASES[name]:
        assert more >= LEAST_HELD_MB
    if name == "mean":
        assert more <= MOST_GROWTH_MB
        if request.config.getoption("benchmark_enable"):
            assert many["seconds"] <= MOST_SECONDS
