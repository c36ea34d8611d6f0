"""The C++ library for CPUs and its bindings: layers, products, attention, and rounds of draft and verify.

builds.py lists what is compiled, library.py loads it. May import model.decoding.
"""
