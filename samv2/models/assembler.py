"""The assembler: a small MLP that wires the experts of each layer into a DAG.

    logits = MLP(context (+) layer embedding)  in R^{E (E + 1) / 2}
    mask   = 1[logits + noise > 0]             (training, straight-through)
    mask   = 1[logits > 0]                     (evaluation)

with logistic noise and the soft value sigmoid((logits + noise) / temperature) carrying
the gradient (Gumbel-sigmoid; Jang et al. 2017, Maddison et al. 2017). The effective mask
is the server graph AND the assembler's mask. It starts fully open (logits +3). A mask
that would close every entry keeps the server entry of highest logit.

Shapes: B contexts, D model width, E experts, P = E (E + 1) / 2 edges, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

OPEN_LOGIT = 3.0
LOGIT_LIMIT = 4.0
EMBEDDING_WIDTH = 16


class Assembler(nn.Module):
    """Emits edge masks from a context vector and a layer index.

    Args:
        model_width: D.
        num_layers: L, how many converted layers there are.
        num_experts: E.
        hidden_width: H.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        *,
        model_width: int,
        num_layers: int,
        num_experts: int,
        hidden_width: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        num_edges = num_experts * (num_experts + 1) // 2
        self.layer_embedding = nn.Embedding(num_layers, EMBEDDING_WIDTH)
        self.hidden = nn.Linear(model_width + EMBEDDING_WIDTH, hidden_width)
        self.out = nn.Linear(hidden_width, num_edges)
        rows, columns = torch.triu_indices(num_experts, num_experts)
        flat = rows * num_experts + columns
        self.register_buffer("edge_index_P", flat, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.layer_embedding.weight.normal_(generator=generator)
            bound = self.hidden.in_features**-0.5
            self.hidden.weight.uniform_(-bound, bound, generator=generator)
            self.hidden.bias.zero_()
            self.out.weight.zero_()
            self.out.bias.fill_(OPEN_LOGIT)

    def logits(self, context_BD: Tensor, layer: int) -> Tensor:
        """Edge logits (B, P) in float32; the context is RMS-normalised first."""
        context_BD = context_BD.float()
        scale = context_BD.square().mean(dim=1, keepdim=True).add(1e-6).rsqrt()
        embedding = self.layer_embedding.weight[layer].expand(len(context_BD), -1)
        features = torch.cat([context_BD * scale, embedding], dim=1)
        return self.out(torch.nn.functional.silu(self.hidden(features)))

    def forward(
        self,
        context_BD: Tensor,
        layer: int,
        server_mask_EE: Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Effective masks for B contexts.

        Args:
            context_BD: (B, D), or (D,) for one context.
            layer: index among the converted layers.
            server_mask_EE: (E, E) bool, the server graph of that layer.
            temperature: of the soft value; lower is closer to the hard mask.
            generator: source of the training noise; None means evaluation: no noise.

        Returns:
            (B, E, E), or (E, E) for one context; float32 with values exactly 0 or 1,
            upper triangular, a subset of the server graph with at least one entry,
            differentiable in the parameters.
        """
        single = context_BD.ndim == 1
        if single:
            context_BD = context_BD.unsqueeze(0)
        logits_BP = self.logits(context_BD, layer).nan_to_num(nan=0.0)
        logits_BP = logits_BP.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        if generator is not None:
            uniform = torch.rand(logits_BP.shape, generator=generator)
            noise = torch.logit(uniform.clamp(1e-6, 1 - 1e-6)).to(logits_BP)
        else:
            noise = torch.zeros_like(logits_BP)
        soft_BP = torch.sigmoid((logits_BP + noise) / temperature)
        hard_BP = (logits_BP.detach() + noise > 0).float()
        soft_BEE = self._square(soft_BP)
        hard_BEE = self._square(hard_BP) * server_mask_EE
        hard_BEE = self._keep_an_entry(hard_BEE, logits_BP.detach(), server_mask_EE)
        mask_BEE = hard_BEE + (soft_BEE - soft_BEE.detach()) * server_mask_EE
        return mask_BEE[0] if single else mask_BEE

    def _square(self, edges_BP: Tensor) -> Tensor:
        size = self.num_experts
        flat = edges_BP.new_zeros(len(edges_BP), size * size)
        return flat.index_copy(1, self.edge_index_P, edges_BP).view(-1, size, size)

    def _keep_an_entry(
        self, hard_BEE: Tensor, logits_BP: Tensor, server_mask_EE: Tensor
    ) -> Tensor:
        closed_B = ~(hard_BEE.diagonal(dim1=1, dim2=2) > 0).any(dim=1)
        if not bool(closed_B.any()):
            return hard_BEE
        entry_BE = self._square(logits_BP).diagonal(dim1=1, dim2=2)
        allowed_E = server_mask_EE.diagonal()
        best_B = entry_BE.masked_fill(~allowed_E, -torch.inf).argmax(dim=1)
        rows_B = closed_B.nonzero().squeeze(1)
        hard_BEE = hard_BEE.clone()
        hard_BEE[rows_B, best_B[rows_B], best_B[rows_B]] = 1.0
        return hard_BEE
