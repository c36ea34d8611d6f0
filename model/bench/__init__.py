"""Measures how fast (`python -m model.bench`), and whether every way of decoding says the same (`.equality`)."""
