"""Frozen 4-bit NF4 weights (bitsandbytes) with trainable LoRA on top (peft): QLoRA.

On a CPU with AVX512-BF16, ``bitsandbytes.nn.Linear4bit`` in evaluation mode repacks its
weight *in place* for an inference kernel that has no backward. From then on gradients
that pass through the layer are silently wrong, also in training mode, and what
``state_dict`` returns is wrong too. Repacking cannot be undone without loss, so it must
never start: a ``Linear4bit`` stays in training mode for its whole life. It has no
dropout, so its output is the same in both modes.

:func:`load_llama_nf4` returns a model in that state, and :func:`evaluation_mode` is to
be used where ``model.eval()`` would be called.

QLoRA: https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from samv2.common.errors import ModelError
from samv2.common.fetch import Progress
from samv2.models.llama_loader import LoadedModel, model_folder, resolve_model
from samv2.models.model_files import model_fingerprint, read_tokenizer, read_weights


def load_llama_nf4(
    spec: str,
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = False,
    device: str = "cpu",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model with NF4 linear layers, in evaluation mode and safe to train.

    Embeddings, norms and the output head keep ``compute_dtype``.

    Args:
        spec: see :func:`samv2.models.llama_loader.resolve_model`.
        compute_dtype: dtype the weights are dequantised to for a product.
        double_quant: quantise the scales of the blocks of 64 as well.
        device: where the model goes, e.g. ``"cpu"`` or ``"cuda:0"``.
        cache: folder for fetched and converted files; default the user's cache folder.
        progress: called with one sentence before every slow step.

    Raises:
        ModelError: the model is unsupported, or its files are missing or damaged.
        FetchError: ``smollm2`` is not cached and cannot be fetched.
    """
    source = resolve_model(spec, cache=cache, progress=progress)
    folder = model_folder(source, cache=cache, progress=progress)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
    )
    model = read_weights(
        folder, dtype=compute_dtype, quantization_config=nf4, device_map={"": device}
    )
    keep_linear4bit_trainable(model)
    return LoadedModel(
        model=model,
        tokenizer=read_tokenizer(folder),
        name=source.name,
        fingerprint=model_fingerprint(folder),
    )


def keep_linear4bit_trainable(model: nn.Module) -> int:
    """Put every 4-bit linear layer, and nothing else, into training mode.

    Call it after each ``model.eval()`` and before the next forward pass, or use
    :func:`evaluation_mode`, which does.

    Returns:
        How many layers there are.

    Raises:
        ModelError: a forward pass in evaluation mode has already repacked a layer.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    for name, layer in layers.items():
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(
                f"4-bit layer {name} was repacked for inference by a forward pass in "
                "eval mode and has no correct gradients any more; load the model again "
                "and use evaluation_mode(model) instead of model.eval()"
            )
        layer.training = True
    return len(layers)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for everything but 4-bit layers; earlier modes come back after.

    Does not turn gradients off: combine it with ``torch.no_grad()``.

    Raises:
        ModelError: see :func:`keep_linear4bit_trainable`.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        keep_linear4bit_trainable(model)
        yield
    finally:
        for module, training in modes.items():
            module.training = training or isinstance(module, Linear4bit)


def attach_qlora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    targets: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    seed: int,
) -> PeftModel:
    """Freeze ``model`` and add LoRA of ``rank`` to the named linear layers.

    y = W x + (alpha / rank) · B A x, B zero at start, A drawn from ``seed`` alone; the
    global generators are left as they were. ``model`` is changed in place.

    Args:
        model: dense or 4-bit.
        rank: inner width R of the adapter.
        alpha: scale of the adapter, see the equation.
        targets: names of the linear layers, without their path.
        seed: of the matrices A.

    Raises:
        ModelError: ``rank`` is below 1, no layer has one of the names, or a 4-bit layer
            was repacked for inference.
    """
    keep_linear4bit_trainable(model)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if rank < 1:
        raise ModelError(f"LoRA rank is {rank}, it must be at least 1")
    absent = sorted(set(targets) - names)
    if absent or not targets:
        raise ModelError(
            f"LoRA targets {absent} are not layers of the model; name at least one that "
            "is, e.g. 'gate_proj'"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
