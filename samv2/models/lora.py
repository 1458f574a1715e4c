"""Ordinary LoRA on a dense model's FFNs, through peft: the baselines' adapters.

    y = W x + scale * B A x,   A (R, in), B (out, R) in float32, W frozen

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". The model keeps its
class, so loss and scores of dense models take it as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from samv2.common.files import replace_folder
from samv2.common.quiet import quiet_logger

with quiet_logger("bitsandbytes", logging.ERROR):
    # peft imports it, and it warns on some processors that an extra is not installed.
    from peft import LoraConfig, inject_adapter_in_model

TARGETS = ("gate_proj", "up_proj", "down_proj")
"""Linear layers that get an adapter, in every decoder layer."""
ADAPTER_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def add_lora(
    model: PreTrainedModel, *, rank: int, scale: float, seed: int, train_a: bool = True
) -> None:
    """Put adapters on all FFNs of a dense model, in place; the rest is frozen.

    Args:
        model: a Llama-style causal LM in any dtype; adapters are float32.
        rank: R.
        scale: factor of the adapters' term (alpha / R).
        seed: of A, uniform in +-1/sqrt(in) (Kaiming); B starts at 0.
        train_a: whether A is trained; False freezes it as FFA-LoRA does.
    """
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(lora_config(rank=rank, scale=scale), model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if ".lora_A." in name or ".lora_B." in name:
            parameter.data = parameter.data.float()
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(
                parameter, a=math.sqrt(5), generator=generator
            )
            parameter.requires_grad_(train_a)
        elif ".lora_B." in name:
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(True)


def lora_config(*, rank: int, scale: float) -> LoraConfig:
    """peft's description of the adapters."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank * scale,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
    )


def lora_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """What is trained, by the names that peft stores."""
    return {
        peft_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def read_lora(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of what is trained, float32 on the CPU, by peft's names."""
    return {
        name: parameter.detach().clone().cpu()
        for name, parameter in lora_parameters(model).items()
    }


@torch.no_grad()
def write_lora(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`read_lora`.

    Raises:
        KeyError: ``values`` lacks an adapter.
    """
    for name, parameter in lora_parameters(model).items():
        parameter.copy_(values[name])


def peft_name(name: str) -> str:
    """A parameter's name in an adapter file, e.g. ``...gate_proj.lora_A.weight``."""
    return _PEFT_PREFIX + name.replace(".default.", ".")


def save_adapter(
    model: PreTrainedModel, folder: Path, *, rank: int, scale: float
) -> None:
    """Write all adapters as a folder that ``peft.PeftModel.from_pretrained`` reads."""
    tensors = {
        peft_name(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    with replace_folder(folder) as target:
        lora_config(rank=rank, scale=scale).save_pretrained(target)
        save_file(tensors, target / ADAPTER_FILE, metadata={"format": "pt"})
