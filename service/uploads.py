"""Bodies on their way in: how long each may take and how slow it may be, how many there may be, and their bytes in all.

A body that comes within a second or so is nobody's concern: only its bytes are counted. Once a second all others are
looked at. One that falls behind the least rate by more than the grace is cut. Where there are more than may be, of one
client or in all, those furthest behind are cut, and of those that keep up the youngest. So who sends slowly makes room
for who does not, even at the same address, and a newcomer is never refused for them.

Knows nothing of what bodies say, nor of slots: an upload holds none.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.errors import ClientLimit, NoCapacity, ServiceError, TooLarge, TooSlow, UnsupportedMedia
from service.settings import Settings

PERIOD = 1.0  # seconds between two looks

Result = TypeVar("Result")


class Upload:
    """The body of one request, and what it has fetched, until none of it is in memory any more: a context."""

    def __init__(self, uploads: Uploads, request: Request, client: str) -> None:
        self.client = client
        self.age = 0  # looks that it has seen
        self.seconds_behind = 0.0  # the least rate
        self._uploads = uploads
        self._request = request
        self._num_bytes = 0
        self._num_looked_at = 0  # of those bytes, at the last look
        self._timeout: asyncio.Timeout | None = None
        self._cut: ServiceError | None = None

    @property
    def content_type(self) -> str:
        return self._request.headers.get("content-type", "")

    async def read(self, limit: int, feed: Callable[[bytes], object]) -> None:
        """Give the body to `feed`, piece by piece as it comes; `request.state.body_complete` says whether it all came.

        Raises TooLarge beyond `limit` bytes, TooSlow, and ClientLimit or NoCapacity where others must have its place.
        """
        state = self._request.state
        state.body_complete = False
        self._check_head(limit)
        try:
            async with asyncio.timeout(self._uploads.timeout) as self._timeout:
                self._uploads.begin(self)
                while not state.body_complete:
                    message = await self._request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    state.body_complete = not message.get("more_body", False)
                    piece = message.get("body", b"")
                    self.spend(len(piece))
                    if self._num_bytes > limit:
                        raise _too_large(limit)
                    feed(piece)
        except TimeoutError:
            raise self._cut or TooSlow(f"the body did not arrive within {self._uploads.timeout:g} s") from None
        finally:
            self._uploads.end(self)

    def spend(self, num_bytes: int) -> None:
        """Count bytes that came with it, or that were fetched for it; NoCapacity."""
        self._num_bytes += num_bytes
        self._uploads.spend(num_bytes)

    async def used_by(self, using: Awaitable[Result]) -> Result:
        """What that comes to; then the body is no longer in memory."""
        try:
            return await using
        finally:
            self.close()

    def look(self, period: float, rate: float) -> None:
        if self.age:  # in its first period it may have begun at the end
            fresh = self._num_bytes - self._num_looked_at
            self.seconds_behind = max(0.0, self.seconds_behind + period - fresh / rate)
        self.age += 1
        self._num_looked_at = self._num_bytes

    def cut(self, error: ServiceError) -> None:
        """End its reading with that error."""
        if self._cut is None and self._timeout is not None and not self._timeout.expired():
            self._cut = error
            self._timeout.reschedule(0.0)

    def close(self) -> None:
        """Nothing of it is in memory any more; may be said any number of times."""
        self._uploads.spend(-self._num_bytes)
        self._num_bytes = 0

    def _check_head(self, limit: int) -> None:
        headers = self._request.headers
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMedia(
                f"Content-Encoding {encoding[:32]} is not supported: send the body uncompressed",
                param="content-encoding",
                code="unsupported_encoding",
            )
        declared = headers.get("content-length", "")
        if declared.isdecimal():
            if int(declared) > limit:
                raise _too_large(limit)
            self._uploads.check_room(int(declared))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()


class Uploads:
    def __init__(self, settings: Settings) -> None:
        self.timeout = settings.body_timeout
        self.num_bytes = 0  # of all bodies in memory
        self._rate = settings.min_upload_rate
        self._grace = settings.upload_grace
        self._most = settings.max_uploads
        self._most_per_client = settings.max_uploads_per_client
        self._most_bytes = settings.max_bodies_bytes
        self._reading: dict[Upload, None] = {}  # in the order of their beginning
        self._next_look: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Bodies that are being read."""
        return len(self._reading)

    def open(self, request: Request, key: str | None) -> Upload:
        return Upload(self, request, client_of(request, key))

    def begin(self, upload: Upload) -> None:
        self._reading[upload] = None
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(PERIOD, self._look_and_go_on)

    def end(self, upload: Upload) -> None:
        self._reading.pop(upload, None)

    def check_room(self, num_bytes: int) -> None:
        """Whether that many bytes more may come; NoCapacity."""
        if self.num_bytes + num_bytes > self._most_bytes:
            raise NoCapacity("the bodies of other requests fill the memory; try again soon", code="bodies_full")

    def spend(self, num_bytes: int) -> None:
        """Count bytes that came, or that are gone where the number is negative; NoCapacity."""
        self.num_bytes += num_bytes
        self.check_room(0) if num_bytes > 0 else None

    def look(self) -> None:
        """Once a period: cut who is too slow, and who is one too many."""
        for upload in self._reading:
            upload.look(PERIOD, self._rate)
            if upload.seconds_behind > self._grace:
                upload.cut(TooSlow(f"the body comes at less than {self._rate:g} bytes/s", code="upload_too_slow"))
        counted = [upload for upload in self._reading if upload.age > 1]
        by_client: defaultdict[str, list[Upload]] = defaultdict(list)
        for upload in counted:
            by_client[upload.client].append(upload)
        for of_one in by_client.values():
            for upload in _beyond(self._most_per_client, of_one):
                upload.cut(
                    ClientLimit(
                        f"a client may have {self._most_per_client} uploads under way; wait for one of them to end",
                        code="too_many_uploads",
                    )
                )
        for upload in _beyond(self._most, counted):
            upload.cut(NoCapacity("too many uploads are under way; try again soon", code="uploads_full"))

    def _look_and_go_on(self) -> None:
        self._next_look = None
        self.look()
        if self._reading:
            self._next_look = asyncio.get_running_loop().call_later(PERIOD, self._look_and_go_on)


def _beyond(most: int, uploads: list[Upload]) -> Iterable[Upload]:
    """Those that must go where there may be `most`. `uploads`: in the order of their beginning."""
    youngest_first = reversed(uploads)
    furthest_behind_first = sorted(youngest_first, key=lambda upload: -upload.seconds_behind)
    return furthest_behind_first[: max(0, len(uploads) - most)]


def client_of(request: Request, key: str | None) -> str:
    """Who sends it: the owner of the key, else who is at the address. In IPv6 one client has a whole /64."""
    if key is not None:
        return key
    address = request.client.host if request.client else ""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((ip.packed, 64), strict=False))
    return str(ip if isinstance(ip, ipaddress.IPv4Address) else ip.ipv4_mapped)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes", code="body_too_large")
