"""How much memory a client's training takes, by parts; checked by bench/bench_memory.py.

Where visits run grouped by expert on a CPU, as much again as float32 blocks is resident
from the first step on, which the products' library keeps.

Counted is what is live at the peak of a step, in the backward pass or in the loss,
whichever is more; the interpreter and its libraries are not. Frozen weights count in
full: once a pass has read them they are resident, mapped from a file or not.

Shapes: L converted layers, E experts held, F rows an expert, D model width, R adapter
columns (rank times siblings), T tokens that pass at once, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from transformers import PretrainedConfig

from samv2.experts.costs import grouping_pays
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.perplexity import ROWS_PER_CHUNK

NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in NF4: half a byte, and a float32 for each 64."""
BLOCK_COPIES = 4
"""Blocks as a client holds them in training, besides parameters: the bootstrapped
model's, the received ones, the residual, the request's frame."""
OPTIMIZER_COPIES = 4
"""Parameter, gradient and AdamW's two moments, all float32."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes by what they hold."""

    experts: float
    """Base blocks, repairs, surrogates and gates."""
    rest: float
    """Embedding, attention, norms, layers that are not converted."""
    trained: float
    """Trainable parameters, their gradients and the optimiser's moments."""
    blocks: float
    """Copies of the trained blocks beside the model."""
    activations: float
    """What one pass keeps for its backward pass."""
    loss: float
    """A chunk of logits, its softmax, and the gradient of the last states."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return round(
            self.experts
            + self.rest
            + self.trained
            + self.blocks
            + self.activations
            + self.loss
        )

    def to_dict(self) -> dict[str, int]:
        """Whole bytes by part, and their total."""
        parts = {part.name: round(getattr(self, part.name)) for part in fields(self)}
        return parts | {"total": self.total}


def estimate_memory(
    config: ExpertModelConfig,
    dense: PretrainedConfig,
    *,
    experts: int,
    experts_per_token: int,
    tokens: int,
    weight_bytes: int = 2,
) -> MemoryEstimate:
    """What one client's training takes at its peak.

    Args:
        config: of the whole model.
        dense: the dense model's.
        experts: E', held in each layer.
        experts_per_token: K.
        tokens: T, windows that pass at once times their length.
        weight_bytes: of a frozen weight that is not NF4, and of an activation.
    """
    width, rows = dense.hidden_size, dense.intermediate_size // config.num_experts
    layers, total = len(config.layers), dense.num_hidden_layers
    kept_rows = experts * rows
    columns = config.adapter_rank * config.siblings

    quantised = NF4_BYTES if config.quantise == "nf4" else weight_bytes
    repairs = sum(k <= experts for k in config.repaired)
    base = (3 + repairs) * kept_rows * width * quantised
    stand_ins = 2 * repairs * min(config.repair_rank, width) * width * weight_bytes
    surrogates = config.surrogate_rank * width * (1 + experts) * 4
    factors = 3 * columns * width * 4
    grouped = grouping_pays(tokens, experts_per_token, (experts, rows, width))
    copies = 3 * kept_rows * width * 4 if grouped else 0
    expert_bytes = layers * (base + stand_ins + surrogates + factors + copies)

    heads, kv = dense.num_attention_heads, dense.num_key_value_heads
    head = getattr(dense, "head_dim", None) or width // heads
    attention = width * head * (2 * heads + 2 * kv)
    ffn = 3 * width * dense.intermediate_size
    tied = 1 if dense.tie_word_embeddings else 2
    rest = (
        tied * dense.vocab_size * width + total * attention + (total - layers) * ffn
    ) * weight_bytes

    rows_numbers = 3 * kept_rows * columns
    numbers = layers * (rows_numbers + experts * (width + 2 + config.num_experts))
    blocks = BLOCK_COPIES * numbers * 4

    stream = 6 * width + head * (2 * heads + 2 * kv)
    hidden = 3 * (experts_per_token * rows if grouped else kept_rows)
    low_rank = 3 * columns
    scores = 8 * experts
    a_layer = tokens * ((stream + hidden + low_rank) * weight_bytes + scores)
    a_dense = tokens * (stream + 3 * dense.intermediate_size) * weight_bytes
    activations = layers * a_layer + (total - layers) * a_dense

    chunk = min(tokens, ROWS_PER_CHUNK) * dense.vocab_size
    loss = chunk * (4 + 4 + weight_bytes) + 2 * tokens * width * 4
    return MemoryEstimate(
        experts=expert_bytes,
        rest=rest,
        trained=OPTIMIZER_COPIES * numbers * 4,
        blocks=blocks,
        activations=activations,
        loss=loss,
    )
