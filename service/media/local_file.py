"""Read a `file://` URL, where the operator allows its folder.

A path is decoded, normalised and resolved, links included, before it is compared with the folders. It is then opened
one component after another without following links, so that nobody can exchange a part of it meanwhile. Only regular
files are opened. Outside of the folders every path gets the same error, whether it exists or not.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote_to_bytes

from service.errors import BadRequest, ServiceError, TooLarge
from service.media.limits import MediaLimits

START = re.compile("file:", re.IGNORECASE | re.ASCII)
MAX_PATH = 4096  # bytes, Linux's own limit

_URL = re.compile(r"file:(?://(?P<host>[^/?#\\]*)|(?!//))(?P<path>/[^?#\\]*)\Z", re.IGNORECASE | re.ASCII | re.DOTALL)
_WINDOWS = re.compile(r"file:[/\\]*[a-z](?:[:|]|%3a|%7c)", re.IGNORECASE | re.ASCII)
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# Threads of their own: a file system that hangs must not stop other work. Their number bounds the uncounted memory.
_readers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="file")


async def read(url: str, folders: Sequence[Path], limits: MediaLimits, count: Callable[[int], None]) -> bytes:
    """Return the content of the file that a URL names, at most `max_bytes` and within `fetch_seconds`.

    folders: those below which files may be read; count: called with the number of bytes; may raise. Raises BadRequest
    and TooLarge.
    """
    if not folders:
        raise BadRequest(
            "file:// URLs are not read; send the file as a data: URI, or have the operator allow its folder with "
            "--allowed-media-path (FLASH_ALLOWED_MEDIA_PATH)",
            code="file_not_allowed",
        )
    path = path_of(url)
    try:
        async with asyncio.timeout(limits.fetch_seconds):
            loop = asyncio.get_running_loop()
            data = await loop.run_in_executor(_readers, _read_below, path, tuple(folders), limits.max_bytes)
    except TimeoutError:
        raise BadRequest("the file:// URL took too long to read", code="fetch_timeout") from None
    count(len(data))
    return data


def path_of(url: str) -> bytes:
    """Return the normalised absolute path of a URL: file:///path, file://localhost/path or file:/path.

    Raises BadRequest that says what is wrong.
    """
    if _WINDOWS.match(url):
        raise _malformed("has a Windows path; the server reads paths such as file:///folder/name.png")
    found = _URL.match(url)
    if found is None:
        raise _malformed(r"must look like file:///folder/name.png, with ?, # and \ in a name as %3F, %23 and %5C")
    if (found["host"] or "localhost").lower() != "localhost":
        raise _malformed("names another machine; only files of the server itself are read: file:///folder/name.png")
    path = unquote_to_bytes(found["path"].encode(errors="replace"))
    if b"\0" in path or len(path) > MAX_PATH:
        raise _malformed(f"must have at most {MAX_PATH} bytes, and none of them may be 0")
    return posixpath.normpath(b"/" + path.lstrip(b"/"))


def _read_below(path: bytes, folders: Sequence[Path], max_bytes: int) -> bytes:
    """Read a regular file below one of the folders. A path that is not written as one below them touches no disk."""
    roots = {os.path.abspath(folder): os.path.realpath(folder) for folder in map(os.fsencode, folders)}
    if any(_is_below(path, root) for root in (*roots, *roots.values())):
        real = os.path.realpath(path)
        for root in roots.values():
            if _is_below(real, root):
                try:
                    return _read_regular(root, real[len(root) + 1 :].split(b"/"), max_bytes)
                except OSError:
                    raise _not_read() from None
    raise BadRequest(
        "this file is not read; only files below the folders of --allowed-media-path are", code="file_not_allowed"
    )


def _is_below(path: bytes, root: bytes) -> bool:
    return path.startswith(root + b"/")


def _read_regular(root: bytes, names: list[bytes], max_bytes: int) -> bytes:
    """Open a file component by component and read it. Raises OSError for a link, and where there is none."""
    with ExitStack() as opened:

        def enter(descriptor: int) -> int:
            opened.callback(os.close, descriptor)
            return descriptor

        folder = enter(os.open(root, _FOLDER_FLAGS))
        for name in names[:-1]:
            folder = enter(os.open(name, _FOLDER_FLAGS, dir_fd=folder))
        # Looked at before it is opened, since opening a device may already do something.
        _check_regular(os.stat(names[-1], dir_fd=folder, follow_symlinks=False), max_bytes)
        descriptor = enter(os.open(names[-1], _FILE_FLAGS, dir_fd=folder))
        _check_regular(os.fstat(descriptor), max_bytes)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    if len(data) > max_bytes:  # it has grown
        raise _too_large(max_bytes)
    return data


def _check_regular(status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _not_read()
    if status.st_size > max_bytes:
        raise _too_large(max_bytes)


def _malformed(problem: str) -> ServiceError:
    return BadRequest(f"the file:// URL {problem}", code="invalid_url")


def _not_read() -> ServiceError:
    return BadRequest(
        "the file:// URL could not be read: at this path there is no file that the service may read",
        code="file_not_read",
    )


def _too_large(max_bytes: int) -> ServiceError:
    return TooLarge(f"the file has more than {max_bytes} bytes", code="too_many_bytes")
