"""The ops' CPU kernels: what users without a GPU run."""

from samv2_kernels.cpu.experts import expert_mlp_backward, expert_mlp_forward
from samv2_kernels.cpu.function import direct_experts, nobody_looks_on

__all__ = [
    "direct_experts",
    "expert_mlp_backward",
    "expert_mlp_forward",
    "nobody_looks_on",
]
