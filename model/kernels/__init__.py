"""Kernels of our own for GPUs, written in Triton, which comes with torch there and is not needed anywhere else."""
