"""The audit's readers and models, on listings written by hand and known figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from samv2_kernels.audit import BUDGETS, Row, broken, model, ptx, sass
from samv2_kernels.audit.compile import Artifact
from samv2_kernels.audit.row import make_row
from samv2_kernels.audit.table import plain
from samv2_kernels.gpu.spec import KernelSpec

ISSUE_KEYS = (
    *("kernel", "arch", "config", "rows_per_tile", "weights", "direction"),
    *("registers", "spill_bytes", "shared_bytes", "occupancy", "tensor_core_ops"),
    *("widest_weight_load_bytes", "instructions_per_weight", "lsu_per_weight"),
)


def listing(*lines: str) -> str:
    """``nvdisasm -c`` of some instructions (with their semicolon) and labels."""
    text, address = ["\t.section\t.text.k", "k:", ".text.k:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/  {line}")
            address += 16
    return "\n".join(text)


LOOP_BODY = (
    "LDGSTS.E.BYPASS.128 [R11+0x2000], [R4.64+0x100], P3 ;",
    "@!P2 LDGSTS.E.64 [R11], [R2.64] ;",
    "LDGDEPBAR ;",
    "LDSM.16.M88.4 R20, [R30] ;",
    "LDG.E R133, [R130.64] ;",
    "PRMT R1, R2, 0x5410, R3 ;",
    "HMMA.16816.F32.BF16 R32, R40, R32, RZ ;",
    "HMMA.16816.F32.BF16 R36, R40.reuse, R36, RZ ;",
)
ONE_LOOP = listing(
    "S2R R0, SR_TID.X ;",
    ".L_x_1:",
    *LOOP_BODY,
    "@!P1 BRA `(.L_x_1) ;",
    "STG.E.128 [R2.64], R20 ;",
    "EXIT ;",
    ".L_x_2:",
    "BRA `(.L_x_2);",
    "NOP;",
)


def test_the_main_loop_is_counted_from_its_label_to_its_branch() -> None:
    loop = sass.parse(ONE_LOOP).main_loop()
    assert loop is not None
    assert loop.instructions == len(LOOP_BODY) + 1
    assert loop.tensor_ops == 2
    assert loop.multiply_adds == 2 * 16 * 8 * 16
    assert loop.lsu == 4, "both LDGSTS, LDSM and LDG, but not LDGDEPBAR"
    assert loop.load_widths == (16, 8, 4)
    assert not loop.tf32


def test_the_whole_program_leaves_padding_out() -> None:
    program = sass.parse(ONE_LOOP)
    assert program.tally().instructions == len(LOOP_BODY) + 5
    assert program.code_bytes == 16 * (len(LOOP_BODY) + 5)
    assert program.instructions[0].address == 0
    assert program.instructions[3].address == 48


def test_an_outer_loop_is_not_the_main_loop_though_it_holds_more() -> None:
    hmma = "HMMA.16816.F32.BF16 R32, R40, R32, RZ ;"
    nested = listing(
        ".L_x_0:",
        "MOV R0, R1 ;",
        ".L_x_1:",
        *[hmma] * 3,
        "BRA `(.L_x_1) ;",
        ".L_x_2:",
        *[hmma] * 2,
        "@P0 BRA `(.L_x_2) ;",
        hmma,
        "@P1 BRA `(.L_x_0) ;",
    )
    loop = sass.parse(nested).main_loop()
    assert loop is not None and (loop.instructions, loop.tensor_ops) == (4, 3)


def test_a_small_loop_without_matmuls_inside_does_not_hide_the_main_loop() -> None:
    text = listing(
        ".L_x_0:",
        "HMMA.16816.F32.BF16 R32, R40, R32, RZ ;",
        ".L_x_1:",
        "IADD3 R0, R0, 1, RZ ;",
        "@P0 BRA `(.L_x_1) ;",
        "@P1 BRA.U UP0, `(.L_x_0) ;",
    )
    loop = sass.parse(text).main_loop()
    assert loop is not None and loop.instructions == 4


def test_branches_to_one_label_make_one_loop() -> None:
    text = listing(
        ".L_x_0:",
        "HMMA.1688.F32.TF32 R32, R40, R32, RZ ;",
        "@P0 BRA `(.L_x_0) ;",
        "MOV R0, R1 ;",
        "@P1 BRA `(.L_x_0) ;",
    )
    loop = sass.parse(text).main_loop()
    assert loop is not None and loop.instructions == 4
    assert loop.tf32 and loop.multiply_adds == 16 * 8 * 8


def test_code_without_matmuls_has_no_main_loop() -> None:
    text = listing(".L_x_0:", "LDG.E.128 R0, [R2.64] ;", "BRA `(.L_x_0) ;")
    assert sass.parse(text).main_loop() is None


@pytest.mark.parametrize(
    ("opcode", "multiply_adds"),
    [
        ("HMMA.16816.F32.BF16", 2048),
        ("HMMA.1688.F32.TF32", 1024),
        ("IMMA.16832.S8.S8", 4096),
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),
        ("FFMA", 0),
    ],
)
def test_multiply_adds_of_a_warp(opcode: str, multiply_adds: int) -> None:
    assert sass.Instruction(0, opcode).multiply_adds == multiply_adds


def test_an_unknown_tensor_shape_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(sass.SassError, match="HMMA.777"):
        sass.parse(listing("HMMA.777.F32 R0, R1, R2, R3 ;")).tally()


def test_text_that_is_no_listing_is_refused() -> None:
    with pytest.raises(sass.SassError, match="nvdisasm"):
        sass.parse("nvdisasm fatal : unknown option")


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDG.E.128", 16),
        ("LDG.E.64.CONSTANT", 8),
        ("LDG.E", 4),
        ("LDG.E.U16", 2),
        ("LDG.E.S8", 1),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDGSTS.E.LTC128B", 4),
        ("LDS.128", 0),
        ("STG.E.128", 0),
    ],
)
def test_bytes_of_a_load(opcode: str, size: int) -> None:
    assert sass.Instruction(0, opcode).load_bytes == size


PTX = """
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1, .param .u64 k_param_2)
.reqntid 128
{
$L__func_begin0:
 ld.param.b64 %rd1, [k_param_0];
 ld.param.b64 %rd2, [k_param_1];
 ld.param.b64 %rd3, [k_param_2];
 mad.wide.s32 %rd4, %r1, 2, %rd1;
 mad.wide.u32 %rd9, %r2, 2, %rd2; // a comment with [ %rd3 + 0 ]
 cp.async.cg.shared.global [ %r5 + 0 ], [ %rd9 + 0 ], 0x10, %r6;
$L__BB0_1:
 ld.global.b32 { %r79 }, [ %rd3 + 4 ];
 ld.global.L1::evict_first.v2.b32 { %r80, %r81 }, [ %rd4 + 0 ];
 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };
 add.s64 %rd5, %rd9, 64;
 cp.async.cg.shared.global [ %r5 + 0 ], [ %rd5 + 0 ], 0x10, %r6;
 @%p1 cp.async.ca.shared.global [ %r7 + 0 ], [ %rd9 + 128 ], 0x8, %r6;
 ld.global.b64 { %rd6 }, [ %rd1 + 0 ];
 ld.global.b32 { %r9 }, [ %rd6 + 0 ];
 add.s64 %rd9, %rd5, 64;
 @%p5 bra $L__BB0_1;
 st.global.b32 [ %rd4 + 0 ], { %r79 };
 ret;
}
"""


def test_loads_are_charged_to_the_pointer_they_go_through() -> None:
    loop = ptx.main_loop(PTX, ["x_ptr", "codes_ptr", "absmax_ptr"])
    assert loop is not None and loop.tensor_ops == 1
    assert loop.loads == {
        "absmax_ptr": ptx.PointerLoads(4, 4 * 128),
        "x_ptr": ptx.PointerLoads(8, (8 + 8) * 128),
        "codes_ptr": ptx.PointerLoads(16, (16 + 8) * 128),
    }, "a load through a loaded address belongs to no argument"


SPEC = KernelSpec(
    kernel="k",
    config="c",
    function=None,
    signature={"x_ptr": "*bf16", "codes_ptr": "*i16", "absmax_ptr": "*fp32"},
    constexprs={},
    rows_per_tile=16,
    weights="nf4",
    direction="forward",
    weights_per_step=24 * 128 * 2,
)
ARTIFACT = Artifact(
    registers=128,
    spill_bytes=0,
    shared_bytes=24 * 1024,
    threads=128,
    has_matmul=True,
    arguments=("x_ptr", "codes_ptr", "absmax_ptr"),
    ptx=PTX,
    sass=ONE_LOOP,
)


def test_a_row_divides_by_the_steps_that_ptxas_unrolled() -> None:
    row = make_row(SPEC, "sm_86", ARTIFACT)
    assert row.steps_per_turn == 2, "two HMMA for one mma.sync"
    weights = SPEC.weights_per_step * 2
    assert row.instructions_per_weight == (len(LOOP_BODY) + 1) * 128 / weights
    assert row.lsu_per_weight == 4 * 128 / weights
    assert row.tensor_share == 2 / (len(LOOP_BODY) + 1)
    assert row.widest_weight_load_bytes == 16
    assert row.weights_loaded_per_step == SPEC.weights_per_step
    assert (row.bound, row.bound_factor) == ("dram", 1.0)


def test_json_carries_the_promised_keys_with_plain_values() -> None:
    values = make_row(SPEC, "sm_86", ARTIFACT).as_json()
    assert set(ISSUE_KEYS) <= set(values)
    assert all(isinstance(v, str | int | float | None) for v in values.values())
    assert values["occupancy"] == 0.3333, "4 blocks of 4 warps of 48"


def test_the_weights_are_told_from_other_pointers_by_what_they_load() -> None:
    spec = dataclasses.replace(SPEC, weights="bf16", weights_per_step=16 * 128 // 2)
    row = make_row(spec, "sm_86", ARTIFACT)
    assert row.widest_weight_load_bytes == 8, "x_ptr: the codes are no floats"


def test_more_weights_than_the_loop_loads_break_a_budget() -> None:
    spec = dataclasses.replace(SPEC, weights_per_step=SPEC.weights_per_step * 2)
    row = make_row(spec, "sm_86", ARTIFACT)
    assert row.weights_loaded_per_step == SPEC.weights_per_step
    assert any("weights_loaded_per_step" in message for message in broken(row))


def test_a_route_kernel_has_no_figures_per_weight() -> None:
    spec = dataclasses.replace(
        SPEC, weights="none", direction="route", weights_per_step=0
    )
    text = listing("LDG.E R0, [R2.64] ;", "EXIT ;")
    artifact = dataclasses.replace(ARTIFACT, has_matmul=False, sass=text)
    row = make_row(spec, "sm_86", artifact)
    assert row.instructions_per_weight is None and row.lsu_per_weight is None
    assert row.widest_weight_load_bytes is None and row.tensor_core_ops == 0
    assert not list(broken(row))


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "arch", "blocks", "share"),
    [
        # NVIDIA's occupancy calculator and the table in the docstring's guide.
        (255, 37 * 1024, 128, "sm_86", 2, 8 / 48),
        (80, 18 * 1024, 64, "sm_86", 5, 10 / 48),
        (136, 25088, 128, "sm_86", 3, 12 / 48),
        (32, 0, 32, "sm_86", 16, 16 / 48),
        (32, 0, 256, "sm_86", 6, 1.0),
        (32, 0, 256, "sm_80", 8, 1.0),
        (32, 0, 32, "sm_89", 24, 24 / 48),
        (255, 0, 1024, "sm_80", 0, 0.0),
        (128, 99 * 1024, 128, "sm_86", 1, 4 / 48),
        (128, 99 * 1024 + 1, 128, "sm_89", 0, 0.0),
        (128, 163 * 1024, 128, "sm_80", 1, 4 / 64),
        (168, 227 * 1024, 384, "sm_90", 1, 12 / 64),
    ],
)
def test_occupancy(
    registers: int, shared: int, threads: int, arch: str, blocks: int, share: float
) -> None:
    size = (registers, shared, threads, arch)
    assert model.blocks_per_sm(*size) == blocks
    assert model.occupancy(*size) == share


@pytest.mark.parametrize(
    ("instructions", "lsu", "multiply_adds", "tf32", "resource", "factor"),
    [
        (5.2, 0.3, 16, False, "dram", 1.0),
        (6.8, 0.5, 64, False, "tensor", 1.0),
        (24.2, 5.9, 64, True, "tensor", 2.0),
        (17.3, 4.7, 16, True, "lsu", 4.7 / 32 / (0.5625 / 4.76)),
        (21.3, 3.7, 64, False, "issue", 21.3 / 128 / (64 / 512)),
    ],
)
def test_what_binds_on_an_a40(
    instructions: float,
    lsu: float,
    multiply_adds: float,
    tf32: bool,
    resource: str,
    factor: float,
) -> None:
    found = model.bound(
        instructions_per_weight=instructions,
        lsu_per_weight=lsu,
        multiply_adds_per_weight=multiply_adds,
        tf32=tf32,
        weights="nf4",
    )
    assert found.resource == resource
    assert found.factor == pytest.approx(factor)


def test_bf16_weights_cost_more_dram() -> None:
    found = model.bound(
        instructions_per_weight=21.3,
        lsu_per_weight=3.7,
        multiply_adds_per_weight=64,
        tf32=False,
        weights="bf16",
    )
    assert (found.resource, found.factor) == ("dram", 1.0)


GOOD = Row(
    kernel="k",
    arch="sm_86",
    config="c",
    rows_per_tile=32,
    weights="nf4",
    direction="forward",
    registers=128,
    spill_bytes=0,
    shared_bytes=99 * 1024,
    occupancy=0.25,
    tensor_core_ops=8,
    widest_weight_load_bytes=16,
    instructions_per_weight=6.5,
    lsu_per_weight=0.5,
    threads=128,
    blocks_per_sm=1,
    code_bytes=1600,
    has_matmul=True,
    steps_per_turn=1.0,
    weights_per_step=4096,
    weights_loaded_per_step=4096,
    tensor_share=0.1,
    bound="dram",
    bound_factor=1.0,
)
KEPT = [
    {},
    {"rows_per_tile": 33, "instructions_per_weight": 7.5},
    {"direction": "dx", "instructions_per_weight": 8.0},
    {"arch": "sm_90", "instructions_per_weight": 40.0},
    {"arch": "sm_90", "shared_bytes": 227 * 1024},
    {"arch": "sm_80", "shared_bytes": 163 * 1024},
    {"weights": "bf16", "instructions_per_weight": 40.0},
    {"weights": "none", "direction": "dw", "widest_weight_load_bytes": None},
]
OVER = [
    ("spill_bytes", {"spill_bytes": 4}),
    ("shared_bytes", {"shared_bytes": 99 * 1024 + 1}),
    ("shared_bytes", {"arch": "sm_80", "shared_bytes": 163 * 1024 + 1}),
    ("shared_bytes", {"arch": "sm_90", "shared_bytes": 227 * 1024 + 1}),
    ("blocks_per_sm", {"blocks_per_sm": 0}),
    ("tensor_core_ops", {"tensor_core_ops": 0}),
    ("tensor_core_ops", {"weights": "none", "direction": "dw", "tensor_core_ops": 0}),
    ("widest_weight_load_bytes", {"widest_weight_load_bytes": 8}),
    ("widest_weight_load_bytes", {"weights": "bf16", "widest_weight_load_bytes": 8}),
    ("widest_weight_load_bytes", {"widest_weight_load_bytes": None}),
    ("weights_loaded_per_step", {"weights_loaded_per_step": 2048}),
    ("instructions_per_weight", {"instructions_per_weight": 6.51}),
    ("instructions_per_weight", {"instructions_per_weight": None}),
    (
        "instructions_per_weight",
        {"rows_per_tile": 64, "instructions_per_weight": 7.51},
    ),
    ("instructions_per_weight", {"direction": "dx", "instructions_per_weight": 8.01}),
    ("instructions_per_weight", {"arch": "sm_89", "instructions_per_weight": 6.51}),
]


@pytest.mark.parametrize("change", KEPT)
def test_rows_at_their_limits_keep_the_budgets(change: dict[str, object]) -> None:
    assert list(broken(dataclasses.replace(GOOD, **change))) == []


@pytest.mark.parametrize(("figure", "change"), OVER)
def test_rows_over_a_limit_break_that_budget(
    figure: str, change: dict[str, object]
) -> None:
    messages = list(broken(dataclasses.replace(GOOD, **change)))
    assert len(messages) == 1 and messages[0].startswith(f"{figure} is ")


def test_every_budget_has_a_breaking_case() -> None:
    assert {budget.figure for budget in BUDGETS} == {figure for figure, _ in OVER}


def test_the_plain_table_lines_up_and_marks_what_is_over() -> None:
    spilled = dataclasses.replace(GOOD, spill_bytes=1000, bound=None)
    title, head, good, bad = plain("sm_86", [GOOD, spilled]).splitlines()
    assert title == "sm_86"
    assert good.endswith("ok") and bad.endswith("over budget")
    assert head.index("spill B") + len("spill B") == bad.index("1000") + 4
    show: Callable[[str], str] = lambda line: " ".join(line.split())
    assert "32 128 0 99.0 1 25% 10% 16 6.50 0.50 dram x1.00" in show(good)
