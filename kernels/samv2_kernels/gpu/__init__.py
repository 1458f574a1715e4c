"""Triton kernels. Import is safe without a GPU; `samv2_kernels` picks them by device."""
