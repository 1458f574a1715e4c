"""The ops' CPU kernels: what users without a GPU run."""

from samv2_kernels.cpu.experts import expert_mlp_backward, expert_mlp_forward
from samv2_kernels.cpu.function import direct_experts, is_plain_eager
from samv2_kernels.cpu.masked import masked_experts, masking_pays

__all__ = [
    "direct_experts",
    "expert_mlp_backward",
    "expert_mlp_forward",
    "is_plain_eager",
    "masked_experts",
    "masking_pays",
]
