"""Medusa: one head for each of the next tokens (arXiv 2401.10774)."""
