"""What ``samv2 doctor`` looks at."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from samv2.common.fetch import cache_dir

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "bitsandbytes",
    "peft",
    "flwr",
    "k-means-constrained",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "note", "broken"]
    name: str
    detail: str


def checkup() -> list[Finding]:
    """Look at everything; never raises."""
    found = [
        Finding(
            state="ok",
            name="python",
            detail=f"{platform.python_version()} on {platform.machine()}, "
            f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        )
    ]
    found += [_package(name) for name in PACKAGES]
    found += [
        _guard("C++ packing extension", _extension),
        _guard("device", _device),
        _guard("bfloat16 on this CPU", _bfloat16),
        _guard("expert walk and grouped MLP", _kernels),
        _guard("4-bit base weights", _four_bit),
        _guard("cache", _cache),
    ]
    return found


def _package(name: str) -> Finding:
    try:
        return Finding(state="ok", name=name, detail=version(name))
    except PackageNotFoundError:
        return Finding(
            state="broken", name=name, detail="not installed; run pip install -e ."
        )


def _guard(name: str, look: Callable[[], tuple[str, str]]) -> Finding:
    try:
        state, detail = look()
    except Exception as error:  # noqa: BLE001 - a report must name what is broken
        state, detail = "broken", f"{type(error).__name__}: {error}"
    return Finding(state=state, name=name, detail=detail)  # type: ignore[arg-type]


def _extension() -> tuple[str, str]:
    from samv2 import _rle
    from samv2.updates.packing import Manifest, pack, unpack

    update = {0: torch.tensor([0.0, 1.5, 0.0, -0.0])}
    manifest = Manifest.of(update)
    back = unpack(pack(update, manifest, round=1), manifest, round=1)
    same = torch.equal(back[0].view(torch.int32), update[0].view(torch.int32))
    if not same:
        return "broken", "wrong bits"
    return "ok", f"packs and unpacks bit for bit, with {_rle.isa} code"


def _device() -> tuple[str, str]:
    if torch.cuda.is_available():
        return "ok", (
            f"{torch.cuda.get_device_name()}: clients of a federation compute there "
            "(train.device), bootstrap, eval and generate on the CPU"
        )
    return "note", "no CUDA device: everything runs on the CPU"


def _bfloat16() -> tuple[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _cpu_flags()
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return "ok", f"native ({capability})"
    return "note", (
        f"not native ({capability}): model.dtype=float32 may be faster; measure"
    )


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def _kernels() -> tuple[str, str]:
    import samv2_kernels

    walked = samv2_kernels.walk(
        torch.tensor([[2.0, 1.0]]), torch.ones(1, 2, 2).triu(), experts_per_token=1
    )
    if walked.expert_ids_TK.tolist() != [[0]]:
        return "broken", "the walk visits the wrong expert"
    if torch.cuda.is_available():
        return "ok", "Triton kernels; the package's authors have not timed them"
    return "ok", "CPU op: rows grouped by expert, each touched expert unpacked once"


def _four_bit() -> tuple[str, str]:
    return "ok", (
        "NF4 expert blocks (experts.quantise) are packed and read by samv2's own code, on "
        "a CPU one matrix of one expert at a time; "
        f"bitsandbytes {version('bitsandbytes')}: dense QLoRA (samv2.models.quantised), "
        "and an optional product on CPUs (samv2_kernels.for_decoding)"
    )


def _cache() -> tuple[str, str]:
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    state = "ok" if writable else "broken"
    return state, f"{folder} ({size / 1e6:.0f} MB), set SAMV2_CACHE to move it"
