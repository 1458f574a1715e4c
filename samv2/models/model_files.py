"""A dense model's folder: is it Llama-like, what does it hold, which one is it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from samv2.common.errors import ModelError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Architectures whose FFN is a SwiGLU of ``gate_proj``, ``up_proj``, ``down_proj``."""

ACCEPTED_FORMS = (
    "accepted are 'smollm2', a folder with config.json and *.safetensors, "
    "a .gguf file, or a hub id 'org/name'"
)

_SAMPLES_PER_TENSOR = 32
_CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)


def check_llama_like(config: PretrainedConfig) -> None:
    """Refuse a model whose FFN is not a bias-free SwiGLU, by its config alone.

    Args:
        config: as ``AutoConfig`` reads it; no weights are touched.

    Raises:
        ModelError: names the model type, every value at fault and what is supported.
    """
    faults = []
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        faults.append(
            f"the architecture must be one of {', '.join(SUPPORTED_MODEL_TYPES)} "
            "(SwiGLU FFN of gate_proj, up_proj, down_proj)"
        )
    else:
        if config.hidden_act != "silu":
            faults.append(f"hidden_act is {config.hidden_act!r}, it must be 'silu'")
        if getattr(config, "mlp_bias", False):
            faults.append("mlp_bias is True, it must be False")
        if getattr(config, "quantization_config", None) is not None:
            faults.append("the weights are quantised already, they must be plain")
    if faults:
        raise ModelError(
            f"model_type {config.model_type!r} cannot become an expert graph: "
            + "; ".join(faults)
        )


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a local folder; never asks the network, runs no code from it."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"folder {folder} has no config.json; {ACCEPTED_FORMS}")
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # wrong values fail in as many ways as there are fields
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; never asks the network."""
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(
            f"folder {folder} has no readable tokenizer ({error}); add tokenizer.json "
            "and tokenizer_config.json"
        ) from error


def read_weights(folder: Path, **options: Any) -> PreTrainedModel:
    """The causal language model of a local folder, complete or not at all.

    Args:
        folder: config.json and safetensors.
        options: passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ModelError: weights are damaged, missing or of another shape than the config's.
    """
    weight_files(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"weights in {folder} cannot be read: {error}") from error
    # transformers would go on: random values for the one, nothing for the other.
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown")):
        names = sorted(report[kind])
        if names:
            raise ModelError(
                f"{folder} {verb} {len(names)} tensor(s), first {names[0]}: config.json "
                "and weights do not belong together; copy the model again"
            )
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; ModelError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error!r}") from error
    else:
        names = {"model.safetensors"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"folder {folder} lacks {', '.join(missing)}; weights must be safetensors "
            "(model.save_pretrained writes them)"
        )
    return sorted(folder / name for name in names)


def model_fingerprint(model: Path | PreTrainedModel) -> str:
    """Short hash that tells one dense model from another, in a fraction of a second.

    SHA-256 over the config fields that define the function and, per tensor in name
    order, its name, shape and 32 evenly spaced values rounded to bfloat16. The rounding
    makes a folder, a float32 and a bfloat16 copy of one model agree. A model that
    differs only between the samples is not told apart: it is a guard against mix-ups,
    not against forgery.

    Args:
        model: folder with config.json and safetensors, or a dense model in memory.

    Returns:
        16 hexadecimal digits.

    Raises:
        ModelError: the folder is damaged, or the model holds quantised weights.
    """
    if isinstance(model, PreTrainedModel):
        return _digest(model.config, model.named_parameters())
    config = read_config(model)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(model):
        try:
            with safe_open(file, framework="pt") as weights:
                # get_tensor maps the file: only the sampled pages are read.
                tensors |= {
                    name: weights.get_tensor(name)
                    for name in weights.keys()
                    if name not in tied and not name.endswith("rotary_emb.inv_freq")
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(f"weights file {file} is damaged: {error}") from error
    return _digest(config, tensors.items())


def _digest(
    config: PretrainedConfig, tensors: Iterable[tuple[str, torch.Tensor]]
) -> str:
    fields = {field: _plain(getattr(config, field, None)) for field in _CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if not tensor.is_floating_point():
            raise ModelError(
                f"tensor {name} has dtype {tensor.dtype}, a fingerprint needs floating "
                "point; take it from the folder the model was loaded from"
            )
        count = min(tensor.numel(), _SAMPLES_PER_TENSOR)
        index = torch.arange(count) * max(tensor.numel() - 1, 0) // max(count - 1, 1)
        sample = tensor.detach().reshape(-1)[index.to(tensor.device)]
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(sample.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A config value with numbers as seven digits: GGUF keeps them in float32."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.7g}"
    return value
