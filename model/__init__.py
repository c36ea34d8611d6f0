"""The inference engine: what runs a vision-language model. Knows nothing of HTTP.

A folder may import those before it: decoding, backends, targets, drafters, engine, train, demo, bench.
"""

from model import vision_ops

__version__ = "0.1.0"

vision_ops.install()
