"""Untrusted media: fetch them (fetch.py), remember them (media_cache.py), detect their format (sniff.py), decode them
in confined child processes.

May import `service.errors` and `model.request`; nothing else of the service. Only child.py and what it imports load
decoders; no module loads torch.
"""

from service.media.decoder import DecoderStats, MediaDecoder
from service.media.limits import MediaLimits
from service.media.media_cache import MediaCache
from service.media.sniff import Kind

__all__ = ["DecoderStats", "Kind", "MediaCache", "MediaDecoder", "MediaLimits"]
