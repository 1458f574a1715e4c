"""A dense checkpoint on disk, read one decoder layer at a time.

folder → :meth:`DenseLayers.open` (config and safetensors headers are checked, no weight
is read) → ``embed`` → ``layer(0)`` … ``layer(L - 1)`` → ``final_norm`` → ``head_weight``.
Nothing that is read is kept: memory is that of what the caller holds, plus one stored
tensor on its way in. The weights of a run through all layers are the bits that
``AutoModelForCausalLM`` loads, and so are the logits.

Shapes: B sequences, S positions, D model width, V vocabulary, H head width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from samv2.common.errors import ModelError
from samv2.models.model_files import check_llama_like, read_config, weight_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED_DTYPES = ("BF16", "F16", "F32", "F64")
"""What safetensors headers call the plain floating-point types."""
_DAMAGED = "the checkpoint is damaged; copy or download it again"
_ROWS_COMPARED = 4096


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What a decoder layer needs beside the residual stream, as Hugging Face makes it."""

    positions_1S: Tensor
    """(1, S) int64."""
    embeddings: tuple[Tensor, Tensor]
    """Rotary cos and sin, (1, S, H) each, in the stream's dtype."""
    masks: tuple[Tensor | None, ...]
    """Per layer: (1, 1, S, S) where a sliding window needs one, None for plain causal
    attention (other attention kernels than SDPA always have a mask)."""

    def of_layer(self, index: int) -> dict[str, Any]:
        """Keyword arguments for decoder layer ``index`` and for its ``self_attn``."""
        return {
            "attention_mask": self.masks[index],
            "position_ids": self.positions_1S,
            "position_embeddings": self.embeddings,
        }


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is, by a file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class DenseLayers:
    """A dense checkpoint read one decoder layer at a time; see :meth:`open`.

    Args:
        folder: of the checkpoint.
        skeleton: the causal LM on the meta device.
        stored: every tensor that the model needs, by its Hugging Face name.
        dtype: of everything that is read.
        device: where it is put.
    """

    def __init__(
        self,
        folder: Path,
        skeleton: PreTrainedModel,
        stored: dict[str, _Stored],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.config: PretrainedConfig = skeleton.config
        self.dtype, self.device = dtype, device
        self._skeleton, self._stored = skeleton, stored

    @classmethod
    def open(
        cls, folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> DenseLayers:
        """Check a folder against its config by the files' headers, and read no weights.

        Args:
            folder: config.json and one or more safetensors files (llama, mistral, qwen2).
            dtype: ``torch.float32`` or ``torch.bfloat16``; stored values are rounded once.
            device: for modules and tensors.

        Raises:
            ModelError: the model is not Llama-like, a file is missing or damaged, or a
                tensor is missing, unknown, of another shape or not floating point; or
                the config ties the head to the embedding and they differ.
        """
        folder = Path(folder)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ModelError(f"dtype is {dtype}; use torch.float32 or torch.bfloat16")
        config = read_config(folder)
        check_llama_like(config)
        skeleton = _skeleton(folder, config, dtype)
        shapes = {k: tuple(v.shape) for k, v in skeleton.state_dict().items()}
        stored = _headers(folder, shapes)
        tied = (EMBEDDING, HEAD) if config.tie_word_embeddings else ()
        # As transformers ties them: whichever of the two is there serves both.
        there = [stored[name] for name in tied if name in stored]
        stored |= {name: there[0] for name in tied if there}
        _check(folder, shapes, stored)
        if len(there) == 2:
            _check_tie(folder, *there)
        in_order = {name: stored[name] for name in shapes}
        return cls(folder, skeleton, in_order, dtype, torch.device(device))

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_hidden_layers

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """The residual stream before layer 0, (B, S, D).

        Reads the embedding as it is stored and drops it again.

        Args:
            tokens_BS: (B, S) int64.

        Raises:
            ModelError: an id is outside the vocabulary, or the embedding is damaged.
        """
        low, high = map(int, tokens_BS.aminmax())
        vocabulary = self.config.vocab_size
        if low < 0 or high >= vocabulary:
            raise ModelError(
                f"token ids run from {low} to {high}, the model's vocabulary has ids "
                f"0..{vocabulary - 1}; encode the text with the model's own tokenizer"
            )
        (table_VD,) = self._read([EMBEDDING], convert=False).values()
        rows_BSD = embedding(tokens_BS.cpu(), table_VD)
        return rows_BSD.to(device=self.device, dtype=self.dtype)

    def layer(self, index: int) -> nn.Module:
        """A new Hugging Face decoder layer in evaluation mode, without gradients.

        Raises:
            ModelError: there is no such layer, or its weights are damaged.
        """
        if not 0 <= index < self.num_layers:
            raise ModelError(
                f"layer {index} is not there; the model has layers "
                f"0..{self.num_layers - 1}"
            )
        kind = type(self._skeleton.model.layers[index])
        return self._fill(f"model.layers.{index}.", kind, self.config, index)

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer, in evaluation mode, without gradients.

        Raises:
            ModelError: its weights are damaged.
        """
        kind, config = type(self._skeleton.model.norm), self.config
        return self._fill("model.norm.", kind, config.hidden_size, config.rms_norm_eps)

    def head_weight(self) -> Tensor:
        """The head, (V, D): logits are ``linear(final_norm(x), head)``; no bias.

        It is the embedding where the config ties them.

        Raises:
            ModelError: it is damaged.
        """
        return self.tensor(HEAD)

    def other_names(self) -> tuple[str, ...]:
        """Names outside the decoder layers: embedding, norm, and head unless tied."""
        tied = {HEAD} if self.config.tie_word_embeddings else set()
        return tuple(
            name
            for name in self._stored
            if not name.startswith("model.layers.") and name not in tied
        )

    def tensor(self, name: str) -> Tensor:
        """One tensor by its Hugging Face name, e.g. of :meth:`other_names`.

        Raises:
            ModelError: the model has no such tensor, or it is damaged.
        """
        if name not in self._stored:
            raise ModelError(
                f"tensor {name!r} is not part of the model; outside its layers it has "
                f"{', '.join(self.other_names())}"
            )
        return self._read([name])[name]

    def attention_inputs(self, length: int) -> AttentionInputs:
        """Positions, rotary embeddings and masks for sequences of ``length`` tokens.

        Raises:
            ModelError: the length is below 1.
        """
        rotary = type(self._skeleton.model.rotary_emb)
        return attention_inputs(self.config, rotary, length, self.dtype, self.device)

    def _fill(self, prefix: str, kind: type[nn.Module], *args: Any) -> nn.Module:
        """A module made without memory, with its tensors read into it."""
        with torch.device("meta"), no_init_weights():
            module = kind(*args)
        tensors = self._read(prefix + name for name in module.state_dict())
        module.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
            assign=True,
        )
        return module.requires_grad_(False).eval()

    def _read(self, names: Iterable[str], *, convert: bool = True) -> dict[str, Tensor]:
        """Copies of tensors, one file open at a time; as stored unless ``convert``."""
        tensors: dict[str, Tensor] = {}
        by_file = sorted(names, key=lambda name: self._stored[name].file)
        for file, group in groupby(by_file, key=lambda name: self._stored[name].file):
            with opened_weights(file) as weights:
                for name in group:
                    found = weights.get_tensor(self._stored[name].name)
                    if convert:
                        found = found.to(device=self.device, dtype=self.dtype)
                    _check_finite(file, name, found)
                    tensors[name] = found
        return tensors


@torch.no_grad()
def attention_inputs(
    config: PretrainedConfig,
    rotary: type[nn.Module],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionInputs:
    """Positions, rotary embeddings and masks for sequences of ``length`` tokens.

    They are those of unpadded text without a cache, and serve every batch size.

    Args:
        config: of the dense model.
        rotary: class of its rotary embedding. A module is made each time, because some
            kinds change their frequencies with the length.
        length: S.
        dtype: of the stream.
        device: of the stream.

    Raises:
        ModelError: the length is below 1.
    """
    if length < 1:
        raise ModelError(f"length is {length}; sequences need at least 1 token")
    positions_1S = torch.arange(length, device=device).unsqueeze(0)
    like_1S1 = torch.zeros(1, length, 1, dtype=dtype, device=device)
    slides = [_slides(config, index) for index in range(config.num_hidden_layers)]
    makers = {False: create_causal_mask, True: create_sliding_window_causal_mask}
    masks = {
        kind: makers[kind](
            config=config,
            inputs_embeds=like_1S1,
            attention_mask=None,
            cache=None,
            position_ids=positions_1S,
        )
        for kind in set(slides)
    }
    return AttentionInputs(
        positions_1S=positions_1S,
        embeddings=rotary(config=config).to(device)(
            like_1S1, position_ids=positions_1S
        ),
        masks=tuple(masks[kind] for kind in slides),
    )


def _skeleton(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model without memory: its classes, tensor names and shapes."""
    try:
        with torch.device("meta"), no_init_weights():
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'} describes no model ({error!r}); copy it again"
        ) from error


def _slides(config: PretrainedConfig, index: int) -> bool:
    """Whether a layer's attention has a window, as each architecture's forward picks."""
    if config.model_type == "mistral":
        return config.sliding_window is not None
    if config.model_type == "qwen2":
        return config.layer_types[index] == "sliding_attention"
    return False


@contextmanager
def opened_weights(file: Path, *, backend: str = "pread") -> Iterator[Any]:
    """An open safetensors file; what it raises becomes a ModelError.

    ``pread`` copies a tensor's bytes into memory of its own; ``mmap`` maps the file and
    keeps its pages resident as long as the tensor lives.
    """
    try:
        with safe_open(file, framework="pt", backend=backend) as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"weights file {file} cannot be read ({error}); {_DAMAGED}"
        ) from error


def _headers(folder: Path, known: dict[str, Any]) -> dict[str, _Stored]:
    """What a folder's files say they hold, by Hugging Face name."""
    found: dict[str, _Stored] = {}
    for file in weight_files(folder):
        with opened_weights(file) as weights:
            for stored_name in weights.keys():
                # Old checkpoints store what is computed from the config today.
                if stored_name.endswith("rotary_emb.inv_freq"):
                    continue
                # A checkpoint of the decoder alone has no prefix.
                full = f"model.{stored_name}"
                name = full if full in known else stored_name
                if name in found:
                    raise ModelError(
                        f"tensor {name} is in {found[name].file} and in {file}; remove "
                        "the one that does not belong to the model"
                    )
                part = weights.get_slice(stored_name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                found[name] = _Stored(file, stored_name, shape, dtype)
    return found


def _check(
    folder: Path, shapes: dict[str, tuple[int, ...]], stored: dict[str, _Stored]
) -> None:
    """Refuse a folder whose headers are not what its config implies, with all faults."""
    faults = []
    if missing := [name for name in shapes if name not in stored]:
        first = f"{missing[0]} of shape {shapes[missing[0]]}"
        faults.append(f"{len(missing)} tensor(s) are missing, first {first}")
    if unknown := [name for name in stored if name not in shapes]:
        first = f"{unknown[0]} in {stored[unknown[0]].file.name}"
        faults.append(f"{len(unknown)} tensor(s) are unknown, first {first}")
    for name, shape in shapes.items():
        if (found := stored.get(name)) is None:
            continue
        place = f"{name} in {found.file.name}"
        if found.shape != shape:
            faults.append(f"{place} has shape {found.shape}, it must have {shape}")
        if found.dtype not in STORED_DTYPES:
            kinds = ", ".join(STORED_DTYPES)
            faults.append(f"{place} is stored as {found.dtype}, it must be of {kinds}")
    if faults:
        more = [f"{len(faults) - 5} more"] if len(faults) > 5 else []
        raise ModelError(
            f"the weights in {folder} do not fit its config.json: "
            f"{'; '.join([*faults[:5], *more])}. Config and weights do not belong "
            "together; copy the model again"
        )


def _check_tie(folder: Path, table: _Stored, head: _Stored) -> None:
    """Refuse a tied head that is stored with other values: it would be lost silently."""

    def rows(place: _Stored, start: int) -> Tensor:
        # Mapped, because a slice by pread reads all of its tensor.
        with opened_weights(place.file, backend="mmap") as weights:
            table_VD = weights.get_tensor(place.name)
            return table_VD[start : start + _ROWS_COMPARED].float()

    starts = range(0, table.shape[0], _ROWS_COMPARED)
    same = table.shape == head.shape and all(
        torch.equal(rows(table, start), rows(head, start)) for start in starts
    )
    if not same:
        raise ModelError(
            f"{folder / 'config.json'} has tie_word_embeddings true, but {table.name} "
            f"and {head.name} are stored with different values; set it to false to keep "
            "the head"
        )


def _check_finite(file: Path, name: str, tensor: Tensor) -> None:
    # The extremes are one pass without a temporary, and NaN is passed on.
    if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
        count = int((~tensor.isfinite()).sum())
        raise ModelError(
            f"tensor {name} in {file} has {count} of {tensor.numel()} values that are "
            f"NaN or infinite; {_DAMAGED}"
        )
