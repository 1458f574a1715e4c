"""The audit end to end: real compilation in child processes, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from samv2_kernels.audit import Failure, Row, audit_specs, broken, run
from samv2_kernels.audit.cli import main
from samv2_kernels.gpu.spec import KernelSpec
from tests.kernels import audit_kernels
from tests.kernels.test_audit import ISSUE_KEYS

MODULE = audit_kernels.__name__


@pytest.fixture(scope="module")
def row() -> Row:
    """The matmul on sm_86."""
    (row,) = audit_specs([audit_kernels.matmul_spec()], "sm_86", jobs=1)
    return row


def test_a_matmul_compiles_while_this_process_interprets(row: Row) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1", "restored after the children started"
    assert list(broken(row)) == []
    assert row.spill_bytes == 0 and row.threads == 128
    assert 0 < row.registers < 256
    assert 0 < row.shared_bytes < 99 * 1024


def test_the_tensor_instructions_are_those_of_the_tile(row: Row) -> None:
    step = row.rows_per_tile * audit_kernels.BLOCK_N * audit_kernels.BLOCK_K
    of_a_step = step // (16 * 8 * 16) // 4
    assert row.steps_per_turn is not None and row.tensor_share is not None
    assert row.tensor_core_ops >= of_a_step * row.steps_per_turn
    in_the_loop = row.instructions_per_weight * row.tensor_share  # type: ignore
    assert in_the_loop * row.weights_per_step / row.threads == pytest.approx(of_a_step)


def test_the_weights_are_those_of_the_weight_pointer(row: Row) -> None:
    assert row.widest_weight_load_bytes == 16
    assert row.weights_loaded_per_step == row.weights_per_step == 64 * 64


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--specs", f"{MODULE}:specs", "--arch", "sm_90", "--json"]
    assert main([*arguments, "--jobs", "1"]) == 0
    (values,) = json.loads(capsys.readouterr().out)
    assert set(ISSUE_KEYS) <= set(values)
    assert values["kernel"] == "matmul" and values["arch"] == "sm_90"
    assert values["bound"] is None, "an A40 does not run this code"
    assert values["tensor_core_ops"] == 64 // 16, "one warpgroup, 64x64x16 at a time"
    assert values["widest_weight_load_bytes"] == 16


def test_the_command_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--specs", f"{MODULE}:bad_specs", "--arch", "sm_86", "--jobs", "1"]
    assert main(arguments) == 1
    output = capsys.readouterr()
    narrow, compiler = output.err.split("sm_86 broken [w4]: does not compile: ")
    assert narrow.startswith("sm_86 matmul [unaligned]: widest_weight_load_bytes is 2,")
    assert "incompatible" in compiler
    assert "over budget" in output.out


def test_a_compiler_that_aborts_takes_only_its_own_row_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aborting_kernel.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def kernel() -> None: ...

    kernel.__module__, kernel.__qualname__ = "aborting_kernel", "kernel"
    good = audit_kernels.matmul_spec()
    bad = dataclasses.replace(good, kernel="bad", function=kernel)
    calls: list[None] = []
    tasks: list[KernelSpec] = [bad, good]
    results = run(tasks, ["sm_86"] * 2, jobs=1, done=lambda: calls.append(None))
    assert results[0] == Failure(
        "bad", "sm_86", good.config, "the compiler aborted its process"
    )
    assert isinstance(results[1], Row) and results[1].kernel == "matmul"


def test_a_list_with_failures_names_all_of_them() -> None:
    broken_spec = audit_kernels.bad_specs("sm_86")[1]
    short = dataclasses.replace(audit_kernels.matmul_spec(), signature={"K": "i32"})
    with pytest.raises(RuntimeError) as error:
        audit_specs([broken_spec, short], "sm_86", jobs=1)
    compiler, names = str(error.value).split("matmul 16x64x64 w4 s3 sm_86: ")
    assert compiler.startswith("broken w4 sm_86: CompilationError")
    assert "spec lacks ['out_ptr', 'weight_ptr', 'x_ptr']" in names


def test_the_command_refuses_kernels_that_do_not_ship() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--specs", f"{MODULE}:specs", "--kernel", "attention"])
    assert exit_.value.code == 2


def test_help_and_budgets_explain_themselves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "exit status" in capsys.readouterr().out
    assert main(["--budgets"]) == 0
    assert "at most 6.5" in capsys.readouterr().out
