"""FLASH: compressed visual latents, and a block of tokens for each pass (arXiv 2505.12728)."""
