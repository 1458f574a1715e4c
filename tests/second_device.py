"""A second device without hardware, and a client's round on it.

Tensors of the device ``far`` say that they are elsewhere, compute here, and refuse to meet
tensors of the CPU, as those of a GPU do: what runs on it leaves no tensor behind. Its
registration lasts as long as a process, so this file is run as a program:

    python -m tests.second_device JOBS RESULT
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from samv2.common.settings import Settings
from samv2.experts.sub_graph import SubGraph
from samv2.federated import client_round
from samv2.federated.client_round import (
    RoundRequest,
    TrainReply,
    evaluate_round,
    load_runtime,
    train_round,
)
from samv2.models.perplexity import Score

DEVICE = "far:0"
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One client's round to run."""

    model: Path
    shards: Path
    states: Path
    settings: Settings
    request: RoundRequest
    part: SubGraph | None = None


def do(job: Job) -> tuple[TrainReply, dict[str, Score]]:
    """Train and score as client 0, wherever ``train.device`` says."""
    runtime = load_runtime(job.model, job.shards, job.states, job.settings, job.part)
    reply = train_round(runtime, 0, job.request)
    return reply, evaluate_round(runtime, 0, job.request)


class FarTensor(Tensor):
    """A tensor that says it is on the device; ``here`` has its values."""

    @staticmethod
    def __new__(cls, here: Tensor) -> FarTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(DEVICE),
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return compute(op, args, kwargs or {})


class Far(TorchDispatchMode):
    """While it is active, tensors can be made on the device."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return compute(op, args, kwargs or {})


class FarIndices(TorchFunctionMode):
    """While it is active, lists of numbers index tensors on the device."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.__getitem__ and isinstance(args[0], FarTensor):
            args = (args[0], tree_map_only(list, placed, args[1], is_leaf=is_list))
        return function(*args, **(kwargs or {}))


def is_list(value: Any) -> bool:
    """Whether an index is a list of numbers."""
    return isinstance(value, list)


def placed(numbers: list[int]) -> Tensor:
    """A list as a tensor on the device."""
    return torch.tensor(numbers).to(DEVICE)


def compute(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One op.

    Raises:
        RuntimeError: tensors of two devices meet in it.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    wanted = kwargs.get("device")
    made_far = wanted is not None and torch.device(wanted).type == "far"
    if not far and not made_far:
        return op(*args, **kwargs)
    # Numbers of the CPU may meet tensors of a GPU.
    if any(t.ndim and not isinstance(t, FarTensor) for t in tensors) and far:
        if op not in COPIES:
            raise RuntimeError(f"{op}: tensors on {DEVICE} and on the CPU")
    if op is COPIES[0]:
        unwrapped(args[0]).copy_(unwrapped(args[1]))
        return args[0]
    options = tree_map(unwrapped, dict(kwargs))
    if made_far:
        options["device"] = torch.device("cpu")
    found = op(*tree_map(unwrapped, args), **options)
    if op is COPIES[1] and wanted is not None and not made_far:
        return found
    wrapped = tree_map(lambda x: FarTensor(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(op, args, kwargs, wrapped) if far else wrapped


def unwrapped(leaf: Any) -> Any:
    """The tensor with the values."""
    return leaf.here if isinstance(leaf, FarTensor) else leaf


def main(jobs: Path, result: Path) -> None:
    """Run jobs on the device, and write what :func:`do` gave for each."""
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend("far")
    client_round.take_device = lambda name: torch.device(DEVICE)
    with FarIndices(), Far():
        done = [do(job) for job in pickle.loads(jobs.read_bytes())]
    result.write_bytes(pickle.dumps(done))


if __name__ == "__main__":
    sys.modules["tests.second_device"] = sys.modules["__main__"]
    main(*map(Path, sys.argv[1:]))
