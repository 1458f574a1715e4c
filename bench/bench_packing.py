"""Packing against memcpy of the same process, and against other ways of packing.

``pytest bench/bench_packing.py`` prints the tables and asserts results and sizes;
``--benchmark-enable`` asserts the speeds too, one test a bar, so that each miss has a
name, and lets ``--benchmark-json`` record them. ``-k`` chooses a part: ``case``,
``code_path``, ``fused``, ``checks``, ``merge``, ``adapters``, ``threshold``,
``baseline``.

``x memcpy`` is memcpy's time over ours for the dense bytes: above 1 is faster than
copying. Zeroing is several times faster than copying, so figures above 1 for sparse
decoding are less than they look. packing_speed.py says which clock and what memory,
packing_cases.py has the bars.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache, partial

import numpy as np
import pytest
import torch
from packing_baselines import BASELINES, THRESHOLDS, Baseline, bits_of
from packing_cases import CASES, COMPARED, NUMEL, SHARE_OF_BARS
from packing_merges import (
    ADAPTERS,
    CLIENTS,
    MERGES,
    adapter_manifest,
    contributions,
    expected_mean,
    merge_all,
)
from packing_speed import (
    ROUND,
    Packed,
    Row,
    code_path,
    fastest,
    keep_memory_warm,
    measure,
    rows_on_path,
)
from packing_tables import Compared, Figure, baseline_table, figure_table, speed_table
from rich.console import RenderableType
from torch import Tensor

from samv2.updates.aggregate import aggregate
from samv2.updates.packing import inspect, unpack
from samv2.updates.sparsify import kth_magnitude

OPERATIONS = ("encode", "decode", "accumulate")
KEPT = NUMEL // 100


@dataclass
class Found:
    """What was measured in this run of pytest."""

    rows: dict[str | None, dict[str, Row]] = field(default_factory=dict)
    """By code path and case."""
    compared: list[Compared] = field(default_factory=list)
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    """By title of their table."""


@pytest.fixture(scope="module")
def found(tables: list[RenderableType]) -> Iterator[Found]:
    """Filled by the tests; printed in the end."""
    all_found = Found()
    yield all_found
    for path, rows in all_found.rows.items():
        tables.append(speed_table(list(rows.values()), path))
    for title, figures in all_found.figures.items():
        tables.append(figure_table(title, figures))
    if all_found.compared:
        ours = all_found.rows.get(code_path(), {})
        tables.append(baseline_table(all_found.compared, ours))


@pytest.fixture(scope="module", autouse=True)
def quiet_process() -> Iterator[None]:
    """One torch thread, and memory that stays warm."""
    keep_memory_warm()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hold(request: pytest.FixtureRequest) -> Callable[[str | None], None]:
    """Fails with a miss, where speeds are asserted."""
    asserted = request.config.getoption("benchmark_enable")

    def fail(miss: str | None) -> None:
        if asserted and miss is not None:
            pytest.fail(miss, pytrace=False)

    return fail


@lru_cache(maxsize=1)
def packed_case(name: str) -> Packed:
    """A case, checked; the last one is kept."""
    packed = Packed(CASES[name].tensor(), CASES[name].codec)
    packed.check()
    return packed


@cache
def measured(name: str) -> Row:
    return measure(CASES[name], packed_case(name), seconds=1.0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.benchmark(timer=time.thread_time)
def test_case_speed(
    benchmark: Callable[..., object],
    name: str,
    operation: str,
    found: Found,
    hold: Callable[[str | None], None],
) -> None:
    row = measured(name)
    found.rows.setdefault(code_path(), {})[name] = row
    benchmark.extra_info.update(asdict(row))  # type: ignore[attr-defined]
    run = packed_case(name).operations[operation]
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)  # type: ignore[attr-defined]
    hold(row.miss(operation, SHARE_OF_BARS.get(code_path(), 1.0)))


@pytest.mark.parametrize("name", CASES)
def test_case_size(name: str, found: Found) -> None:
    row, case = measured(name), CASES[name]
    found.rows.setdefault(code_path(), {})[name] = row
    assert row.frame_bytes <= case.most_bytes
    if case.size is not None:
        assert row.size <= case.size


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", ["avx2", "scalar"])
def test_code_path(
    path: str, name: str, found: Found, hold: Callable[[str | None], None]
) -> None:
    """The same bytes, at a share of the speed."""
    if code_path() is None:
        pytest.skip("this build has one code path")
    if path == code_path():
        pytest.skip(f"this process runs on {path} itself")
    taken, rows = rows_on_path(path)
    if taken != path:
        pytest.skip(f"asked for {path}, this machine takes {taken}")
    row = rows[name]
    found.rows.setdefault(path, {})[name] = row
    assert row.frame_hash == measured(name).frame_hash, f"{path} packs other bytes"
    misses = [row.miss(what, SHARE_OF_BARS[path]) for what in ("encode", "decode")]
    hold("; ".join(miss for miss in misses if miss) or None)


@pytest.mark.parametrize("count", [1, 8])
def test_fused_add(
    count: int, found: Found, hold: Callable[[str | None], None]
) -> None:
    """Frames of 1 % added as they are, against decoding each and adding it."""
    merge = MERGES["50 of 1 %, 64 MiB"]
    frames, manifest = merge.frames(count), merge.manifest
    total, decoded = torch.zeros(NUMEL), {0: torch.zeros(NUMEL)}

    def apart() -> None:
        for frame in frames:
            unpack(frame, manifest, round=ROUND, out=decoded)
            total.add_(decoded[0])

    best = fastest(
        {"fused": lambda: merge_all(frames, manifest, {0: total}), "apart": apart}
    )
    figure = Figure(
        name=f"fused add of {count} at 1 %, over decode and then add",
        value=best["fused"] / best["apart"],
        most=0.25,
    )
    found.figures.setdefault("Shares", []).append(figure)
    hold(figure.miss)


@pytest.mark.parametrize(
    ("name", "most"), [("1 %", 0.1), ("10 %", 0.1), ("50 %", None), ("dense", None)]
)
def test_checks(
    name: str, most: float | None, found: Found, hold: Callable[[str | None], None]
) -> None:
    """Hashes and layout, and the test for finite values, as far as they can be timed.

    No bar where the frame is about as large as what it decodes to: hashing reads all of
    it once more. What a canonical frame needs is tested where values are copied, and
    cannot be turned off.
    """
    packed = packed_case(name)
    best = fastest(
        {
            "decode": packed.decode,
            "layout": lambda: inspect(packed.frame),
            "lax": lambda: unpack(
                packed.frame, packed.manifest, round=ROUND, allow_nonfinite=True
            ),
        }
    )
    finite = max(0.0, best["decode"] - best["lax"])
    figure = Figure(
        name=f"checks, over decode ({name})",
        value=(best["layout"] + finite) / best["decode"],
        most=most,
    )
    found.figures.setdefault("Shares", []).append(figure)
    hold(figure.miss)


@pytest.mark.parametrize("name", MERGES)
def test_merge(name: str, found: Found, hold: Callable[[str | None], None]) -> None:
    merge = MERGES[name]
    frames, total = merge.frames(), {0: torch.zeros(merge.numel)}
    merge_all(frames, merge.manifest, total)
    expected = torch.zeros(merge.numel)
    for index in range(merge.payloads):
        expected += merge.tensor(index % merge.distinct)
    assert torch.equal(total[0], expected)
    density = float(expected.count_nonzero() / merge.numel)
    best = fastest({"merge": lambda: merge_all(frames, merge.manifest, total)}, least=2)
    figure = Figure(
        name=f"{name}: union has {density:.1%}",
        value=1e3 * best["merge"] / merge.payloads,
        unit="ms a payload",
        most=merge.most_ms,
    )
    found.figures.setdefault("Merging payloads of one tensor", []).append(figure)
    hold(figure.miss)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind: str, found: Found, hold: Callable[[str | None], None]) -> None:
    items, manifest = contributions(kind), adapter_manifest()
    some = items[:20]
    mean = aggregate(some, manifest, round=ROUND).mean
    expected = expected_mean(some)
    assert mean.keys() == expected.keys()
    for id_, value in mean.items():
        torch.testing.assert_close(value.double(), expected[id_], rtol=0, atol=1e-5)
    best = fastest(
        {"aggregate": lambda: aggregate(items, manifest, round=ROUND)}, least=2
    )
    size = sum(len(item.read()) for item in items) / CLIENTS
    figure = Figure(
        name=f"{kind} ({size / 1000:.0f} kB each)",
        value=best["aggregate"],
        unit="s",
        most=2.0,
    )
    title = f"Merging {CLIENTS} updates of SmolLM2's adapters"
    found.figures.setdefault(title, []).append(figure)
    hold(figure.miss)


def test_threshold(found: Found, hold: Callable[[str | None], None]) -> None:
    """The k-th largest magnitude of a dense tensor, k = 1 %."""
    tensor = CASES["dense"].tensor()

    ways = {"samv2": lambda values, k: kth_magnitude({0: values}, k), **THRESHOLDS}
    runs = {name: partial(way, tensor, KEPT) for name, way in ways.items()}
    assert len({run() for run in runs.values()}) == 1, "thresholds differ"
    best = fastest(runs, least=2)
    figures = [
        Figure(
            name=name,
            value=1e3 * seconds,
            unit="ms",
            most=30.0 if name == "samv2" else None,
        )
        for name, seconds in best.items()
    ]
    found.figures["Exact threshold of the largest 1 %"] = figures
    hold(figures[0].miss)


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda item: item.name)
@pytest.mark.parametrize("name", COMPARED)
def test_baseline(name: str, baseline: Baseline, found: Found) -> None:
    if not baseline.installed:
        pytest.skip(f'{baseline.package} is missing: pip install -e ".[bench]"')
    packed = packed_case(name)
    bits, out = bits_of(packed.update[0]), bits_of(packed.copied)
    encoded = baseline.encode(bits)
    out.fill(-1)
    assert np.array_equal(baseline.decode(encoded, out), bits), "not lossless"
    best = fastest(
        {
            "memcpy": packed.memcpy,
            "encode": lambda: baseline.encode(bits),
            "decode": lambda: baseline.decode(encoded, out),
        },
        seconds=0.5,
        least=2,
    )
    bound = CASES[name].bound(packed.update[0])
    found.compared.append(
        Compared(
            name=baseline.name,
            case=name,
            encode=best["memcpy"] / best["encode"],
            decode=best["memcpy"] / best["decode"],
            size=baseline.size(encoded) / bound,
        )
    )
