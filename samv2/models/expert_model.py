"""A Llama-style causal LM whose FFNs are expert graphs.

The Hugging Face model stays as it is; its converted decoder layers are swapped, visibly,
for :class:`ExpertDecoderLayer`, and nothing is patched.

Shapes: B sequences, S positions, L converted layers, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from samv2.common.errors import ModelError
from samv2.experts.graph import ExpertGraph
from samv2.experts.moe_layers import (
    ExpertGraphMLP,
    PrefixState,
    WalkOptions,
    check_visits,
)
from samv2.experts.sibling_gate import SiblingGate
from samv2.models.adapters import read_blocks, write_blocks
from samv2.models.assembler import Assembler
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.logit_scale import fit_logit_scale, scaled


class ExpertCache(DynamicCache):
    """A key-value cache that also carries what sequences have shown so far.

    That is the assembler's context of each layer, and the sibling gate's evidence.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prefixes: dict[int, PrefixState] = {}
        self.evidence_BG: Tensor | None = None


class ExpertDecoderLayer(nn.Module):
    """A decoder layer around an expert graph; attention and norms are the original's.

    Args:
        base: the dense decoder layer (its ``mlp`` is dropped).
        mlp: the expert graph that takes its place.
    """

    def __init__(self, base: nn.Module, mlp: ExpertGraphMLP) -> None:
        super().__init__()
        self.self_attn = base.self_attn
        self.mlp = mlp
        self.input_layernorm = base.input_layernorm
        self.post_attention_layernorm = base.post_attention_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        walk_options: WalkOptions | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the dense layer's; ``walk_options`` reaches the expert graph."""
        prefix = self._prefix(cache, walk_options)
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        output, state = self.mlp(
            self.post_attention_layernorm(hidden_states), walk_options, prefix
        )
        if isinstance(cache, ExpertCache):
            cache.prefixes[self.mlp.layer] = state
        return hidden_states + output

    def _prefix(
        self, cache: DynamicCache | None, options: WalkOptions | None
    ) -> PrefixState | None:
        if isinstance(cache, ExpertCache):
            return cache.prefixes.get(self.mlp.layer)
        uses_context = self.mlp.assembler is not None and (
            options is None or options.use_assembler
        )
        seen = (
            cache.get_seq_length(self.self_attn.layer_idx) if cache is not None else 0
        )
        if seen and uses_context:
            raise ModelError(
                "this cache was filled without the assembler's context; pass "
                "cache=ExpertCache(), or generate through ExpertModel.generate"
            )
        return None


class ExpertModel(nn.Module):
    """A causal LM with expert graphs, its assembler, and its server graph.

    Args:
        llama: the Hugging Face model with its converted layers already swapped.
        assembler: shared by all converted layers, or None.
        expert_config: what was converted and how.
    """

    def __init__(
        self,
        llama: PreTrainedModel,
        assembler: Assembler | None,
        expert_config: ExpertModelConfig,
    ) -> None:
        super().__init__()
        self.llama = llama
        self.assembler = assembler
        self.expert_config = expert_config
        self.sibling_gate: SiblingGate | None = None
        self._hook: RemovableHandle | None = None
        if expert_config.siblings > 1:
            self.sibling_gate = SiblingGate(expert_config.siblings)
            # Every way to the decoder, generation too, passes here with its tokens.
            self._hook = llama.model.register_forward_pre_hook(
                self._share, with_kwargs=True
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ExpertModel:
        """Load a folder that ``samv2 bootstrap`` wrote; evaluation mode, on the CPU.

        Raises:
            ModelError: the folder is not a bootstrapped model, or is damaged.
        """
        from samv2.models.save import load_expert_model  # save builds on this file

        return load_expert_model(Path(folder))[0]

    def release(self) -> None:
        """Let go of the Hugging Face model, before another is made around it."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face config of the underlying model."""
        return self.llama.config

    @property
    def device(self) -> torch.device:
        """Where the model is computed with."""
        return self.llama.device

    @property
    def expert_layers(self) -> list[ExpertGraphMLP]:
        """The converted FFNs, in order."""
        decoder = self.llama.model.layers
        return [decoder[index].mlp for index in self.expert_config.layers]

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        walk_options: WalkOptions | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (and the loss, with ``labels``) of (B, S) int64 token ids.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 1 for tokens; padding must be on the right, because
                the assembler reads each sequence's leading positions.
            labels: (B, S) int64, -100 where ignored.
            walk_options: choices for this pass.
            use_cache: fill a cache; see :class:`ExpertCache`.
            **kwargs: passed to the Hugging Face model.

        Raises:
            ModelError: left padding while an assembler or a sibling gate is in use.
        """
        self._refuse_left_padding(attention_mask)
        output = self.llama(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=use_cache,
            walk_options=walk_options,
            **kwargs,
        )
        output.logits = scaled(output.logits, self._logit_scale(walk_options))
        if labels is not None:
            output.loss = self.llama.loss_function(
                logits=output.logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        return output

    def hidden_states(
        self, input_ids: Tensor, walk_options: WalkOptions | None = None
    ) -> Tensor:
        """Last hidden states (B, S, D): times the head's weight they are the logits."""
        output = self.llama.model(
            input_ids=input_ids, use_cache=False, walk_options=walk_options
        )
        return scaled(output.last_hidden_state, self._logit_scale(walk_options))

    @torch.no_grad()
    def fit_logit_scales(self, tokens_BS: Tensor, wanted_BSD: Tensor) -> None:
        """Set the factor on the logits of every repaired K.

        Args:
            tokens_BS: (B, S) int64, text that the repairs were not fitted to.
            wanted_BSD: (B, S, D) the dense model's last hidden states on it.
        """
        self.expert_config = replace(self.expert_config, logit_scales=())
        head_VD, scales = self.llama.lm_head.weight, []
        for k in self.expert_config.repaired:
            options = WalkOptions(experts_per_token=k, use_assembler=False)
            parts = [self.hidden_states(part, options) for part in tokens_BS.split(4)]
            scales.append(fit_logit_scale(torch.cat(parts), wanted_BSD, head_VD))
        self.expert_config = replace(self.expert_config, logit_scales=tuple(scales))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Hugging Face's ``generate`` with a cache that carries the contexts.

        Beams are refused: they would have to reorder the contexts.
        """
        if kwargs.get("num_beams", 1) != 1:
            raise ModelError(f"num_beams is {kwargs['num_beams']}; use 1 (sampling)")
        self._refuse_left_padding(kwargs.get("attention_mask"))
        scale = self._logit_scale(None)
        if scale != 1:
            processors = kwargs.pop("logits_processor", None) or []
            warper = TemperatureLogitsWarper(1 / scale)
            kwargs["logits_processor"] = LogitsProcessorList([warper, *processors])
        return self.llama.generate(
            input_ids, cache=ExpertCache(config=self.config), **kwargs
        )

    @property
    def graph(self) -> ExpertGraph:
        """The server graph that the layers walk (version 0: versions are the run's)."""
        layers = self.expert_layers
        return ExpertGraph(
            edge_mask_LEE=torch.stack([layer.edge_mask_EE.cpu() for layer in layers]),
            order_LE=torch.stack([layer.order_E.cpu() for layer in layers]),
        )

    def set_graph(self, graph: ExpertGraph) -> None:
        """Walk another graph from now on.

        Raises:
            ModelError: its shape is not the model's.
        """
        layers = self.expert_layers
        expected = (len(layers), layers[0].num_experts, layers[0].num_experts)
        if tuple(graph.edge_mask_LEE.shape) != expected:
            raise ModelError(
                f"the graph has shape {tuple(graph.edge_mask_LEE.shape)}, the model "
                f"needs {expected}"
            )
        for index, layer in enumerate(layers):
            layer.edge_mask_EE.copy_(graph.edge_mask_LEE[index])
            layer.order_E.copy_(graph.order_LE[index])

    def read_blocks(self) -> dict[int, Tensor]:
        """Trainable blocks {expert_id: flat float32}; see models.adapters."""
        return read_blocks(self.expert_layers, self.assembler, self.sibling_gate)

    def write_blocks(self, blocks: dict[int, Tensor]) -> None:
        """Copy blocks into the parameters."""
        write_blocks(self.expert_layers, self.assembler, blocks, self.sibling_gate)

    def set_experts_per_token(self, k: int) -> None:
        """Change K of every converted layer.

        Raises:
            ModelError: K does not fit the shared experts or E.
        """
        config = self.expert_config
        check_visits(k, config.num_shared, config.num_experts)
        self.expert_config = replace(config, experts_per_token=k)
        for layer in self.expert_layers:
            layer.experts_per_token = k

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Adapter rows, gates, strengths and the assembler, in a fixed order."""
        chosen: dict[int, nn.Parameter] = {}
        for layer in self.expert_layers:
            for parameter in layer.parameters():
                chosen.setdefault(id(parameter), parameter)
        if self.assembler is not None:
            for parameter in self.assembler.parameters():
                chosen.setdefault(id(parameter), parameter)
        return list(chosen.values())

    def freeze_base(self) -> None:
        """Leave gradients on for the trainable parameters only."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)

    def flops_fraction(self, experts_per_token: int | None = None) -> float:
        """FFN multiply-adds over the dense model's, dense layers counted as 1."""
        config = self.expert_config
        k = config.experts_per_token if experts_per_token is None else experts_per_token
        return config.flops_fraction(self.config, k)

    @torch.no_grad()
    def active_siblings(self, tokens_BS: Tensor, least: float = 0.1) -> tuple[int, ...]:
        """The siblings that text is served by.

        Args:
            tokens_BS: (B, S) int64, sequences of the text.
            least: mean share from which a sibling counts.

        Returns:
            Their indices, rising; at least the one of the largest share.
        """
        if self.sibling_gate is None:
            return (0,)
        log_share_BSG, _ = self.sibling_gate(tokens_BS.to(self.device))
        mean_G = log_share_BSG.softmax(dim=2).mean(dim=(0, 1))
        chosen = (mean_G >= min(least, float(mean_G.max()))).nonzero()
        return tuple(chosen.flatten().cpu().tolist())

    def _share(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the layers the siblings' shares at the tokens of this pass."""
        options = kwargs.get("walk_options") or WalkOptions()
        only = options.siblings
        if options.share_BSG is not None or (only is not None and len(only) == 1):
            return args, kwargs
        tokens_BS = args[0] if args else kwargs.get("input_ids")
        if tokens_BS is None:
            raise ModelError(
                "siblings are chosen by tokens: pass input_ids, not inputs_embeds"
            )
        cache = kwargs.get("cache")
        kept = isinstance(cache, ExpertCache)
        if not kept and cache is not None and cache.get_seq_length():
            raise ModelError(
                "this cache was filled without the sibling gate's evidence; pass "
                "cache=ExpertCache(), or generate through ExpertModel.generate"
            )
        seen_BG = cache.evidence_BG if kept else None
        log_share_BSG, evidence_BG = self.sibling_gate(tokens_BS, seen_BG)
        if kept:
            cache.evidence_BG = evidence_BG
        if only is not None:
            log_share_BSG = log_share_BSG[:, :, list(only)]
        options = replace(options, share_BSG=log_share_BSG.softmax(dim=2))
        return args, kwargs | {"walk_options": options}

    def _logit_scale(self, options: WalkOptions | None) -> float:
        k = self.expert_config.experts_per_token
        if options is not None and options.experts_per_token is not None:
            k = options.experts_per_token
        return self.expert_config.logit_scale(k)

    def _refuse_left_padding(self, attention_mask: Tensor | None) -> None:
        if attention_mask is None or (
            self.assembler is None and self.sibling_gate is None
        ):
            return
        if not bool(attention_mask[:, 0].all()):
            raise ModelError(
                "a sequence is padded on the left; the assembler and the siblings' gate "
                "read leading positions, so pad on the right (tokenizer.padding_side = "
                "'right')"
            )
