"""Measurements: the benchmark (`python -m model.bench`), the equality check (`.equality`), a script for GPUs (`.gpu`).

May import every other folder of model.
"""
