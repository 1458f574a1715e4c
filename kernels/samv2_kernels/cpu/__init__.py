"""The ops' CPU kernels: what users without a GPU run."""

from samv2_kernels.cpu.experts import expert_mlp_backward, expert_mlp_forward
from samv2_kernels.cpu.function import direct_experts, nobody_looks_on
from samv2_kernels.cpu.masked import masked_experts

__all__ = [
    "direct_experts",
    "expert_mlp_backward",
    "expert_mlp_forward",
    "masked_experts",
    "nobody_looks_on",
]
