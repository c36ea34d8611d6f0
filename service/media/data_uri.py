"""Parse and decode `data:` URIs as browsers do.

Follows "data: URL processor" of WHATWG Fetch and "forgiving-base64 decode" of WHATWG Infra: scheme and `;base64` in any
case, percent-encoding decoded, white space dropped, padding optional, everything after `#` ignored. Also accepts
base64's URL-safe alphabet, a comma within a quoted parameter of the header, and base64 alone where it tells its kind.

Knows nothing of the content's format, and nothing of HTTP but the errors.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from service.errors import BadRequest, TooLarge

MAX_HEADER = 4096  # characters up to the comma
SLICE = 1024 * 1024  # characters decoded at a time: each call holds the GIL, which the event loop needs too

START = re.compile(r"[\x00-\x20]*+data:", re.IGNORECASE | re.ASCII)
# Base64 alone whose first bytes tell a JPEG, PNG, GIF, WebP, MP4 or Matroska file: no URL begins like this.
BARE = re.compile(r"/9j/|iVBORw0KGgo|R0lGOD|UklGR|AAAA[A-Za-z0-9+/]{2}Z0eX|GkXfo")
LIKE_BASE64 = re.compile(r"[A-Za-z0-9+/_\-=\s]{64,}+\Z", re.ASCII)
# Matches the beginning of a JSON string that decodes to START, any character of which may be escaped, or to BARE.
START_IN_JSON = re.compile(
    rb'"(?:(?: |\\[btnfr]|\\u00(?:[01][0-9a-fA-F]|20))*+'
    rb"(?:[dD]|\\u00[46]4)(?:[aA]|\\u00[46]1)(?:[tT]|\\u00[57]4)(?:[aA]|\\u00[46]1)(?::|\\u003[aA])"
    rb"|\\?/9j\\?/|iVBORw0KGgo|R0lGOD|UklGR|AAAA[A-Za-z0-9+/]{2}Z0eX|GkXfo)"
)

_HEADER = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+")*+(?=,)', re.DOTALL)
_FIELD = re.compile(r'((?:[^";]|"(?:[^"\\]|\\.)*+")*+)(?:;|\Z)', re.DOTALL)
_IS_BASE64 = re.compile(r"; *base64\s*\Z", re.IGNORECASE | re.ASCII)

_WHITE = b"\t\n\f\r "
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_STANDARD = bytes.maketrans(b"-_", b"+/")
# Base64 content before the padding, plain or percent-encoded.
_VALID = re.compile(
    r"(?:[A-Za-z0-9+/_\-\t\n\f\r ]|%(?i:2[0bdf]|3\d|4[1-9a-f]|5[0-9af]|6[1-9a-f]|7[0-9a]|0[9acd]))*+", re.ASCII
)
_CHARACTER = re.compile(r"%[0-9a-fA-F]{2}|.", re.DOTALL)
_HEX = np.full(256, 16, np.uint8)
for _digits in (b"0123456789abcdef", b"0123456789ABCDEF"):
    _HEX[np.frombuffer(_digits, np.uint8)] = np.arange(16)


@dataclass(frozen=True)
class DataUri:
    """A parsed data: URI."""

    media_type: str  # lower case, without parameters; "" where there is none
    parameters: dict[str, str]  # names in lower case
    is_base64: bool
    content: str  # still encoded

    def decode(self, max_bytes: int) -> bytes:
        """Decode the content. Raises BadRequest where it is malformed, TooLarge where it has more bytes."""
        if self.is_base64:
            return decode_base64(self.content, max_bytes)
        decoded = bytearray()
        for _, octets in _octets(self.content):
            decoded += octets
            if len(decoded) > max_bytes:
                raise _too_large(max_bytes)
        return bytes(decoded)


def parse(url: str) -> DataUri:
    """Parse a URI that begins like START. Raises BadRequest that says what is wrong."""
    start = START.match(url)
    if start is None:
        raise malformed("does not begin with data:")
    end = url.find("#")
    end = len(url) if end < 0 else end
    begin = start.end()
    found = _HEADER.match(url, begin, min(end, begin + MAX_HEADER + 1))
    comma = found.end() if found else url.find(",", begin, end)  # unterminated quotes are no quotes
    if comma < 0:
        raise malformed("has no comma; it must look like data:image/png;base64,...")
    if comma - begin > MAX_HEADER:
        raise malformed(f"has more than {MAX_HEADER} characters before its comma")
    header = url[begin:comma]
    fields = _FIELD.findall(header) if found else header.split(";")
    media_type, *parameters = (field.strip() for field in fields)
    pairs = (parameter.partition("=") for parameter in parameters)
    values = {name.strip().lower(): value.strip().strip('"') for name, equals, value in pairs if equals}
    is_base64 = _IS_BASE64.search(header) is not None
    return DataUri(media_type.lower(), values, is_base64, url[comma + 1 : end])


def decode_base64(content: str, max_bytes: int) -> bytes:
    """Decode base64 of either alphabet, with or without white space, percent-encoding and padding.

    Raises BadRequest that names the first invalid character, and TooLarge.
    """
    decoded, rest = bytearray(), b""  # rest: an incomplete group of four
    padding, padded_at = 0, 0
    for at, octets in _octets(content):
        if not (rest or padding or len(octets) % 4 or octets.endswith(b"=")):
            with suppress(binascii.Error):  # plain base64, the usual case, decodes twice as fast this way
                decoded += binascii.a2b_base64(octets, strict_mode=True)
                octets = b""
        piece = octets.translate(_STANDARD, _WHITE)
        group = piece.rstrip(b"=")
        if group and padding:
            raise _invalid_character(content, padded_at)
        if group.translate(None, _ALPHABET):
            raise _invalid_character(content, at)
        if len(piece) > len(group):
            padding, padded_at = padding + len(piece) - len(group), padded_at if padding else at
        group = rest + group
        whole = len(group) // 4 * 4
        decoded += binascii.a2b_base64(group[:whole])
        rest = group[whole:]
        if len(decoded) > max_bytes:
            raise _too_large(max_bytes)
    if padding > 2:
        raise malformed(f"has base64 that ends with {padding} '='; at most two are allowed")
    if len(rest) == 1:
        raise malformed("has truncated base64: its last group of four has only one character")
    decoded += binascii.a2b_base64(rest + b"=" * (-len(rest) % 4))
    if len(decoded) > max_bytes:
        raise _too_large(max_bytes)
    return bytes(decoded)


def _octets(content: str) -> Iterator[tuple[int, bytes]]:
    """Yield the content slice by slice, percent-decoded, each with its offset in the content."""
    at, encoded = 0, "%" in content
    while at < len(content):
        end = at + SLICE
        if encoded and end < len(content) and (cut := content.rfind("%", end - 2, end)) > at:
            end = cut  # never splits a %2B
        octets = content[at:end].encode(errors="replace")
        yield at, _percent_decoded(octets) if encoded else octets
        at = end


def _percent_decoded(octets: bytes) -> bytes:
    """Decode like urllib's `unquote_to_bytes`, in a time that does not depend on how many octets are encoded."""
    codes = np.frombuffer(octets, np.uint8).copy()
    at = np.flatnonzero(codes[:-2] == ord("%"))
    high, low = _HEX[codes[at + 1]], _HEX[codes[at + 2]]
    valid = (high < 16) & (low < 16)
    at = at[valid]
    codes[at] = 16 * high[valid] + low[valid]
    keep = np.ones(len(codes), np.bool_)
    keep[at + 1] = keep[at + 2] = False
    return codes[keep].tobytes()


def _invalid_character(content: str, at: int) -> BadRequest:
    """Return the error for the first character from `at` on that is not base64."""
    valid = _VALID.match(content, at)
    end = valid.end() if valid else at
    found = _CHARACTER.match(content, end)
    character, offset = found[0] if found else "", f"at offset {end} after the comma"
    is_list = content.find(",", end, end + 3) >= 0  # a comma here or after padding
    hint = "; a list of frames is data:video/jpeg;base64,FRAME,FRAME,..." if is_list else ""
    if character in ("=", "%3D", "%3d"):
        return malformed(f"has a '=' before the end of its base64, {offset}{hint}")
    return malformed(f"has {character!r} {offset}, which is not base64{hint}")


def malformed(problem: str) -> BadRequest:
    """Return the error for a malformed URI. problem: a phrase like "has no comma"."""
    return BadRequest(f"the data: URI {problem}", code="invalid_data_uri")


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the medium has more than {max_bytes} bytes", code="too_many_bytes")
