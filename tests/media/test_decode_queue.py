"""Who decodes next: by size, arrival and client, in lanes of which some are for small pictures only."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from service.errors import NoCapacity
from service.media.decode_queue import DecodeQueue, lanes
from service.media.sniff import Kind

pytestmark = pytest.mark.anyio

KINDS: tuple[Kind, ...] = ("image", "video")


class Crowd:
    """Tasks that queue for a lane; `order` has their names as they were let in."""

    def __init__(self, num_image: int = 1, num_video: int = 0, *, patience: float = 100.0, max_waiting: int = 100):
        self.queue = DecodeQueue(lanes(num_image, num_video), patience=patience, max_waiting=max_waiting)
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def enter(self, name: str, share: float = 0.5, kind: Kind = "image", client: str | None = None) -> None:
        self._ends[name] = asyncio.Event()

        async def stay() -> None:
            async with self.queue.lane(kind, share, name if client is None else client):
                self.order.append(name)
                await self._ends[name].wait()

        self.tasks[name] = asyncio.create_task(stay())
        await self.settle()

    async def leave(self, name: str) -> None:
        self._ends[name].set()
        await self.settle()

    async def leave_all(self) -> list[str]:
        """Each as soon as it is in; the order."""
        for end in self._ends.values():
            end.set()
        await self.settle()
        return self.order

    @staticmethod
    async def settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0)


async def test_equal_ones_are_served_as_they_came():
    crowd = Crowd()
    for name in "abcd":
        await crowd.enter(name)
    assert await crowd.leave_all() == ["a", "b", "c", "d"]


async def test_small_ones_overtake_large_ones():
    crowd = Crowd()
    for name, share in (("first", 0.9), ("large", 0.9), ("medium", 0.3), ("small", 0.01)):
        await crowd.enter(name, share)
    assert await crowd.leave_all() == ["first", "small", "medium", "large"]


async def test_a_large_one_is_not_overtaken_by_those_that_come_long_after_it():
    crowd = Crowd(patience=0.2)
    await crowd.enter("first")
    await crowd.enter("large", 0.5)  # as if it had come 0.1 s later than it did
    await asyncio.sleep(0.12)
    await crowd.enter("small", 0.01)
    assert await crowd.leave_all() == ["first", "large", "small"]


async def test_one_client_with_many_waits_for_another_with_few():
    crowd = Crowd()
    for index in range(8):
        await crowd.enter(f"greedy {index}", client="greedy")
    await crowd.enter("modest 0", client="modest")
    await crowd.enter("modest 1", client="modest")
    order = await crowd.leave_all()
    assert order[:4] == ["greedy 0", "modest 0", "greedy 1", "modest 1"]
    await crowd.enter("greedy again", client="greedy")  # what is done counts no more
    assert crowd.queue._by_client == {"greedy": 1}


async def test_a_small_one_goes_first_even_from_a_client_with_many():
    """All clients behind one proxy look like one."""
    crowd = Crowd()
    for index in range(50):
        await crowd.enter(f"slow {index}", 0.8, client="proxy")
    await crowd.enter("good", 0.002, client="proxy")
    assert (await crowd.leave_all())[1] == "good"


async def test_large_pictures_leave_places_for_smaller_ones():
    crowd = Crowd(num_image=3)
    for index in range(5):
        await crowd.enter(f"large {index}", 0.9)
    assert crowd.order == ["large 0"]
    for index in range(5):
        await crowd.enter(f"medium {index}", 0.2)
    assert crowd.order == ["large 0", "medium 0"]
    await crowd.enter("small", 0.05)
    assert crowd.order == ["large 0", "medium 0", "small"]
    await crowd.leave("small")
    await crowd.enter("next", 0.05)
    assert crowd.order[3:] == ["next"]
    await crowd.enter("last", 0.05)
    await crowd.leave("large 0")  # a lane for all sizes: for the first in order
    assert crowd.order[4:] == ["last"]


async def test_a_small_one_takes_the_narrowest_place():
    crowd = Crowd(num_image=3)
    await crowd.enter("small", 0.01)
    await crowd.enter("medium", 0.2)
    await crowd.enter("large", 1.0)
    assert crowd.order == ["small", "medium", "large"]


@pytest.mark.parametrize(
    ("num_image", "shares"),
    [(1, [1.0]), (2, [1.0, 0.25]), (3, [1.0, 0.25, 0.0625]), (5, [1.0, 1.0, 1.0, 0.25, 0.0625])],
)
async def test_how_many_places_take_what(num_image, shares):
    assert [lane.max_share for lane in lanes(num_image, 2) if "image" in lane.kinds] == shares
    assert [lane.max_share for lane in lanes(num_image, 2) if "video" in lane.kinds] == [1.0, 1.0]
    assert all(lane.kinds == {"image", "video"} for lane in lanes(num_image, 0))


async def test_videos_and_pictures_wait_in_lines_of_their_own():
    crowd = Crowd(num_image=1, num_video=1)
    for index in range(3):
        await crowd.enter(f"video {index}", kind="video")
    await crowd.enter("image 0")
    await crowd.enter("image 1")
    assert crowd.order == ["video 0", "image 0"]
    await crowd.leave("image 0")
    assert crowd.order == ["video 0", "image 0", "image 1"]
    await crowd.leave("video 0")
    assert crowd.order[3:] == ["video 1"]


async def test_when_too_many_wait_the_last_in_order_is_refused():
    crowd = Crowd(max_waiting=2)
    for name, share in (("first", 0.5), ("large", 0.9), ("medium", 0.5), ("small", 0.1)):
        await crowd.enter(name, share)
    with pytest.raises(NoCapacity) as error:
        await crowd.tasks["large"]
    assert error.value.code == "queue_full"
    await crowd.enter("larger", 1.0)
    with pytest.raises(NoCapacity):
        await crowd.tasks["larger"]
    assert await crowd.leave_all() == ["first", "small", "medium"]


async def test_who_waits_too_long_is_refused_and_the_others_are_not():
    crowd = Crowd(patience=0.05)
    await crowd.enter("first")
    await crowd.enter("late")
    with pytest.raises(NoCapacity):
        await crowd.tasks["late"]
    assert crowd.queue.num_waiting == 0
    await crowd.enter("next")
    assert await crowd.leave_all() == ["first", "next"]


async def test_at_the_end_everybody_who_waits_is_refused():
    crowd = Crowd()
    for name in "abc":
        await crowd.enter(name)
    crowd.tasks["b"].cancel()
    crowd.queue.refuse_all(lambda: NoCapacity("over"))
    await crowd.settle()
    assert isinstance(crowd.tasks["c"].exception(), NoCapacity)
    assert crowd.tasks["b"].cancelled()
    assert await crowd.leave_all() == ["a"]


async def test_clients_that_leave_at_any_moment_leave_nothing():
    """A thousand random arrivals, departures and cancellations: no lane is lost, and none is given twice."""
    rng = random.Random(3)
    queue = DecodeQueue(lanes(3, 1), patience=5.0, max_waiting=30)
    inside: dict[str, int] = {"image": 0, "video": 0}

    async def visit(kind: Kind, share: float, steps: int) -> None:
        async with queue.lane(kind, share, rng.choice("xyz")):
            inside[kind] += 1
            assert inside["image"] <= 3
            assert inside["video"] <= 1
            try:
                for _ in range(steps):
                    await asyncio.sleep(0)
            finally:
                inside[kind] -= 1

    tasks = []
    for _ in range(1000):
        tasks.append(asyncio.create_task(visit(rng.choice(KINDS), rng.random() ** 3, rng.randrange(5))))
        if rng.random() < 0.5:
            rng.choice(tasks).cancel()
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError, NoCapacity}
    assert queue.num_waiting == 0
    assert not queue._by_client
    async with contextlib.AsyncExitStack() as stack:
        for share in (1.0, 0.25, 0.01):
            await asyncio.wait_for(stack.enter_async_context(queue.lane("image", share)), 1)
        await asyncio.wait_for(stack.enter_async_context(queue.lane("video", 1.0)), 1)
