"""Expert models on disk: a folder of one JSON file and safetensors, and back.

``expert_config.json`` is the dense model's Hugging Face config with the key ``samv2``
(:class:`ExpertModelConfig`). The ``*.safetensors`` files together (one, or one a layer
where a bootstrap streamed) hold the decoder under its Hugging Face names, with a
converted layer's ``mlp`` as its experts, gate, surrogates, repairs and graph. The frozen
adapter factors that are generated from the seed are not stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from samv2.common.errors import ModelError
from samv2.common.files import replace_folder
from samv2.experts.calibration import Gate
from samv2.experts.frozen_blocks import DOWN, GATE, UP
from samv2.experts.moe_layers import ExpertGraphMLP
from samv2.experts.nf4 import packed_name
from samv2.experts.repair import Repair, repair_name
from samv2.experts.sibling_gate import SiblingGate
from samv2.models.assembler import Assembler
from samv2.models.bootstrap import make_assembler
from samv2.models.convert_layer import layer_factors
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.expert_model import (
    ExpertDecoderLayer,
    ExpertModel,
)
from samv2.models.gradient_factors import FACTORS, factor_tensors
from samv2.models.model_files import read_tokenizer
from samv2_kernels import ExpertWeights, Surrogates
from samv2_kernels.nf4 import Nf4Experts

CONFIG_KEY = "samv2"
CONFIG_FILE = "expert_config.json"
"""Not ``config.json``: transformers refuses the folder instead of loading random FFNs."""
WEIGHTS = "model.safetensors"


def save_expert_model(
    model: ExpertModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the model so that a crash leaves either the old folder or the new one."""
    with replace_folder(folder) as target:
        write_config(target, model.config, model.expert_config)
        save_file(_weights(model), target / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(target)


def write_config(
    folder: Path, dense: PretrainedConfig, config: ExpertModelConfig
) -> None:
    """``expert_config.json``."""
    values = dense.to_dict() | {CONFIG_KEY: config.to_json()}
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=1))


def is_expert_model(folder: Path) -> bool:
    """Whether a folder holds a bootstrapped model rather than a dense one."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return False
    try:
        return CONFIG_KEY in json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False


def conversion_settings(folder: Path) -> dict[str, str | int | float | bool]:
    """The settings that a bootstrapped folder was converted with, as flat dotted keys.

    Raises:
        ModelError: the folder's config is damaged.
    """
    config, _ = read_expert_config(Path(folder))
    return {
        "experts.num_experts": config.num_experts,
        "experts.experts_per_token": config.experts_per_token,
        "experts.num_shared": config.num_shared,
        "experts.layers": ",".join(map(str, config.layers)),
        "experts.combine": config.combine,
        "experts.chains": config.chains,
        "experts.surrogate_rank": config.surrogate_rank,
        "experts.repair": bool(config.repaired),
        "experts.other_k": ",".join(
            str(k) for k in config.repaired if k != config.experts_per_token
        ),
        "experts.allocate": bool(config.visits),
        "experts.quantise": config.quantise,
        "adapter.rank": config.adapter_rank,
        "adapter.scale": config.adapter_scale,
        "adapter.factors": config.factors,
        "adapter.siblings": config.siblings,
        "assembler.width": config.assembler_width,
        "assembler.prefix_tokens": config.prefix_tokens,
    }


def expert_fingerprint(model: ExpertModel) -> str:
    """Identity of a bootstrapped model: its config and every trainable start.

    The gate rows among them depend on base weights, clustering and calibration, so two
    conversions differ; so do the repairs' biases with the text. NF4 blocks are read in
    full. K is left out. Call it before anything is trained.
    """
    config = replace(model.expert_config, experts_per_token=0)
    digest = hashlib.sha256(json.dumps(config.to_json()).encode())
    for expert_id, block in sorted(model.read_blocks().items()):
        digest.update(expert_id.to_bytes(4, "little"))
        digest.update(block.numpy().tobytes())
    for _, factor in sorted(factor_tensors(model).items()):
        digest.update(factor.numpy().tobytes())
    for layer in model.expert_layers:
        for k in layer.repaired:
            bias_D = getattr(layer, repair_name(k, "bias_D"))
            digest.update(bias_D.float().numpy().tobytes())
        for name in layer.packed:
            packed = layer.packed_block(name)
            digest.update(packed.codes_EH.numpy())
            digest.update(packed.absmax_EN.numpy())
    return digest.hexdigest()[:16]


def load_expert_model(folder: Path) -> tuple[ExpertModel, PreTrainedTokenizerBase]:
    """Load a folder that :func:`save_expert_model` wrote; evaluation mode, on the CPU.

    Weights are mapped from the file, so several processes share one copy of the base.

    Raises:
        ModelError: the folder is not a bootstrapped model, or its files are damaged.
    """
    folder = Path(folder)
    if not is_expert_model(folder):
        raise ModelError(
            f"{folder} holds no expert graph (no {CONFIG_FILE}); "
            "make one with `samv2 bootstrap MODEL --output DIR`"
        )
    config, hf_config = read_expert_config(folder)
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file} cannot be read ({error}); bootstrap the model again"
            ) from None
    try:
        model = build_model(weights, config, hf_config)
    except (ModelError, RuntimeError) as error:
        raise misfit(folder, error) from None
    try:
        tokenizer = read_tokenizer(folder)
    except ModelError as error:
        raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from None
    return model, tokenizer


def misfit(folder: Path, error: Exception) -> ModelError:
    """What to raise where a folder's weights are not what its config implies."""
    return ModelError(
        f"the weights in {folder} do not fit its config: {error}; bootstrap the model "
        "again"
    )


def read_expert_config(folder: Path) -> tuple[ExpertModelConfig, PretrainedConfig]:
    """``expert_config.json``: what was converted and how, and the dense model's config.

    Raises:
        ModelError: it is damaged.
    """
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config = ExpertModelConfig.from_json(values.pop(CONFIG_KEY))
    try:
        hf_config = AutoConfig.for_model(**values)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'} describes no model ({error}); bootstrap the model "
            "again"
        ) from None
    beyond = [n for n in config.layers if not 0 <= n < hf_config.num_hidden_layers]
    if beyond:
        raise ModelError(
            f"{folder / 'config.json'} converts layers {beyond} of a model of "
            f"{hf_config.num_hidden_layers}; bootstrap the model again"
        )
    return config, hf_config


def build_model(
    weights: dict[str, Tensor],
    config: ExpertModelConfig,
    hf_config: PretrainedConfig,
    *,
    assembler: nn.Module | None = None,
    is_part: bool = False,
) -> ExpertModel:
    """The model around its stored tensors, in evaluation mode.

    Args:
        weights: by the names they have on disk.
        config: what they are of.
        hf_config: the dense model's.
        assembler: to use; None makes the one that the config asks for.
        is_part: the weights are of some experts only.

    Raises:
        ModelError, RuntimeError: tensors are missing, too many, or of other shapes.
    """
    dtype = _stored(weights, "model.embed_tokens.weight").dtype
    with no_init_weights():
        llama = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    if assembler is None:
        assembler = make_assembler(hf_config.hidden_size, config)
    decoder = llama.model.layers
    for position, index in enumerate(config.layers):
        prefix = f"model.layers.{index}.mlp."
        mlp = layer_from(weights, prefix, position, config, is_part=is_part)
        mlp.assembler = assembler
        decoder[index] = ExpertDecoderLayer(decoder[index], mlp)
    own = ("assembler.", "sibling_gate.")
    plain = {k: v for k, v in weights.items() if not k.startswith(own)}
    if assembler is not None:
        assembler.load_state_dict(_under(weights, "assembler."))
    missing, unexpected = llama.load_state_dict(plain, strict=False, assign=True)
    _check_keys(missing, unexpected, tied=hf_config.tie_word_embeddings)
    llama.tie_weights()
    model = ExpertModel(llama, assembler, config)
    if model.sibling_gate is not None:
        model.sibling_gate.load_state_dict(_under(weights, "sibling_gate."))
    model.freeze_base()
    return model.eval()


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A part of the tensors, by their names behind the prefix."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _stored(weights: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return weights[name]
    except KeyError:
        raise ModelError(f"the weights lack {name}") from None


def _weights(model: ExpertModel) -> dict[str, Tensor]:
    """Every stored tensor once: no tied head, no generated factors, one assembler."""
    kept = stored_tensors(model.llama)
    if model.config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    kept |= factor_tensors(model)
    return kept | other_tensors(model.assembler, model.sibling_gate)


def stored_tensors(module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A module's tensors by the names they have on disk, without generated ones."""
    return {
        prefix + name: tensor.contiguous()
        for name, tensor in module.state_dict().items()
        if "mlp.assembler." not in name and name.rsplit(".", 1)[-1] not in FACTORS
    }


def other_tensors(
    assembler: Assembler | None, gate: SiblingGate | None
) -> dict[str, Tensor]:
    """The assembler's and the sibling gate's tensors by the names they have on disk."""
    kept = {} if assembler is None else stored_tensors(assembler, "assembler.")
    return kept if gate is None else kept | stored_tensors(gate, "sibling_gate.")


def layer_from(
    weights: Mapping[str, Tensor],
    prefix: str,
    position: int,
    config: ExpertModelConfig,
    *,
    is_part: bool = False,
) -> ExpertGraphMLP:
    """A converted layer around its stored tensors, without an assembler.

    Args:
        weights: at least the layer's tensors, by the names they have on disk.
        prefix: of their names, up to and with ``mlp.``.
        position: among the converted layers.
        config: of the model.
        is_part: the tensors are of some experts only, see :mod:`samv2.models.sub_model`.

    Raises:
        ModelError: a tensor is missing, or NF4 blocks are damaged.
        RuntimeError: what is trained has other shapes.
    """

    def part(name: str) -> Tensor:
        return _stored(weights, prefix + name)

    gate = Gate(weight_ED=part("gate_weight_ED"), bias_E=part("gate_bias_E"))
    experts, width, _ = part("adapter_gate_EFR").shape
    shape = (experts, width, gate.weight_ED.shape[1])

    def block(name: str) -> Tensor:
        if config.quantise == "none":
            return part(name)
        return torch.empty(shape, device="meta")  # until it is packed, below

    surrogates = None
    if config.surrogate_rank:
        surrogates = Surrogates(
            shared_QD=part("surrogate_shared_QD"),
            out_EQD=part("surrogate_out_EQD"),
            bias_ED=part("surrogate_bias_ED"),
        )
    layer = ExpertGraphMLP(
        layer=position,
        weights=ExpertWeights(
            gate_EFD=block(GATE), up_EFD=block(UP), down_EFD=block(DOWN)
        ),
        gate=gate,
        surrogates=surrogates,
        factors=layer_factors(position, shape[2], config),
        edge_mask_EE=part("edge_mask_EE"),
        order_E=part("order_E"),
        num_shared=config.num_shared,
        experts_per_token=config.experts_per_token,
        combine=config.combine,
        chains=config.chains,
        prefix_tokens=config.prefix_tokens,
        siblings=config.siblings,
        visits=config.layer_visits(position),
    )
    layer.is_part = is_part
    for k in config.repaired:
        names = {field.name: repair_name(k, field.name) for field in fields(Repair)}
        down_EFD = block(names.pop(DOWN))
        own = {name: part(stored) for name, stored in names.items()}
        layer.add_repair(k, Repair(down_EFD=down_EFD, **own))
    if config.quantise != "none":
        _pack(layer, weights, prefix)
    trained = {name: part(name) for name, _ in layer.named_parameters()}
    layer.load_state_dict(trained, strict=False, assign=True)
    return layer


def _pack(layer: ExpertGraphMLP, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Put the stored NF4 blocks in."""
    for name in layer.block_names:
        parts = {
            part: _stored(weights, prefix + packed_name(name, part))
            for part in ("codes_EH", "absmax_EN")
        }
        try:
            layer.pack(name, Nf4Experts(shape=layer.shape, **parts))
        except ModelError as error:
            raise ModelError(f"{prefix}{error}") from None


def _check_keys(missing: list[str], unexpected: list[str], *, tied: bool) -> None:
    lacking = [
        name
        for name in missing
        if ".mlp.assembler." not in name
        and name.rsplit(".", 1)[-1] not in FACTORS
        and not (tied and name == "lm_head.weight")
    ]
    if lacking or unexpected:
        raise ModelError(f"missing {lacking[:3]}, unexpected {unexpected[:3]}")
