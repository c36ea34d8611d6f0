"""Caches visual features by content, so that the same medium is encoded once. Evicts the least recently used entry to
stay within a byte budget."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from torch import Tensor

from model.request import Medium


class EncoderCache:
    """Maps the content of a medium to its features (tokens, hidden).

    A key is the SHA-256 of the medium's digest, `version` and a salt. So two different media never share an entry, and
    a client with another salt finds nothing.
    """

    def __init__(self, budget: int, version: str) -> None:
        """Create an empty cache. budget: bytes of features to keep; version: what else features depend on, such as the
        model."""
        self._budget, self._version = budget, version.encode()
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def key(self, medium: Medium, salt: str = "") -> bytes:
        """Compute the key of a medium for clients with this salt."""
        return hashlib.sha256(medium.digest + self._version + b"|" + salt.encode()).digest()

    def get(self, key: bytes) -> Tensor | None:
        """Return the cached features and mark them as recently used; None if there are none."""
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: Tensor) -> None:
        """Store features and evict the oldest entries beyond the budget. Features larger than the whole budget are not
        stored."""
        size = features.numel() * features.element_size()
        if size > self._budget or key in self._features:
            return
        self._features[key] = features
        self._bytes += size
        while self._bytes > self._budget:
            _, oldest = self._features.popitem(last=False)
            self._bytes -= oldest.numel() * oldest.element_size()
