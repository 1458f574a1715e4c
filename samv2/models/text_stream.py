"""The residual stream of a text between two decoder layers of a dense model.

Shapes: B sequences, S positions, N = B S tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from samv2.models.dense_layers import AttentionInputs, attention_inputs

SEQUENCES_AT_ONCE = 8


class DenseSource(Protocol):
    """A dense model, layer by layer: ``DenseLayers`` on disk, ``LlamaLayers`` in memory."""

    config: PretrainedConfig

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """(B, S) int64 ids to the (B, S, D) stream before layer 0."""

    def layer(self, index: int) -> nn.Module:
        """A Hugging Face decoder layer."""

    def attention_inputs(self, length: int) -> AttentionInputs:
        """What the layers need beside the stream."""


class LlamaLayers:
    """The layers of a Hugging Face model in memory.

    Args:
        llama: causal LM in evaluation mode; its layers are handed out as they are.
    """

    def __init__(self, llama: PreTrainedModel) -> None:
        self.llama, self.config = llama, llama.config

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return self.llama.model.embed_tokens(tokens_BS)

    def layer(self, index: int) -> nn.Module:
        return self.llama.model.layers[index]

    def attention_inputs(self, length: int) -> AttentionInputs:
        model = self.llama.model
        weight = model.embed_tokens.weight
        return attention_inputs(
            self.config, type(model.rotary_emb), length, weight.dtype, weight.device
        )


class TextStream:
    """One text's stream, advanced layer by layer.

    Args:
        hidden_BSD: the stream before the first layer, in the model's dtype.
        inputs: positions and masks for length S.
    """

    def __init__(self, hidden_BSD: Tensor, inputs: AttentionInputs) -> None:
        self.hidden_BSD, self.inputs = hidden_BSD, inputs

    def attend(self, layer: nn.Module, index: int) -> tuple[Tensor, Tensor]:
        """FFN inputs and the stream after attention, (B, S, D) each."""
        extra: dict[str, Any] = self.inputs.of_layer(index)
        inputs, residuals = [], []
        for part_BSD in self.hidden_BSD.split(SEQUENCES_AT_ONCE):
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(part_BSD), **extra
            )
            residuals.append(part_BSD + attended)
            inputs.append(layer.post_attention_layernorm(residuals[-1]))
        return torch.cat(inputs), torch.cat(residuals)

    def advance(
        self, x_BSD: Tensor, after_BSD: Tensor, ffn: Callable[[Tensor], Tensor]
    ) -> None:
        """Add what the FFN makes of its inputs, (B, S, D) to (B, S, D), a few at a time."""
        parts = zip(x_BSD.split(SEQUENCES_AT_ONCE), after_BSD.split(SEQUENCES_AT_ONCE))
        self.hidden_BSD = torch.cat([after + ffn(x) for x, after in parts])
