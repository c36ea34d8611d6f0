"""Limit request bodies while they arrive: the duration and rate of each, their number, and their bytes in all.

A body that arrives within about a second only has its bytes counted. Once a second all others are checked. One that is
behind the minimum rate by more than the grace is aborted. Where there are too many, of one client or in all, those
furthest behind are aborted first, then the most recent. So slow senders make room for others, even at the same address,
and a new upload is never refused because of them.

Knows nothing of what bodies contain, nor of admission.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect, Request

from service import unknown_fields
from service.compression import Decompressor
from service.errors import ClientLimit, NoCapacity, ServiceError, TooLarge, TooSlow
from service.settings import Settings

PERIOD = 1.0  # seconds between two checks


class Upload:
    """The bytes of one request: its body and what was fetched for it. Exiting the context counts them as freed.

    The context may be entered and left several times."""

    def __init__(self, uploads: Uploads, request: Request, client: str) -> None:
        self.client = client
        self.num_checks = 0
        self.seconds_behind = 0.0  # behind the minimum rate
        self._uploads = uploads
        self._request = request
        self._num_bytes = 0
        self._num_checked = 0  # of those bytes, at the last check
        self._timeout: asyncio.Timeout | None = None
        self._abort_error: ServiceError | None = None

    @property
    def content_type(self) -> str:
        return self._request.headers.get("content-type", "")

    async def read(self, limit: int, feed: Callable[[bytes], object]) -> None:
        """Read the body and pass its pieces, decompressed, to `feed`; `request.state.body_complete` says whether all of
        it has arrived.

        Raises TooLarge beyond `limit` bytes, BadRequest for a body that cannot be decompressed, TooSlow, and
        ClientLimit or NoCapacity where there are too many uploads.
        """
        state = self._request.state
        state.body_complete = False
        decompressor = self._check_head(limit)
        try:
            async with asyncio.timeout(self._uploads.timeout) as self._timeout:
                self._uploads.begin(self)
                while not state.body_complete:
                    message = await self._request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    state.body_complete = not message.get("more_body", False)
                    sent = message.get("body", b"")
                    for piece in decompressor.feed(sent) if decompressor else (sent,):
                        self.count_bytes(len(piece))
                        if self._num_bytes > limit:
                            raise _too_large(limit)
                        feed(piece)
                        if decompressor:
                            await asyncio.sleep(0)  # a few bytes may become very many
                if decompressor:
                    decompressor.finish()
        except TimeoutError:
            raise self._abort_error or TooSlow(f"the body did not arrive within {self._uploads.timeout:g} s") from None
        finally:
            self._uploads.end(self)

    def count_bytes(self, num_bytes: int) -> None:
        """Count bytes that arrived with the request or were fetched for it. Raises NoCapacity."""
        self._num_bytes += num_bytes
        self._uploads.count_bytes(num_bytes)

    def note_ignored(self, names: list[str]) -> None:
        """Log fields of the request that are ignored, and have them named in a header of its response."""
        if names:
            self._request.state.ignored = names
            unknown_fields.warnings.warn(names)

    def check_rate(self, period: float, rate: float) -> None:
        """Update by how many seconds the upload is behind the least rate. Call it once a period.

        period: seconds since the last check; rate: bytes per second that an upload must keep up.
        """
        if self.num_checks:  # the upload may have started at the very end of its first period
            fresh = self._num_bytes - self._num_checked
            self.seconds_behind = max(0.0, self.seconds_behind + period - fresh / rate)
        self.num_checks += 1
        self._num_checked = self._num_bytes

    def abort(self, error: ServiceError) -> None:
        """Make `read` raise this error."""
        if self._abort_error is None and self._timeout is not None and not self._timeout.expired():
            self._abort_error = error
            self._timeout.reschedule(0.0)

    def close(self) -> None:
        """Count the bytes as freed; may be called any number of times."""
        self._uploads.count_bytes(-self._num_bytes)
        self._num_bytes = 0

    def _check_head(self, limit: int) -> Decompressor | None:
        """Return what decompresses the body, None where nothing does. Raises the error that the request's headers alone
        justify."""
        headers = self._request.headers
        encoding = headers.get("content-encoding", "").strip().lower()
        decompressor = None if encoding in ("", "identity") else Decompressor(encoding)
        declared = headers.get("content-length", "")
        if declared.isdecimal():
            if int(declared) > limit:
                raise _too_large(limit)
            self._uploads.check_room(int(declared))
        return decompressor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()


class Uploads:
    """All bodies that are arriving, and the bytes of all that are in memory."""

    def __init__(self, settings: Settings) -> None:
        self.timeout = settings.body_timeout
        self.num_bytes = 0  # of all bodies in memory
        self._min_rate = settings.min_upload_rate
        self._grace = settings.upload_grace
        self._max_uploads = settings.max_uploads
        self._max_per_client = settings.max_uploads_per_client
        self._max_bytes = settings.max_bodies_bytes
        self._arriving: dict[Upload, None] = {}  # in the order of their start
        self._next_check: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Bodies that are arriving."""
        return len(self._arriving)

    def open(self, request: Request, key: str | None) -> Upload:
        return Upload(self, request, client_of(request, key))

    def begin(self, upload: Upload) -> None:
        """Add a body whose reading starts."""
        self._arriving[upload] = None
        if self._next_check is None:
            self._next_check = asyncio.get_running_loop().call_later(PERIOD, self._check_periodically)

    def end(self, upload: Upload) -> None:
        self._arriving.pop(upload, None)

    def check_room(self, num_bytes: int) -> None:
        """Raise NoCapacity unless there is memory for so many bytes more."""
        if self.num_bytes + num_bytes > self._max_bytes:
            raise NoCapacity("the bodies of other requests fill the memory; try again soon", code="bodies_full")

    def count_bytes(self, num_bytes: int) -> None:
        """Count bytes that arrived, or with a negative number were freed. Raises NoCapacity."""
        self.num_bytes += num_bytes
        if num_bytes > 0:
            self.check_room(0)

    def check(self) -> None:
        """Abort uploads that are too slow or too many; called once a period."""
        for upload in self._arriving:
            upload.check_rate(PERIOD, self._min_rate)
            if upload.seconds_behind > self._grace:
                message = f"the body arrives at less than {self._min_rate:g} bytes/s"
                upload.abort(TooSlow(message, code="upload_too_slow"))
        counted = [upload for upload in self._arriving if upload.num_checks > 1]
        by_client: defaultdict[str, list[Upload]] = defaultdict(list)
        for upload in counted:
            by_client[upload.client].append(upload)
        for of_client in by_client.values():
            for upload in _excess(of_client, self._max_per_client):
                message = f"a client may have {self._max_per_client} uploads in progress; wait for one of them to end"
                upload.abort(ClientLimit(message, code="too_many_uploads"))
        for upload in _excess(counted, self._max_uploads):
            upload.abort(NoCapacity("too many uploads are in progress; try again soon", code="uploads_full"))

    def _check_periodically(self) -> None:
        self._next_check = None
        self.check()
        if self._arriving:
            self._next_check = asyncio.get_running_loop().call_later(PERIOD, self._check_periodically)


def _excess(uploads: list[Upload], maximum: int) -> Iterable[Upload]:
    """Return the uploads beyond the maximum: those furthest behind, then the most recent. uploads: oldest first."""
    most_recent_first = reversed(uploads)
    furthest_behind_first = sorted(most_recent_first, key=lambda upload: -upload.seconds_behind)
    return furthest_behind_first[: max(0, len(uploads) - maximum)]


def client_of(request: Request, key: str | None) -> str:
    """Identify the sender: by the API key, else by the address; an IPv6 client has a whole /64."""
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
