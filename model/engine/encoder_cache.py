"""Visual features by content: the same picture is encoded once. Least recently used goes first, under a byte budget."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from torch import Tensor

from model.request import Medium


class EncoderCache:
    """Keys are SHA-256 over a medium's digest, `version` and a salt, so that nothing else can be mistaken for it, and
    whoever has another salt finds nothing."""

    def __init__(self, budget: int, version: str) -> None:
        self._budget, self._version = budget, version.encode()
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def key(self, medium: Medium, salt: str = "") -> bytes:
        return hashlib.sha256(medium.digest + self._version + b"|" + salt.encode()).digest()

    def get(self, key: bytes) -> Tensor | None:
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if size > self._budget or key in self._features:
            return
        self._features[key] = features
        self._bytes += size
        while self._bytes > self._budget:
            _, oldest = self._features.popitem(last=False)
            self._bytes -= oldest.numel() * oldest.element_size()
