"""The ops' CPU kernels: what users without a GPU run."""

from samv2_kernels.cpu.experts import expert_mlp_backward, expert_mlp_forward

__all__ = ["expert_mlp_backward", "expert_mlp_forward"]
