"""What a round costs the server, training left out, with 50 and with 500 clients.

Run with ``pytest bench/bench_server_round.py --benchmark-enable -s``. Blocks are those of
SmolLM2-135M's adapters, updates the product's defaults (int8, a budget of 256 KiB). A
round is requests, validation, spool, merge and checkpoint (server_rounds.py), in CPU
seconds: other processes on the machine take time on the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from merge_rounds import write_replies
from rich.console import RenderableType
from server_rounds import DISTINCT, round_elsewhere

from samv2.common.telemetry import number_table

FEW, MANY = 50, 500
MOST_SECONDS = 2.0
"""Of a round with FEW clients."""
MOST_GROWTH_MB = 8.0
"""What MANY clients may need beyond FEW: requests, weights, paths."""


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What clients send."""
    made = tmp_path_factory.mktemp("frames")
    write_replies(made, DISTINCT)
    return made


@pytest.fixture(scope="module")
def found(tables: list[RenderableType]) -> Iterator[dict[int, dict[str, float]]]:
    """{clients: figures}; printed in the end."""
    measured: dict[int, dict[str, float]] = {}
    yield measured
    columns = ["clients", "round, s", "broadcast, s", "checkpoint, s", "MB"]
    rows = [
        [
            str(clients),
            f"{item['round']:.2f}",
            f"{item['broadcast']:.3f}",
            f"{item['checkpoint']:.3f}",
            f"{item['grown_MB']:.0f}",
        ]
        for clients, item in measured.items()
    ]
    caption = "CPU seconds; MB: largest resident memory over that before the round"
    tables.append(number_table("A server's round", columns, rows, caption=caption))


@pytest.mark.parametrize("clients", [FEW, MANY])
def test_server_round(
    benchmark: Callable[..., object],
    frames: Path,
    tmp_path: Path,
    found: dict[int, dict[str, float]],
    request: pytest.FixtureRequest,
    clients: int,
) -> None:
    item = benchmark.pedantic(  # type: ignore[attr-defined]
        round_elsewhere, (frames, tmp_path, clients), rounds=1, iterations=1
    )
    assert item["replies"] == clients
    assert not (tmp_path / "spool").exists()
    found[clients] = item
    benchmark.extra_info.update(item)  # type: ignore[attr-defined]
    if clients == MANY and FEW in found:
        assert item["grown_MB"] - found[FEW]["grown_MB"] <= MOST_GROWTH_MB
    if clients == FEW and request.config.getoption("benchmark_enable"):
        assert item["round"] <= MOST_SECONDS
