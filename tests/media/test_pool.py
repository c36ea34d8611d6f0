"""Children that hang, die or are left alone: only their own request notices, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from PIL import Image

from service.errors import BadRequest, NoCapacity
from service.media import MediaDecoder, MediaLimits
from tests.media.samples import SQUARE, audio_only_mp4, encoded, endless_gif, image_bytes, picture

pytestmark = pytest.mark.anyio

PNG = image_bytes("PNG")
LONG_VIDEO = endless_gif(1000)
PATIENT = MediaLimits(max_frames=1000, decode_seconds=120.0, cpu_seconds=120)  # also on a machine with other work


@contextlib.asynccontextmanager
async def started(limits: MediaLimits | None = None, workers: int = 1, **more: Any):
    decoder = MediaDecoder(limits or PATIENT, SQUARE, workers=workers, **more)
    await decoder.start()
    try:
        yield decoder
    finally:
        await decoder.close()


async def image(decoder: MediaDecoder, data: bytes = PNG):
    return await decoder.decode(data, kind="image", num_frames=None, fps=None)


def long_job(decoder: MediaDecoder, data: bytes = LONG_VIDEO) -> asyncio.Task:
    """Many seconds of work for a child."""
    return asyncio.create_task(decoder.decode(data, kind="video", num_frames=1000, fps=None))


def cpu_seconds(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(psutil.Process(pid).cpu_times()[:2])
    return 0.0


async def until_busy(decoder: MediaDecoder) -> int:
    """The process id of the first child that is truly decoding."""
    before = {pid: cpu_seconds(pid) for pid in decoder.stats.children}
    async with asyncio.timeout(20):
        while True:
            for pid in before:
                if cpu_seconds(pid) > before[pid] + 0.1:
                    return pid
            await asyncio.sleep(0.01)


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


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGILL])
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
        job = long_job(decoder, endless_gif(100))
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
    """The wall clock is generous here; a video is stopped between two frames, which costs no child."""
    async with started(MediaLimits(cpu_seconds=1, decode_seconds=60.0, max_frames=1000)) as decoder:
        children = decoder.stats.children
        with pytest.raises(BadRequest, match="longer to decode"):
            await decoder.decode(LONG_VIDEO, kind="video", num_frames=1000, fps=None)
        await image(decoder)
        assert decoder.stats.children == children


async def test_processor_time_is_bounded_inside_of_a_decoder_too():
    """The kernel stops the child in the middle of a picture."""
    async with started(MediaLimits(image_seconds=0.05, decode_seconds=60.0)) as decoder:
        (pid,) = decoder.stats.children
        with pytest.raises(BadRequest, match="longer to decode"):
            await image(decoder, encoded(Image.new("RGB", (6000, 6000)), "PNG", compress_level=1))
        assert not psutil.pid_exists(pid)


# Files as they are cut short, damaged and made up: an error of each kind of decoder.
BROKEN = {
    "png cut": PNG[:100],
    "png checksum": PNG[:-30] + b"\0" + PNG[-29:],
    "jpeg cut": image_bytes("JPEG", (64, 48))[:300],
    "webp noise": image_bytes("WEBP")[:40] + bytes(range(256)),
    "gif cut": image_bytes("GIF")[:200],
    "bmp cut": image_bytes("BMP")[:200],
    "no video": audio_only_mp4(),
    "avi cut": b"RIFF\x04\0\0\0AVI ",
    "webm cut": b"\x1a\x45\xdf\xa3",
}


async def test_a_broken_file_costs_no_child():
    """A start takes a second or two of a small machine: a broken picture of 1 kB was as dear as a video."""
    async with started() as decoder:
        children = decoder.stats.children
        for data in BROKEN.values():
            with pytest.raises(BadRequest, match="could not be decoded|has no video"):
                await decoder.decode(data, kind=None, num_frames=None, fps=None)
            assert (await image(decoder)).frames.shape == (1, 32, 32, 3)
        assert decoder.stats.children == children
        assert decoder.stats.refused == len(BROKEN)


async def test_after_broken_files_pictures_and_videos_are_decoded_as_ever():
    video = endless_gif(20)
    async with started() as decoder:
        image_before = (await image(decoder)).frames
        video_before = (await decoder.decode(video, kind="video", num_frames=4, fps=None)).frames
        for data in list(BROKEN.values()) * 5:
            with pytest.raises(BadRequest):
                await decoder.decode(data, kind=None, num_frames=None, fps=None)
        assert ((await image(decoder)).frames == image_before).all()
        assert ((await decoder.decode(video, kind="video", num_frames=4, fps=None)).frames == video_before).all()
        assert decoder.stats.children_started == 1


async def test_a_child_is_replaced_after_as_many_broken_files_too():
    async with started(MediaLimits(decodes_per_child=3)) as decoder:
        for _ in range(3):
            with pytest.raises(BadRequest):
                await decoder.decode(PNG[:100], kind="image", num_frames=None, fps=None)
        await until(lambda: decoder.stats.idle == 1)
        assert decoder.stats.children_started == 2


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
async def test_a_spare_child_takes_the_place_of_one_that_died_at_work(monkeypatch, number):
    """The next file finds a warm child, though no other could start. A job whose child was killed goes on in it."""
    async with started(spares=1) as decoder:
        job = long_job(decoder, endless_gif(100))
        busy = await until_busy(decoder)
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            os.kill(busy, number)
            await asyncio.wait([job])
            assert isinstance(job.exception(), BadRequest) == (number == signal.SIGSEGV)
            assert (await image(decoder)).frames.shape == (1, 32, 32, 3)
            assert decoder.stats.children_started == 2
        async with asyncio.timeout(20):
            while decoder.stats.idle < 2:  # each file that is decoded has what is missing started
                await image(decoder)
                await asyncio.sleep(0.1)


async def test_an_idle_child_that_died_is_not_waited_for(monkeypatch):
    async with started(spares=1) as decoder:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        os.kill(decoder.stats.children[0], signal.SIGKILL)
        await until(lambda: len(decoder.stats.children) == 1)
        await image(decoder)


async def test_videos_do_not_delay_pictures():
    async with started(video_workers=1, spares=1) as decoder:
        videos = [long_job(decoder) for _ in range(3)]
        for _ in range(20):
            await image(decoder)
        assert not any(video.done() for video in videos)
        assert decoder.stats.waiting == 2
        assert decoder.stats.children_started == 3
        for video in videos:
            video.cancel()
        await asyncio.gather(*videos, return_exceptions=True)


def slow_pictures() -> list[bytes]:
    """Valid ones: hundreds of milliseconds of a child each."""
    plain = Image.new("RGB", (4000, 4000), (9, 99, 199))  # more than a quarter of the pixels allowed
    return [
        encoded(plain, "JPEG", progressive=True, quality=95, subsampling=0),
        encoded(plain, "WEBP", lossless=True, quality=0, method=0),
        encoded(plain.convert("RGBA"), "PNG", compress_level=1),
        encoded(plain.convert("P"), "GIF"),
    ]


async def test_a_small_picture_is_served_beside_eight_clients_that_send_slow_ones_without_pause():
    """Three at most of theirs are decoded while it waits for none of them."""
    slow = slow_pictures()
    async with started(MediaLimits(), workers=3, spares=1) as decoder:
        done = 0

        async def flood(index: int) -> None:
            nonlocal done
            while True:
                await decoder.decode(slow[index % len(slow)], kind="image", num_frames=None, fps=None)
                done += 1

        clients = [asyncio.create_task(flood(index)) for index in range(8)]
        await until(lambda: decoder.stats.waiting == 7)  # one of the largest at a time
        small = [PNG, image_bytes("JPEG", (640, 480)), BROKEN["png cut"], encoded(picture(800, 600), "WEBP")]
        for _ in range(4):
            for data in small:
                before = done
                with contextlib.suppress(BadRequest):
                    await decoder.decode(data, kind="image", num_frames=None, fps=None)
                assert done - before <= 1, "it waited for the slow ones"
        before = done
        await until(lambda: done > before)  # and they are served too
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def test_a_small_picture_is_served_beside_eight_clients_that_send_broken_ones_without_pause():
    async with started(MediaLimits(decodes_per_child=100_000), workers=3, spares=1) as decoder:

        async def flood(data: bytes) -> None:
            while True:
                with pytest.raises(BadRequest):
                    await decoder.decode(data, kind=None, num_frames=None, fps=None)

        clients = [asyncio.create_task(flood(data)) for data in list(BROKEN.values())[:8]]
        children = decoder.stats.children
        async with asyncio.timeout(60):  # alone they take less than one second; test_turns.py has the order itself
            for _ in range(50):
                await image(decoder)
        assert decoder.stats.refused >= 50, "the others were served meanwhile"
        assert decoder.stats.children == children
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def test_a_picture_may_use_processor_time_in_proportion_to_its_size():
    """One that is slower than its header says keeps a place of the small ones for an eighth of the time at most."""
    slow = encoded(picture(2000, 1500), "WEBP", quality=95, method=0)
    async with started(MediaLimits(image_seconds=0.2)) as decoder:
        assert decoder._cpu_seconds("image", 1.0) == 0.2
        assert decoder._cpu_seconds("image", 0.5) == 0.1
        with pytest.raises(BadRequest, match="longer to decode"):
            await decoder.decode(slow, kind="image", num_frames=None, fps=None)
        await image(decoder)
        assert decoder.stats.children_started == 2
    async with started(MediaLimits(image_seconds=200.0)) as decoder:
        await decoder.decode(slow, kind="image", num_frames=None, fps=None)


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
    async with started(MediaLimits(decodes_per_child=1)) as decoder:
        await image(decoder)
        assert decoder.stats.idle == 0
    assert psutil.Process().children() == before


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.1])
async def test_a_start_that_is_cancelled_leaves_no_child(seconds):
    before = psutil.Process().children()
    start = asyncio.create_task(MediaDecoder(MediaLimits(), SQUARE, workers=2, spares=1).start())
    await asyncio.sleep(seconds)
    start.cancel()
    await asyncio.wait([start])
    assert psutil.Process().children() == before


async def test_without_children_to_be_had_the_answer_is_503(monkeypatch):
    async with started() as decoder:
        real = sys.executable
        monkeypatch.setattr(sys, "executable", "/bin/false")
        os.kill(decoder.stats.children[0], signal.SIGKILL)
        await until(lambda: not decoder.stats.children)
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


@pytest.mark.alone
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
