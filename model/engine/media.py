"""Encodes the media of prompts as far as the next pass needs them, and hands their features to it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from model.engine.encoder_cache import EncoderCache
from model.engine.sequence import Sequence
from model.engine.stats import Counters
from model.targets.base import Target


class MediaEncoder:
    """Encodes media by the target, unless their features are cached."""

    def __init__(self, target: Target, cache: EncoderCache, counters: Counters) -> None:
        self._target, self.cache, self._counters = target, cache, counters

    def encode(self, sequence: Sequence, end: int) -> None:
        """Encode the media that start before prompt position `end`, piece by piece, up to `end`. So one step encodes no
        more of a long video than its chunk of the prompt needs."""
        prompt, target, counters = sequence.prompt, self._target, self._counters
        for index, (medium, features) in enumerate(zip(prompt.media, sequence.features, strict=True)):
            visual = prompt.visual_tokens(index)
            wanted = int(np.searchsorted(visual, end))  # of its visual tokens
            if not wanted or visual[-1] < sequence.computed:
                continue
            if index not in sequence.medium_keys:
                counters.encoder_cache_queries += 1
                sequence.medium_keys[index] = key = self.cache.key(medium, sequence.request.salt)
                if (known := self.cache.get(key)) is not None:
                    counters.encoder_cache_hits += 1
                    features.append(known)
            encoded = sum(map(len, features))
            if encoded >= wanted:
                continue
            pieces = target.pieces(medium)
            size = len(visual) // pieces
            # A prefix never ends within a medium, so its first pieces are needed too.
            first, last = encoded // size, min(pieces, -(-wanted // size))
            with counters.timed("vision"):
                features.append(target.encode(medium, first, last))
            if sum(map(len, features)) != last * size:
                raise ValueError(f"{last * size} visual tokens have other numbers of features")
            if last == pieces:
                features[:] = [torch.cat(features)]
                self.cache.put(sequence.medium_keys[index], features[0])

    def between(self, sequence: Sequence, start: int, end: int) -> dict[str, torch.Tensor]:
        """Return the features of the visual tokens in start..end of the prompt, by stream; drop those of media that end
        there."""
        prompt, found = sequence.prompt, defaultdict[str, list[torch.Tensor]](list)
        for index, (medium, features) in enumerate(zip(prompt.media, sequence.features, strict=True)):
            visual = prompt.visual_tokens(index)
            first, last = np.searchsorted(visual, (start, end)).tolist()
            if first == last:
                continue
            if len(features) > 1:
                features[:] = [torch.cat(features)]
            found[self._target.stream(medium.kind)].append(features[0][first:last])
            if last == len(visual):
                features.clear()
        return {stream: torch.cat(parts) for stream, parts in found.items()}
