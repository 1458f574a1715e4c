"""Ahead-of-time compilation of one kernel, without a GPU, with Triton's own tools.

Triton must not run as interpreter in this process (``TRITON_INTERPRET`` unset before
``triton.jit`` decorates the kernel); :mod:`.pool` sees to that.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from samv2_kernels.audit.ptx import thread_count
from samv2_kernels.gpu.spec import KernelSpec

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Artifact:
    """What the compiler made of a kernel."""

    registers: int
    """Per thread."""
    spill_bytes: int
    """Stack frame of a thread; Triton kernels put nothing but spilled registers there."""
    shared_bytes: int
    """Per block, as the launch asks for."""
    threads: int
    """Per block."""
    has_matmul: bool
    """Whether the source multiplies matrices with ``tl.dot``."""
    arguments: tuple[str, ...]
    """Names of the arguments that reach the machine code, in order."""
    ptx: str
    sass: str
    """Output of ``nvdisasm -c``."""


def run_tool(name: str, *arguments: str) -> str:
    """Output of a binary of the Triton wheel."""
    process = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(f"{name} failed: {process.stderr.strip()}")
    return process.stdout


def jit_function(function: Any) -> triton.JITFunction:
    """The kernel under autotuners and heuristics."""
    while not isinstance(function, triton.JITFunction):
        if not hasattr(function, "arg_names") or not hasattr(function, "fn"):
            raise TypeError(f"{function!r} is no triton.jit function")
        if type(function).__name__ == "InterpretedFunction":
            raise RuntimeError(
                "TRITON_INTERPRET is set: this kernel cannot be compiled"
            )
        function = function.fn
    return function


def argument_names(spec: KernelSpec, function: triton.JITFunction) -> list[str]:
    """Arguments that reach the machine code, in order; checks the spec against them."""
    given = set(spec.signature) | set(spec.constexprs)
    if given != set(function.arg_names):
        missing = sorted(set(function.arg_names) - given)
        unknown = sorted(given - set(function.arg_names))
        raise ValueError(
            f"{spec.kernel}: spec lacks {missing}, does not know {unknown}"
        )
    return [name for name in function.arg_names if name not in spec.constexprs]


def build(spec: KernelSpec, arch: str) -> Artifact:
    """Compile and disassemble a kernel.

    Args:
        spec: the kernel and its configuration.
        arch: e.g. ``sm_86``.

    Raises:
        ValueError: the spec does not match the kernel's arguments.
        Exception: whatever Triton's compiler raises.
    """
    function = jit_function(spec.function)
    runtime = argument_names(spec, function)
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        signature[name] = spec.signature[name] if name in runtime else "constexpr"
        if signature[name].startswith("*") or name in spec.divisible:
            attributes[(index,)] = DIVISIBLE
    source = ASTSource(
        function, signature, constexprs=dict(spec.constexprs), attrs=attributes
    )
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": True,
        **spec.options,
    }
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    kernel = triton.compile(source, target=target, options=options)
    return disassemble(kernel, tuple(runtime))


def disassemble(kernel: Any, arguments: tuple[str, ...]) -> Artifact:
    """Machine code and resources of a ``triton.compile`` result."""
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(kernel.asm["cubin"])
        resources = RESOURCES.search(run_tool("cuobjdump", "-res-usage", path))
        sass = run_tool("nvdisasm", "-c", path)
    finally:
        os.unlink(path)
    if resources is None:
        raise RuntimeError("cuobjdump printed no resource usage")
    ptx = kernel.asm["ptx"]
    return Artifact(
        registers=int(resources[1]),
        spill_bytes=int(resources[2]),
        shared_bytes=kernel.metadata.shared,
        threads=thread_count(ptx),
        has_matmul="tt.dot" in kernel.asm["ttir"],
        arguments=arguments,
        ptx=ptx,
        sass=sass,
    )
