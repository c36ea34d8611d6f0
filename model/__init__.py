"""The inference engine: what runs a vision-language model. Knows nothing of HTTP.

A folder may import those before it: decoding, backends, targets, drafters, engine, train, demo, bench.
"""

__version__ = "0.1.0"
