"""Triton's interpreter, made exact for bfloat16 and able to run the decode's PTX.

The interpreter keeps bfloat16 as uint16 and computes on the bit patterns, silently; it
truncates where a GPU rounds, and it knows no inline assembly. `exact` replaces those
methods of its builder while a test runs: bfloat16 operands are widened to float32 and
results are rounded to nearest even, matrix products of 16-bit floats are summed in
float32, and a small subset of PTX on 32-bit registers is executed with numpy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
Array = np.ndarray

COMPARISONS = {
    np.less,
    np.less_equal,
    np.greater,
    np.greater_equal,
    np.equal,
    np.not_equal,
}
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
RTNE = interpreter._ir.ROUNDING_MODE.RTNE


def widen(bits: Array) -> Array:
    """bfloat16 bit patterns to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """float32 to bfloat16 bit patterns, to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle: Any) -> bool:
    """Whether a tensor of the interpreter holds bfloat16."""
    dtype = handle.dtype
    return not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Array:
    return widen(handle.data) if is_bf16(handle) else handle.data


def _binary(old: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not is_bf16(left) or op in BITWISE:
            return old(self, left, right, op)
        found = op(widen(left.data), widen(right.data))
        if op in COMPARISONS:
            return Handle(found, tl.int1)
        return Handle(narrow(found), tl.bfloat16)

    return run


def _unary(old: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, argument: Any, op: Any) -> Any:
        if not is_bf16(argument):
            return old(self, argument, op)
        return Handle(narrow(op(widen(argument.data))), tl.bfloat16)

    return run


def _fma(old: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not is_bf16(z):
            return old(self, x, y, z)
        exact = widen(x.data).astype(np.float64) * widen(y.data) + widen(z.data)
        return Handle(narrow(exact), tl.bfloat16)

    return run


def _dot(old: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, a: Any, b: Any, acc: Any, *more: Any) -> Any:
        if a.data.dtype.itemsize != 2:
            return old(self, a, b, acc, *more)
        left, right = (_wide(each).astype(np.float32) for each in (a, b))
        return Handle(np.matmul(left, right) + acc.data, acc.dtype.scalar)

    return run


def _cast(old: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, source: Any, target: Any) -> Any:
        was, becomes = source.dtype.scalar, target.scalar
        if was == becomes:
            return source
        if was == tl.bfloat16:
            wide = Handle(widen(source.data), tl.float32)
            return wide if becomes == tl.float32 else old(self, wide, target)
        if becomes == tl.bfloat16:
            wide = source if was == tl.float32 else old(self, source, tl.float32)
            return Handle(narrow(wide.data), tl.bfloat16)
        return old(self, source, target)

    return run


def _convert(old: Callable[..., Any], cast: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        small = any(kind.primitive_bitwidth == 8 for kind in kinds)
        if tl.bfloat16 in kinds and not small and rounding in (None, RTNE):
            return cast(self, source, target)
        return old(self, source, target, rounding)

    return run


# PTX: each op on arrays of uint32, one element a thread.


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes out of eight; a selector's fourth bit replicates the sign instead."""
    u = np.uint32
    a, b, selector = np.broadcast_arrays(a, b, selector)
    table = np.stack([(word >> u(8 * i)) & u(255) for word in (a, b) for i in range(4)])
    out = np.zeros(a.shape, u)
    for place in range(4):
        nibble = (selector >> u(4 * place)) & u(15)
        chosen = (nibble & u(7)).astype(np.int64)[None]
        byte = np.take_along_axis(table, chosen, axis=0)[0]
        sign = np.where(byte & u(128), u(255), u(0))
        out |= np.where(nibble & u(8), sign, byte) << u(8 * place)
    return out


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits, by its truth table."""
    truth = int(np.ravel(table)[0])
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        if truth >> row & 1:
            terms = (
                each if row & bit else ~each for each, bit in zip((a, b, c), (4, 2, 1))
            )
            first, second, third = terms
            out |= first & second & third
    return out


PTX: dict[str, Callable[..., Array]] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "mov.b32": lambda a: a,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def run_ptx(text: str, inputs: dict[str, Array]) -> dict[str, Array]:
    """Execute straight-line PTX on registers of 32 bits.

    Args:
        text: statements; ``.reg`` declarations and braces are skipped.
        inputs: uint32 arrays by register.

    Raises:
        KeyError: an instruction or a register that is not known.
    """
    registers = dict(inputs)
    for statement in re.split(r"[;\n]", text):
        statement = statement.split("//")[0].strip().strip("{}").strip()
        if not statement or statement.startswith(".reg"):
            continue
        name, operands = statement.split(None, 1)
        target, *sources = (each.strip() for each in operands.split(","))
        values = [
            (
                np.array([int(source, 0) & 0xFFFFFFFF], np.uint32)
                if source[0].isdigit()
                else registers[source]
            )
            for source in sources
        ]
        registers[target] = PTX[name](*values).astype(np.uint32)
    return registers


class _Results(list):
    """What the interpreter expects of an op with several results."""

    def get_result(self, index: int) -> Any:
        return self[index]


def _inline_asm(
    self: Any,
    asm: str,
    constraints: str,
    values: list[Any],
    types: Any,
    is_pure: bool,
    pack: int,
) -> _Results:
    """Run inline PTX, ``pack`` elements in each register."""
    del self, is_pure
    outputs = sum(each.strip().startswith("=") for each in constraints.split(","))
    arrays = np.broadcast_arrays(*(value.data for value in values))
    shape, threads = arrays[0].shape, arrays[0].size // pack
    inputs, number = {}, outputs
    for array in arrays:
        words = np.ascontiguousarray(array).reshape(threads, -1).view(np.uint32)
        for column in words.T:
            inputs[f"${number}"] = column.copy()
            number += 1
    registers = run_ptx(asm, inputs)
    results = _Results()
    for index, kind in enumerate(
        types if isinstance(types, (list, tuple)) else [types]
    ):
        words = np.broadcast_to(registers[f"${index}"], (threads,))
        dtype = interpreter._get_np_dtype(kind.scalar)
        assert pack * np.dtype(dtype).itemsize == 4, "one register a result"
        results.append(
            Handle(np.ascontiguousarray(words).view(dtype).reshape(shape), kind.scalar)
        )
    return results


@contextmanager
def exact() -> Iterator[None]:
    """The repaired interpreter, until the block ends."""
    cast = _cast(Builder.cast_impl)
    replaced = {
        "binary_op": _binary(Builder.binary_op),
        "unary_op": _unary(Builder.unary_op),
        "create_fma": _fma(Builder.create_fma),
        "create_dot": _dot(Builder.create_dot),
        "cast_impl": cast,
        "create_fp_to_fp": _convert(Builder.create_fp_to_fp, cast),
        "create_inline_asm": _inline_asm,
    }
    missing = object()
    old = {name: Builder.__dict__.get(name, missing) for name in replaced}
    for name, method in replaced.items():
        setattr(Builder, name, method)
    try:
        # A GPU does not warn of infinities either.
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    finally:
        for name, method in old.items():
            if method is missing:
                delattr(Builder, name)
            else:
                setattr(Builder, name, method)
