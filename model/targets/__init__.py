"""Loads the models that are served, a file for each family, and turns conversations into their token ids.

May import model.backends and model.config. registry.py picks the family.
"""
