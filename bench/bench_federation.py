"""Protocol B2: SAM-v2 against FedIT where clients differ much, on a tiny Llama.

Run with ``pytest bench/bench_federation.py --benchmark-enable -s``; minutes on two cores.
Five clients hold text that the model never saw (C++, computer algebra, diagnosis codes,
definitions in English and Turkish). All methods train on the same batches and are scored
on the same windows; what SAM-v2 has to reach is asserted. The model is trained once and
cached. ``SAMV2_BENCH_MODEL=FOLDER`` takes another, ``SAMV2_BENCH_TEXT=FOLDER`` takes
the domains' text from ``FOLDER/NAME/{train,heldout}.txt``, and ``SAMV2_BENCH_LOGS=FOLDER``
keeps the runs, which are then not repeated.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from bench.tiny_llama import cached_tiny_llama
from samv2.common.errors import DataError, FetchError
from samv2.configs import config_path
from samv2.federated.benchmark import run_benchmark
from samv2.federated.benchmark_report import report_table
from samv2.federated.benchmark_settings import Benchmark, load_benchmark

METHODS = ("fedit", "local", "samv2")
MOST_PERPLEXITY = 130.0
LEAST_SAVING = 20
"""How many times fewer bytes than FedIT a client sends."""


@pytest.fixture(scope="module")
def protocol() -> Benchmark:
    """Protocol B2 on the tiny model; skipped where its text cannot be had."""
    model = os.environ.get("SAMV2_BENCH_MODEL")
    try:
        overrides = [f"model.path={model or cached_tiny_llama()}"]
    except (DataError, FetchError) as error:
        pytest.skip(f"the tiny model's text cannot be had: {error}")
    plain = load_benchmark(config_path("protocol_b2"), METHODS, overrides)
    if not (text := os.environ.get("SAMV2_BENCH_TEXT")):
        return plain
    domains = ",".join(f"{name}={text}/{name}" for name in plain.base.data.domains)
    return load_benchmark(
        config_path("protocol_b2"), METHODS, [*overrides, f"data.domains={domains}"]
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the benchmark."""
    kept = os.environ.get("SAMV2_BENCH_LOGS")
    return Path(kept) if kept else tmp_path_factory.mktemp("federation")


def run(protocol: Benchmark, root: Path, methods: tuple[str, ...]) -> dict[str, Any]:
    """The report of some methods; those that are finished are not run again."""
    chosen = {name: protocol.methods[name] for name in methods}
    return run_benchmark(replace(protocol, methods=chosen), root, console=Console())


@pytest.mark.parametrize("name", METHODS)
def test_method(benchmark: Any, protocol: Benchmark, root: Path, name: str) -> None:
    report = benchmark.pedantic(run, (protocol, root, (name,)), rounds=1, iterations=1)
    entry = report["methods"][0]
    benchmark.extra_info |= {
        "perplexity": entry["perplexity"],
        "bytes_up_per_client_round": entry["bytes_up_per_client_round"],
    }
    assert entry["perplexity"] < report["protocol"]["dense"]["perplexity"]


def test_sam_beats_fedit_with_a_twentieth_of_its_bytes(
    protocol: Benchmark, root: Path, tables: list[RenderableType]
) -> None:
    report = run(protocol, root, METHODS)
    tables.append(report_table(report))
    by_name = {entry["method"]: entry for entry in report["methods"]}
    sam, fedit = by_name["samv2"], by_name["fedit"]
    most = fedit["bytes_up_per_client_round"] / LEAST_SAVING
    assert sam["bytes_up_per_client_round"] <= most
    assert sam["perplexity"] <= MOST_PERPLEXITY < fedit["perplexity"]
