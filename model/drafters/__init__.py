"""Drafts tokens: a folder or file for each method, with its network and its drafter together.

May import model.targets. registry.py picks the drafter; checkpoint.py reads and writes trained drafts.
"""
