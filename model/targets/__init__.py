"""The models that are served, a file for each family, and how a conversation becomes their token ids.

May import model.backends and model.config. registry.py picks the family.
"""
