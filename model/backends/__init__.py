"""Computes and stores tensors: the KV cache, the native library, torch's attention, kernels and graphs.

Knows no model family. May import model.decoding.
"""
