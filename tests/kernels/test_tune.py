"""The tuner with a fake timer, and the file that keeps its winners."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from samv2_kernels import reference, tune, tuned
from samv2_kernels.gpu import bench_cases
from tests.helpers import assert_close

CONFIGS = [{"block_m": 16, "warps": 4}, {"block_m": 32, "warps": 4}, {"block_m": 64}]
KEY = {"rows": 64, "width": 4096, "weights": "nf4"}


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for the file; nothing of this process's cache survives a test."""
    path = tmp_path / "folder" / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned._loaded.cache_clear()
    yield path
    tuned._loaded.cache_clear()


class FakeGpu:
    """Runs nothing; a configuration takes the milliseconds that its rows ask for."""

    def __init__(self, times: Mapping[int, float | Exception]) -> None:
        self.times = times
        self.prepared = 0

    def case(self, rows: int = 64) -> tune.Case:
        """A case whose kernel looks its tiles up, as the real ones do."""
        key = {"rows": rows, "width": 4096}

        def prepare() -> Callable[[], object]:
            self.prepared += 1
            return lambda: tuned.lookup("matmul", key)

        return tune.Case(kernel="matmul", key=key, prepare=prepare)

    def timer(self, run: Callable[[], object]) -> float:
        """Milliseconds of the configuration that the case looked up."""
        config = run()
        assert isinstance(config, dict)
        found = self.times[config["block_m"]]
        if isinstance(found, Exception):
            raise found
        return found


def test_the_fastest_candidate_wins_and_is_found_again(path: Path) -> None:
    gpu = FakeGpu({16: 3.0, 32: 1.0, 64: 2.0})
    case = gpu.case()
    assert tuned.lookup("matmul", case.key) is None
    outcomes = tune.tune(
        [case],
        candidates=lambda kernel, arch: CONFIGS,
        arch="sm_86",
        store=lambda *entry: tuned.store_tuned(*entry, path),
        timer=gpu.timer,
    )
    (outcome,) = outcomes
    assert outcome.config == {"block_m": 32, "warps": 4}
    assert (outcome.milliseconds, outcome.slowest_milliseconds) == (1.0, 3.0)
    assert tuned.lookup("matmul", case.key) == {"block_m": 32, "warps": 4}
    assert tuned.lookup("matmul", {**case.key, "rows": 65}) is None
    assert tuned.lookup("other", case.key) is None
    assert gpu.prepared == 1, "inputs are made once a case"


def test_of_equals_the_preferred_candidate_wins() -> None:
    gpu = FakeGpu({16: 1.0, 32: 1.0, 64: 1.0})
    assert tune.tune_case(gpu.case(), CONFIGS, gpu.timer).config == CONFIGS[0]


def test_candidates_that_fail_lose_and_are_named() -> None:
    gpu = FakeGpu(
        {16: RuntimeError("out of resource: shared memory\nmore"), 32: 4.0, 64: 2.0}
    )
    outcome = tune.tune_case(gpu.case(), CONFIGS, gpu.timer)
    assert outcome.config == {"block_m": 64}
    assert [config for config, _ in outcome.failures] == [CONFIGS[0]]
    text = tune.describe(outcome)
    assert "block_m=64, 2.0000 ms (slowest candidate 4.0000 ms)" in text
    assert text.endswith("RuntimeError: out of resource: shared memory")


def test_a_case_without_survivors_stores_nothing_and_the_others_go_on(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = FakeGpu({16: ValueError("no"), 32: 1.0})
    configs = {"sm_86": [CONFIGS[0]]}
    cases = [gpu.case(rows=1), gpu.case(rows=2)]

    def candidates(kernel: str, arch: str) -> list[dict[str, int]]:
        return configs[arch] if gpu.prepared == 0 else CONFIGS[:2]

    assert tune.run_command(cases, candidates, "sm_86", path, gpu.timer) == 1
    assert tuned.lookup("matmul", cases[0].key) is None
    assert tuned.lookup("matmul", cases[1].key) == CONFIGS[1]
    output = capsys.readouterr().out
    assert "[1/2] matmul rows=1 width=4096: every candidate failed" in output
    assert output.endswith(f"stored in {path}\n")


def test_an_interrupt_is_no_failed_candidate() -> None:
    def timer(run: Callable[[], object]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune_case(FakeGpu({}).case(), CONFIGS, timer)


def test_switched_off_nothing_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuned.VARIABLE, "off")
    assert tuned.cache_path() is None
    gpu = FakeGpu({16: 1.0})
    candidates: tune.Candidates = lambda kernel, arch: CONFIGS[:1]
    status = tune.run_command(
        [gpu.case()], candidates, "sm_86", tuned.cache_path(), gpu.timer
    )
    assert status == 0 and not path.parent.exists()
    assert tuned.lookup("matmul", gpu.case().key) is None


def test_the_default_place_follows_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuned.cache_path() == Path("/somewhere/samv2_kernels/tuned.json")


def test_a_key_is_the_same_after_a_round_trip_through_json(path: Path) -> None:
    tuned.store_tuned("matmul", KEY, {"block_m": 32}, path)
    shuffled = dict(reversed(json.loads(json.dumps(KEY)).items()))
    assert list(shuffled) != list(KEY)
    assert tuned.lookup("matmul", shuffled) == {"block_m": 32}
    numpy_key = {**KEY, "rows": np.int64(64)}
    assert tuned.lookup("matmul", numpy_key) == {"block_m": 32}
    assert tuned.entry_key("k", {"on": True}) == tuned.entry_key("k", {"on": 1})


@pytest.mark.parametrize("value", [1.0, None, (8, 6), [8, 6]])
def test_a_key_holds_nothing_that_json_would_change(value: object) -> None:
    with pytest.raises(TypeError):
        tuned.entry_key("matmul", {"rows": value})  # type: ignore[dict-item]


def test_entries_add_up_and_replace(path: Path) -> None:
    tuned.store_tuned("a", KEY, {"block_m": 16}, path)
    assert tuned.lookup("a", KEY) == {"block_m": 16}
    tuned.store_tuned("b", KEY, {"block_m": 32}, path)
    tuned.store_tuned("a", KEY, {"block_m": 64}, path)
    assert tuned.lookup("a", KEY) == {"block_m": 64}
    assert tuned.lookup("b", KEY) == {"block_m": 32}
    assert len(tuned.load_tuned(path)) == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_caller_cannot_change_what_others_look_up(path: Path) -> None:
    tuned.store_tuned("a", KEY, {"block_m": 16}, path)
    found = tuned.lookup("a", KEY)
    assert found is not None
    found["block_m"] = 1
    assert tuned.lookup("a", KEY) == {"block_m": 16}


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("device_name", lambda index: "NVIDIA A40"), ("source_hash", lambda: "other")],
)
def test_entries_of_another_device_or_source_do_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str, value: object
) -> None:
    tuned.store_tuned("a", KEY, {"block_m": 16}, path)
    monkeypatch.setattr(tuned, attribute, value)
    assert tuned.lookup("a", KEY) is None


def test_entries_of_another_triton_or_package_do_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned.store_tuned("a", KEY, {"block_m": 16}, path)
    for module in ("triton", "samv2_kernels"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.__version__", "0.0.1")
            assert tuned.lookup("a", KEY) is None, module
    assert tuned.lookup("a", KEY) == {"block_m": 16}


DAMAGED = {
    "not json": '{"format": 1, "entries": {',
    "a list": "[1, 2]",
    "another format": '{"format": 2, "entries": {}}',
    "no entries": '{"format": 1}',
    "no config": '{"format": 1, "entries": {"key": [16]}}',
    "a word": '{"format": 1, "entries": {"key": {"block_m": "16"}}}',
    "a bool": '{"format": 1, "entries": {"key": {"block_m": true}}}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_reported_once_ignored_and_replaced(
    path: Path, name: str
) -> None:
    path.parent.mkdir()
    path.write_text(DAMAGED[name])
    with pytest.warns(tuned.TunedWarning, match="tuned.json is ignored"):
        assert tuned.lookup("a", KEY) is None
    assert tuned.lookup("a", KEY) is None, "a second warning would be an error here"
    with pytest.warns(tuned.TunedWarning):
        tuned.store_tuned("a", KEY, {"block_m": 16}, path)
    assert tuned.lookup("a", KEY) == {"block_m": 16}


def test_bytes_that_are_no_text_are_a_damaged_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(tuned.TunedWarning):
        assert tuned.load_tuned(path) == {}


def test_a_failed_write_leaves_the_old_file_and_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned.store_tuned("a", KEY, {"block_m": 16}, path)

    def fail(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuned.store_tuned("a", KEY, {"block_m": 64}, path)
    assert tuned.lookup("a", KEY) == {"block_m": 16}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_forced_configuration_ends_with_its_block() -> None:
    with tuned.forced("a", {"block_m": 16}):
        with tuned.forced("b", {"block_m": 32}):
            assert tuned.lookup("a", KEY) == {"block_m": 16}
            assert tuned.lookup("b", KEY) == {"block_m": 32}
        assert tuned.lookup("b", KEY) is None
    assert tuned.lookup("a", KEY) is None


def test_a_forced_configuration_reaches_other_threads() -> None:
    with tuned.forced("a", {"block_m": 16}), ThreadPoolExecutor(1) as pool:
        assert pool.submit(tuned.lookup, "a", KEY).result() == {"block_m": 16}


def test_lookups_are_recorded_once_each_until_the_block_ends() -> None:
    with tuned.recorded() as asked:
        tuned.lookup("a", KEY)
        tuned.lookup("b", {"rows": np.int64(1)})
        tuned.lookup("a", dict(reversed(KEY.items())))
    tuned.lookup("c", KEY)
    assert asked == [("a", KEY), ("b", {"rows": 1})]


@dataclass
class FakeWorkload:
    """Looks two kernels up, one of them by its own row count."""

    rows: int

    def prepare(self) -> Callable[[], object]:
        def run() -> None:
            tuned.lookup("shared", KEY)
            tuned.lookup("own", {"rows": self.rows})

        return run


def test_cases_are_what_the_workloads_look_up() -> None:
    workloads = [FakeWorkload(1), FakeWorkload(2)]
    found = bench_cases.cases(workloads)  # type: ignore[arg-type]
    assert [str(case) for case in found] == [
        "shared rows=64 width=4096 weights=nf4",
        "own rows=1",
        "own rows=2",
    ]
    asked: list[object] = []

    def timer(run: Callable[[], object]) -> float:
        run()
        asked.append(tuned.lookup("own", {"rows": 2}))
        return float(len(asked))

    outcome = tune.tune_case(found[2], CONFIGS, timer)
    assert asked == CONFIGS and outcome.config == CONFIGS[0]


@pytest.mark.parametrize("form", bench_cases.FORMS)
def test_a_workload_runs_forward_and_backward(form: str) -> None:
    shape = bench_cases.Shape(
        name="tiny", model_width=64, ffn_width=4 * 17, num_experts=4
    )
    workload = bench_cases.Workload(shape, form, tokens=5, device="cpu")
    assert bench_cases.cases([workload]) == [], "the CPU has no tiles to choose"
    found = bench_cases.layer(shape, form, "cpu")
    given = bench_cases.batch(shape, 5, "cpu")
    assert 1 <= given.experts_touched <= 4
    y_TD = bench_cases.forward(found, given)
    expected_TD = reference.grouped_experts(
        given.x_TD,
        given.walked,
        given.combine_TE,
        found.plain,
        adapters=found.adapters,
    )
    assert_close("output", y_TD, expected_TD, "bf16")


def test_workloads_cover_every_shape_form_and_token_count() -> None:
    names = {(w.shape.name, w.form, w.tokens) for w in bench_cases.workloads()}
    sizes = (bench_cases.SHAPES, bench_cases.FORMS, bench_cases.TOKENS)
    assert names == set(itertools.product(*sizes))
    assert len(bench_cases.workloads()) == len(names)


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
