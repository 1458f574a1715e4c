"""Launch where the data is: Triton takes the current device, whatever its tensors say."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(
    launch: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Make the first argument's device the current one during a call."""

    @wraps(launch)
    def run(first: Tensor, *arguments: P.args, **options: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return launch(first, *arguments, **options)

    return run
