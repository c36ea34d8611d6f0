"""Decompress request bodies as they arrive: gzip and deflate, never more at a time than a small piece.

Knows nothing of HTTP but the errors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from service.errors import BadRequest, UnsupportedMedia

PIECE = 256 * 1024  # bytes decompressed at a time: each call holds up the event loop
GZIP_OR_ZLIB, RAW = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS


class Decompressor:
    """Decompresses one body."""

    def __init__(self, encoding: str) -> None:
        """encoding: the value of Content-Encoding. Raises UnsupportedMedia."""
        self.encoding = encoding.strip().lower().removeprefix("x-")
        if self.encoding not in ("gzip", "deflate"):
            raise UnsupportedMedia(
                f"Content-Encoding {encoding[:32]} is not supported: send gzip, deflate, or the body uncompressed",
                param="content-encoding",
                code="unsupported_encoding",
            )
        self._stream = zlib.decompressobj(GZIP_OR_ZLIB)
        self._begun = False  # whether the stream has had any bytes

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what these bytes hold, piece by piece. Raises BadRequest."""
        pending = bool(data)
        while pending:
            try:
                piece = self._decompress(data)
            except zlib.error:
                raise self._malformed() from None
            data = self._stream.unconsumed_tail
            pending = bool(data) or len(piece) == PIECE  # a full piece may leave more behind, of no bytes at all
            if self._stream.eof:  # gzip files may follow each other
                data = self._stream.unused_data
                pending = bool(data)
                self._stream, self._begun = zlib.decompressobj(GZIP_OR_ZLIB), False
            yield piece

    def finish(self) -> None:
        """Raise BadRequest unless the body was complete."""
        if self._begun:
            raise self._malformed()

    def _decompress(self, data: bytes) -> bytes:
        begun, self._begun = self._begun, True
        try:
            return self._stream.decompress(data, PIECE)
        except zlib.error:
            if begun or self.encoding != "deflate":
                raise
            self._stream = zlib.decompressobj(RAW)  # which many send under this name
            return self._stream.decompress(data, PIECE)

    def _malformed(self) -> BadRequest:
        return BadRequest(
            f"the body is not valid {self.encoding}, or not complete", param="content-encoding", code="invalid_encoding"
        )
