"""EAGLE: a draft that predicts the target's features one token at a time (arXiv 2401.15077)."""
