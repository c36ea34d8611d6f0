"""Media of strangers: fetched (fetch.py), told apart by their bytes (sniff.py) and decoded in confined children.

Imports neither a decoder nor torch.
"""

from service.media.decoder import DecoderStats, MediaDecoder
from service.media.limits import MediaLimits
from service.media.sniff import Kind

__all__ = ["DecoderStats", "Kind", "MediaDecoder", "MediaLimits"]
