"""The FLASH engine: knows tensors, sequences and tokens; knows nothing of HTTP."""

__version__ = "0.1.0"
