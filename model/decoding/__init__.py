"""Implements the mathematics of decoding: draft trees, verification, sampling, logits processors, detokenising.

Knows no model and no cache. Imports only model.request, model.errors and model.transfer.
"""
