"""Triton kernels for GPUs, and the choice of one."""
