"""Children that hang, die or are left alone: only their own request notices, and nothing is left behind."""

from __future__ import annotations

import _ctypes
import asyncio
import contextlib
import gc
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import anyio
import psutil
import pytest

from service.errors import BadRequest, NoCapacity
from service.media import MediaDecoder, MediaLimits
from tests.media.samples import SQUARE, endless_gif, image_bytes

pytestmark = pytest.mark.anyio

PNG = image_bytes("PNG")
LONG_VIDEO = endless_gif(1000)


@contextlib.asynccontextmanager
async def started(limits: MediaLimits | None = None, workers: int = 1):
    decoder = MediaDecoder(limits or MediaLimits(max_frames=1000), SQUARE, workers=workers)
    await decoder.start()
    try:
        yield decoder
    finally:
        await decoder.close()


async def image(decoder: MediaDecoder):
    return await decoder.decode(PNG, kind="image", num_frames=None, fps=None)


def long_job(decoder: MediaDecoder) -> asyncio.Task:
    """Many seconds of work for a child."""
    return asyncio.create_task(decoder.decode(LONG_VIDEO, kind="video", num_frames=1000, fps=None))


async def until_busy(decoder: MediaDecoder) -> int:
    """The process id of the single child, once it is truly decoding."""
    (pid,) = decoder.stats.children
    child = psutil.Process(pid)
    before = sum(child.cpu_times()[:2])
    async with asyncio.timeout(10):
        while sum(child.cpu_times()[:2]) < before + 0.1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return pid


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


START = """
import asyncio
from service.media import MediaDecoder, MediaLimits
from tests.media.samples import SQUARE

async def start():
    decoder = MediaDecoder(MediaLimits(), SQUARE, workers=1)
    await decoder.start()
    await decoder.close()

asyncio.run(start())
"""


async def test_nothing_that_decoders_print_is_heard():
    """On the terminal of whoever runs a command it looks as if something were broken."""
    # Into pipes: children may write to no file.
    done = await anyio.run_process([sys.executable, "-c", START], cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == (b"", b"")


async def test_a_child_serves_many_and_is_then_replaced():
    async with started(MediaLimits(decodes_per_child=5)) as decoder:
        (first,) = decoder.stats.children
        for _ in range(5):
            assert decoder.stats.children == (first,)
            await image(decoder)
        await until(lambda: decoder.stats.idle == 1)
        assert decoder.stats.children_started == 2
        assert not psutil.pid_exists(first)
        await image(decoder)
        assert decoder.stats.decoded == 6


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGXCPU])
async def test_a_child_that_crashes_at_work_fails_its_own_request_only(number):
    async with started(workers=1) as decoder:
        job, waiting = long_job(decoder), asyncio.create_task(image(decoder))
        os.kill(await until_busy(decoder), number)
        with pytest.raises(BadRequest, match="could not be decoded"):
            await job
        assert (await waiting).frames.shape == (1, 32, 32, 3)


async def test_a_file_whose_child_is_killed_has_a_second_child_and_no_third():
    """The kernel, short of memory, may have meant another; or this file was the reason."""
    async with started(workers=1) as decoder:
        job = long_job(decoder)
        first = await until_busy(decoder)
        os.kill(first, signal.SIGKILL)
        assert (await job).frames.shape[0] > 1
        job = long_job(decoder)
        os.kill(await until_busy(decoder), signal.SIGKILL)
        await until(lambda: decoder.stats.children_started == 3)
        os.kill(await until_busy(decoder), signal.SIGKILL)
        with pytest.raises(BadRequest, match="could not be decoded"):
            await job
        await image(decoder)


async def test_an_idle_child_that_died_costs_nobody_anything():
    async with started() as decoder:
        for _ in range(3):
            (pid,) = decoder.stats.children
            os.kill(pid, signal.SIGKILL)
            await image(decoder)


async def test_a_hanging_child_is_killed_in_time():
    async with started(MediaLimits(decode_seconds=0.5)) as decoder:
        (pid,) = decoder.stats.children
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(BadRequest, match="longer"):
            await image(decoder)
        assert time.monotonic() - start < 3
        await image(decoder)
        assert not psutil.pid_exists(pid)


async def test_processor_time_is_bounded():
    """The wall clock is generous here; it is the kernel that stops the child, a second or two into its work."""
    async with started(MediaLimits(cpu_seconds=1, decode_seconds=60.0, max_frames=1000)) as decoder:
        (pid,) = decoder.stats.children
        with pytest.raises(BadRequest, match="could not be decoded"):
            await decoder.decode(LONG_VIDEO, kind="video", num_frames=1000, fps=None)
        await image(decoder)
        assert not psutil.pid_exists(pid)


async def test_a_client_that_leaves_frees_its_child():
    async with started() as decoder:
        job = long_job(decoder)
        pid = await until_busy(decoder)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await image(decoder)
        assert not psutil.pid_exists(pid)
        assert decoder.stats.children_started == 2


async def test_clients_that_leave_at_any_moment_leave_nothing():
    async with started(workers=2) as decoder:
        for step in range(30):
            jobs = [asyncio.create_task(image(decoder)) for _ in range(4)]
            await asyncio.sleep(step * 0.0003)
            for job in jobs[:3]:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            assert jobs[3].result().frames.shape == (1, 32, 32, 3)
        await until(lambda: decoder.stats.idle == 2)
        assert len(decoder.stats.children) == 2


async def test_close_leaves_no_child_and_no_file_descriptor():
    async with started():  # the first use opens things that stay, such as the loop's own pipes
        pass
    fds, children = len(os.listdir("/proc/self/fd")), psutil.Process().children(recursive=True)
    async with started(workers=3) as decoder:
        await asyncio.gather(*(image(decoder) for _ in range(9)), return_exceptions=True)
        with pytest.raises(BadRequest):
            await decoder.decode(PNG[:100], kind="image", num_frames=None, fps=None)
        pids = decoder.stats.children
    assert len(pids) == 3 or len(pids) == 2  # one may be on its way
    assert decoder.stats.children == ()
    assert psutil.Process().children(recursive=True) == children
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == fds


async def test_close_answers_those_at_work_and_those_in_the_queue():
    before = psutil.Process().children()  # other tests' servers may be among them
    decoder = MediaDecoder(MediaLimits(max_frames=1000), SQUARE, workers=1)
    await decoder.start()
    jobs = [long_job(decoder), *(asyncio.create_task(image(decoder)) for _ in range(5))]
    await until_busy(decoder)
    async with asyncio.timeout(5):
        await decoder.close()
        results = await asyncio.gather(*jobs, return_exceptions=True)
    assert [type(result) for result in results] == [NoCapacity] * 6
    with pytest.raises(NoCapacity):
        await image(decoder)
    await decoder.close()  # twice is no harm
    assert psutil.Process().children() == before


async def test_close_while_a_child_is_starting():
    before = psutil.Process().children()
    async with started() as decoder:
        with pytest.raises(BadRequest):
            await decoder.decode(PNG[:100], kind="image", num_frames=None, fps=None)
    assert psutil.Process().children() == before


async def test_without_children_to_be_had_the_answer_is_503(monkeypatch):
    async with started() as decoder:
        real = sys.executable
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(BadRequest):
            await decoder.decode(PNG[:100], kind="image", num_frames=None, fps=None)
        with pytest.raises(NoCapacity):
            await image(decoder)
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(NoCapacity):
            await image(decoder)
        monkeypatch.setattr(sys, "executable", real)
        await image(decoder)
        broken = MediaDecoder(MediaLimits(), SQUARE)
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(RuntimeError, match="do not start"):
            await broken.start()


async def test_the_loop_stays_free_while_large_files_pass_through():
    """/livez must answer while media are decoded: 32 MiB in, 64 frames out."""
    worst = 0.0
    gc.collect()
    gc.freeze()  # what other tests left in this process is not to be searched for garbage meanwhile

    async def watch() -> None:
        nonlocal worst
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.005)
            worst = max(worst, time.monotonic() - start - 0.005)

    async with started() as decoder:
        watcher = asyncio.create_task(watch())
        bmp = image_bytes("BMP", (4000, 2700))
        for _ in range(3):
            await decoder.decode(bmp, kind="image", num_frames=None, fps=None)
        await decoder.decode(endless_gif(100), kind="video", num_frames=64, fps=None)
        watcher.cancel()
    gc.unfreeze()
    assert worst < 0.1


def proc_files(pid: int) -> list[str]:
    return [Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "maps", "environ")]


async def test_a_child_can_do_nothing_but_decode(monkeypatch):
    monkeypatch.setenv("FLASH_API_KEY", "secret")
    async with started() as decoder:
        (pid,) = decoder.stats.children
        await image(decoder)
        child = psutil.Process(pid)
        assert child.rlimit(psutil.RLIMIT_NOFILE) == (0, 0), "no file, socket or pipe can be opened any more"
        assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert child.rlimit(psutil.RLIMIT_AS)[1] == decoder.limits.memory_bytes
        texts = proc_files(pid)
        assert "NoNewPrivs:\t1" in texts[0]
        assert "torch" not in texts[1]
        assert "secret" not in texts[2]
        assert os.getsid(pid) == pid
        links = sorted(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
        assert all(link.startswith("socket:") or link == "/dev/null" for link in links), links


async def test_cuda_libraries_beside_decord_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """decord loads all that pip installed of CUDA: with torch for CUDA no child would start within its memory."""
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcublas.so"
    library.parent.mkdir(parents=True)
    shutil.copy(_ctypes.__file__, library)
    monkeypatch.setattr("service.media.process._environment", lambda: os.environ | {"PYTHONPATH": str(tmp_path)})
    asks = f"import sys; sys.path.append({str(tmp_path)!r}); import decord; print(open('/proc/self/maps').read())"
    alone = await anyio.run_process([sys.executable, "-c", asks])
    assert str(library) in alone.stdout.decode(), "decord loads it no more: nothing is to be done about it"
    async with started() as decoder:
        (pid,) = decoder.stats.children
        assert str(library) not in await anyio.Path(f"/proc/{pid}/maps").read_text()
        await image(decoder)
