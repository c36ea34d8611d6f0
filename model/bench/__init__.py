"""Measures how fast the engine answers (`python -m model.bench`), checks that every way of decoding gives the same
tokens (`.equality`), and measures what a GPU could do (`.gpu`)."""
