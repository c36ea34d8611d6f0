"""Resolve a media URL to bytes: data: URIs, http(s) from domains and file:// below folders that the operator allows.

Fetching URLs of strangers invites server-side request forgery (SSRF). So no domain is allowed by default; a URL is
parsed once, and the parsed parts are fetched; a host name is resolved once, all its addresses must be public, and the
connection goes to the address that was checked; every redirect repeats these checks; bytes and time are limited while
they are spent; and errors reveal nothing about what was found.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from service.errors import BadRequest, ServiceError, TooLarge
from service.media import data_uri, frame_list, local_file
from service.media.limits import MediaLimits
from service.media.sniff import sniff

MAX_URL = 8192  # characters of an http(s) URL
DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)

# Addresses that are not public, by IANA's registries (www.iana.org/assignments/iana-ipv4-special-registry and
# iana-ipv6-special-registry, as of 2025). `ipaddress.is_global` will not do: it differs between versions of Python, and
# knows neither site-local addresses nor those of clouds.
NOT_PUBLIC_V4 = (
    "0.0.0.0/8",  # this network (RFC 791)
    "10.0.0.0/8",  # private (RFC 1918)
    "100.64.0.0/10",  # shared by a carrier's customers (RFC 6598); Alibaba's metadata: 100.100.100.200
    "127.0.0.0/8",  # loopback (RFC 1122)
    "168.63.129.16/32",  # public by number, but Azure's own platform: metadata, DNS, agents
    "169.254.0.0/16",  # link-local (RFC 3927); most clouds' metadata: 169.254.169.254
    "172.16.0.0/12",  # private (RFC 1918)
    "192.0.0.0/24",  # IETF protocol assignments (RFC 6890); Oracle's metadata: 192.0.0.192
    "192.0.2.0/24",  # documentation (RFC 5737)
    "192.88.99.0/24",  # 6to4 relays, deprecated (RFC 7526)
    "192.168.0.0/16",  # private (RFC 1918)
    "198.18.0.0/15",  # benchmarking (RFC 2544)
    "198.51.100.0/24",  # documentation (RFC 5737)
    "203.0.113.0/24",  # documentation (RFC 5737)
    "224.0.0.0/4",  # multicast (RFC 5771)
    "240.0.0.0/4",  # reserved (RFC 1112), broadcast (RFC 919)
)
# In IPv6 only 2000::/3 is assigned as global unicast (RFC 4291). Outside of it lie loopback, unique local (with the
# metadata of AWS, fd00:ec2::254, and Google, fd20:ce::254), link-local, site-local, multicast, discard, SRv6, and
# embedded IPv4 addresses: compatible (::/96), translated (::ffff:0:0:0/96) and NAT64 (64:ff9b::/96, 64:ff9b:1::/48).
PUBLIC_V6 = "2000::/3"
NOT_PUBLIC_V6 = (
    "2001::/23",  # IETF protocol assignments (RFC 2928): Teredo, benchmarking, ORCHID, AS112, drones
    "2001:db8::/32",  # documentation (RFC 3849)
    "2002::/16",  # 6to4, an IPv4 address in it (RFC 3056)
    "3fff::/20",  # documentation (RFC 9637)
)
_GLOBAL_V6 = ipaddress.IPv6Network(PUBLIC_V6)
_SPECIAL_V4 = tuple(map(ipaddress.IPv4Network, NOT_PUBLIC_V4))
_SPECIAL_V6 = tuple(map(ipaddress.IPv6Network, NOT_PUBLIC_V6))


async def resolve(
    url: str,
    *,
    limits: MediaLimits,
    allowed_domains: tuple[str, ...] = (),
    allowed_folders: Sequence[Path] = (),
    allow_private: bool = False,
    count: Callable[[int], None] = lambda _: None,
) -> bytes:
    """Return the bytes behind a URL.

    allowed_domains: "example.com", "*.example.com" (its subdomains), each optionally with ":port"; without one, the
    scheme's own port only. allowed_folders: those below which file:// URLs may be read. allow_private: accept
    addresses that are not public, for tests and closed networks. count: called with the number of bytes as they are
    fetched; may raise.

    Raises BadRequest (malformed, not allowed, not found, too slow) and TooLarge.
    """
    if data_uri.START.match(url):
        return await _from_data_uri(url, limits)
    if url[:8].partition(":")[0].lower() in DEFAULT_PORTS:
        return await _fetch(url, limits, allowed_domains, allow_private, count)
    if local_file.START.match(url):
        return await local_file.read(url, allowed_folders, limits, count)
    if data_uri.BARE.match(url):
        return await asyncio.to_thread(data_uri.decode_base64, url, limits.max_bytes)
    hint = "; write base64 as data:image/png;base64,..." if data_uri.LIKE_BASE64.match(url) else ""
    raise BadRequest(
        f"a media URL must be a data: URI, or http(s) or file:// where allowed{hint}", code="unsupported_url"
    )


async def _from_data_uri(url: str, limits: MediaLimits) -> bytes:
    """Decode a data: URI; long ones and lists of frames in another thread, since they take long."""
    if len(url) > data_uri.SLICE:
        return await asyncio.to_thread(lambda: _content(data_uri.parse(url), limits))
    uri = data_uri.parse(url)
    return await asyncio.to_thread(_content, uri, limits) if _is_frame_list(uri) else _content(uri, limits)


def _is_frame_list(uri: data_uri.DataUri) -> bool:
    return uri.media_type == frame_list.MEDIA_TYPE and uri.is_base64


def _content(uri: data_uri.DataUri, limits: MediaLimits) -> bytes:
    """Decode a data: URI, or join its list of frames. Any other media type is ignored: the bytes decide."""
    if _is_frame_list(uri):
        return frame_list.from_uri(uri, limits)
    data = uri.decode(limits.max_bytes)
    if not uri.is_base64 and sniff(data) is None:
        raise data_uri.malformed("has no ;base64 before its comma, and its plain content is no image or video")
    return data


async def _fetch(
    url: str, limits: MediaLimits, allowed_domains: tuple[str, ...], allow_private: bool, count: Callable[[int], None]
) -> bytes:
    """Fetch an http(s) URL, following redirects. Errors say nothing about what was found."""
    try:
        async with asyncio.timeout(limits.fetch_seconds):
            target = _parse(url)
            for _ in range(limits.max_redirects + 1):
                _check_allowed(target, allowed_domains)
                address = await _public_address(target, allow_private)
                result = await _get(target, address, limits, count)
                if isinstance(result, bytes):
                    return result
                target = _parse(result, base=target)
    except TimeoutError:
        raise BadRequest("the media URL took too long to fetch", code="fetch_timeout") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
        raise _not_fetched() from None
    raise BadRequest("the media URL redirects too often", code="fetch_failed")


def _parse(url: str, *, base: httpx.URL | None = None) -> httpx.URL:
    """Parse and validate a URL; everything after this uses the parsed parts only."""
    if len(url) > MAX_URL:
        raise BadRequest(f"the media URL must have at most {MAX_URL} characters", code="invalid_url")
    try:
        parsed = httpx.URL(url) if base is None else base.join(url)
    except (httpx.InvalidURL, ValueError):
        raise BadRequest("the media URL is malformed", code="invalid_url") from None
    if parsed.scheme not in DEFAULT_PORTS or not parsed.host or parsed.userinfo:
        raise BadRequest("the media URL must be plain http(s) without user and password", code="invalid_url")
    return parsed


def _check_allowed(url: httpx.URL, allowed_domains: tuple[str, ...]) -> None:
    """Raise BadRequest unless the URL's domain and port are allowed."""
    host = url.raw_host.decode("ascii").lower().removesuffix(".")
    default = DEFAULT_PORTS[url.scheme]
    port = url.port or default
    for entry in allowed_domains:
        domain, _, entry_port = entry.lower().partition(":")
        matches = host.endswith(domain[1:]) if domain.startswith("*.") else host == domain
        if matches and str(port) == (entry_port or str(default)):
            return
    raise BadRequest(
        "media from this URL's domain are not fetched; send the file as a data: URI, or have the operator add the "
        "domain to --allowed-media-domains (FLASH_ALLOWED_MEDIA_DOMAINS)",
        code="domain_not_allowed",
    )


async def _public_address(url: httpx.URL, allow_private: bool) -> str:
    """Resolve the host once and return an address. Raises BadRequest if any of its addresses is not public."""
    port = url.port or DEFAULT_PORTS[url.scheme]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(url.raw_host.decode("ascii"), port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not (allow_private or all(is_public(address) for address in addresses)):
        raise _not_fetched()
    return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address is public. An IPv4-mapped IPv6 address counts as its IPv4 address, as for sockets;
    other embedded IPv4 addresses are not public."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        if ip.ipv4_mapped is None:
            return ip in _GLOBAL_V6 and not any(ip in network for network in _SPECIAL_V6)
        ip = ip.ipv4_mapped
    return not any(ip in network for network in _SPECIAL_V4)


async def _get(url: httpx.URL, address: str, limits: MediaLimits, count: Callable[[int], None]) -> bytes | str:
    """Send one request to a checked address; return the body, or the URL of a redirect."""
    async with await _client(limits) as client:
        request = client.build_request(
            "GET",
            url.copy_with(host=address, fragment=None),
            headers={"Host": url.netloc.decode("ascii"), "Accept": "image/*, video/*", "Accept-Encoding": "identity"},
            extensions={"sni_hostname": url.raw_host.decode("ascii")},  # the certificate must match this name
        )
        response = await client.send(request, stream=True)
        try:
            if response.status_code in REDIRECTS and "location" in response.headers:
                return response.headers["location"]
            if response.status_code != 200 or response.headers.get("content-encoding", "identity") != "identity":
                raise _not_fetched()
            return await _read(response, limits.max_bytes, count)
        finally:
            await response.aclose()


async def _read(response: httpx.Response, max_bytes: int, count: Callable[[int], None]) -> bytes:
    """Read a response's body. Raises TooLarge."""
    if int(response.headers.get("content-length", 0)) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for piece in response.aiter_raw():
        count(len(piece))
        body += piece
        if len(body) > max_bytes:  # content-length may be missing or wrong
            raise _too_large(max_bytes)
    return bytes(body)


async def _client(limits: MediaLimits) -> httpx.AsyncClient:
    """Return a client for one request: no proxies or keys from the environment, no cookies, no automatic redirects."""
    context = await asyncio.to_thread(_ssl_context)  # reads the certificate file the first time
    return httpx.AsyncClient(
        verify=context, trust_env=False, follow_redirects=False, timeout=httpx.Timeout(limits.fetch_seconds)
    )


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _not_fetched() -> ServiceError:
    return BadRequest("the media URL could not be fetched", code="fetch_failed")


def _too_large(max_bytes: int) -> ServiceError:
    return TooLarge(f"the medium has more than {max_bytes} bytes", code="too_many_bytes")
