"""Small parts without processes: replayed streams, slots, settings, seeds, the rate gauge, messages."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from model.request import (
    EngineStats,
    Medium,
    Message,
    RequestOutput,
    RequestStats,
    SamplingParams,
    Token,
    VideoMetadata,
)
from service.admission import Admission
from service.cli import with_settings_options
from service.errors import ClientLimit, EngineFailure, NoCapacity, ServiceError
from service.metrics import Metrics
from service.pool import messages as m
from service.pool.arena import Arena, ArenaReader
from service.pool.generation import Event, Generation
from service.schemas.sampling import seed_of_choice
from service.settings import Settings, error_messages

# -- replay


def output(ids: list[int], text: str | None = None, finish: Any = None) -> RequestOutput:
    tokens = tuple(Token(i, f"t{i} ", "target") for i in ids)
    said = "".join(token.text for token in tokens) if text is None else text
    return RequestOutput("r", said, tokens, finish, RequestStats(1, 9, 0, 0, 0, 0, 0, 0) if finish else None)


@pytest.fixture
def delivered() -> list[Event]:
    return []


@pytest.fixture
def generation(delivered: list[Event]) -> Generation:
    generation = Generation(m.Submit("r", (), SamplingParams(), True), delivered.append)
    generation.begin_attempt()
    return generation


@pytest.mark.parametrize("chunks", [[[1, 2, 3, 4, 5, 6]], [[1], [2], [3], [4], [5], [6]], [[1, 2], [3, 4, 5], [6]]])
def test_a_replay_in_other_pieces_goes_on_where_the_stream_was(
    generation: Generation, delivered: list[Event], chunks: list[list[int]]
) -> None:
    generation.feed(output([1, 2, 3]))
    generation.feed(output([4]))
    generation.begin_attempt()
    for chunk in chunks:
        generation.feed(output(chunk))
    generation.feed(output([7], finish="stop"))
    outputs = [event for event in delivered if isinstance(event, RequestOutput)]
    assert [token.id for one in outputs for token in one.tokens] == [1, 2, 3, 4, 5, 6, 7]
    assert "".join(one.text for one in outputs) == generation.text == "t1 t2 t3 t4 t5 t6 t7 "
    assert all(one.tokens or one.text for one in outputs)
    assert generation.finished


def test_text_held_back_at_the_death_is_neither_lost_nor_doubled(
    generation: Generation, delivered: list[Event]
) -> None:
    """Text and tokens do not keep step: the text of a token may come later, or with another one's."""
    generation.feed(output([1, 2], text="t1 "))
    generation.begin_attempt()
    generation.feed(output([1], text=""))
    generation.feed(output([2, 3], text="t1 t2 t3 "))
    outputs = [event for event in delivered if isinstance(event, RequestOutput)]
    assert [one.text for one in outputs] == ["t1 ", "t2 t3 "]
    assert [token.id for one in outputs for token in one.tokens] == [1, 2, 3]


@pytest.mark.parametrize("replay", [output([1, 9]), output([1, 2], text="tX t2 ")])
def test_a_replay_that_differs_ends_with_an_error(
    generation: Generation, delivered: list[Event], replay: RequestOutput
) -> None:
    generation.feed(output([1, 2, 3]))
    generation.begin_attempt()
    generation.feed(replay)
    generation.feed(output([3, 4]))
    assert isinstance(delivered[-1], EngineFailure)
    assert len(delivered) == 2, "after an error nothing more is said"


# -- admission


def test_slots_are_counted_for_all_and_for_each_key() -> None:
    closed: list[NoCapacity] = []
    admission = Admission(lambda: 4, lambda: closed[0] if closed else None, per_key=2)
    first = admission.enter("a")
    first.add(2)
    with pytest.raises(ClientLimit):
        admission.enter("a")
    others = [admission.enter(None), admission.enter("b"), admission.enter(None)]
    assert admission.in_use == 2, "at the door nothing is taken"
    for other in others[:2]:
        other.add(1)
    with pytest.raises(NoCapacity) as full:
        admission.enter("c")
    with pytest.raises(NoCapacity):
        others[2].add(1)
    assert (full.value.code, admission.in_use) == ("queue_full", 4)
    first.release(1)
    first.leave()
    first.leave()
    assert admission.in_use == 2
    closed.append(NoCapacity("draining", retry_after=7))
    with pytest.raises(NoCapacity) as draining:
        admission.enter("a")
    assert draining.value.headers() == {"Retry-After": "7"}
    others[2].add(1)  # it was inside before: it may stay


def test_the_house_is_empty_when_nobody_uploads_either() -> None:
    async def test() -> None:
        admission = Admission(lambda: 4, lambda: None, per_key=None)
        await admission.wait_until_empty()
        uploading, running = admission.enter(None), admission.enter(None)
        running.add(1)
        running.leave()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(admission.wait_until_empty(), 0.01)
        uploading.leave()
        await admission.wait_until_empty()

    asyncio.run(test())


# -- settings and the command line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("port", "70000", "less than or equal to 65535"),
        ("workers", "0", "greater than or equal to 1"),
        ("drafter", "magic", "Input should be"),
        ("memory_utilization", "1.5", "less than or equal to 1"),
        ("max_nodes", "1025", "less than or equal to 1024"),
        ("max_verify_tokens", "65537", "less than or equal to 65536"),
        ("device", "tpu", "must be auto, cpu, cuda"),
        ("max_waiting", "many", "valid integer"),
        ("dtype", "int4", "Input should be"),
        ("api_key", "first,schlüssel", "printable ASCII"),
        ("admin_key", " padded", "printable ASCII"),
    ],
)
@pytest.mark.parametrize("way", ["option", "variable"])
def test_bad_values_stop_the_start_and_name_the_setting(name: str, value: str, says: str, way: str) -> None:
    option, variable = f"--{name.replace('_', '-')}", f"FLASH_{name.upper()}"
    command = [sys.executable, "-m", "service.cli", "serve", *([option, value] if way == "option" else [])]
    env = {"PATH": "/usr/bin"} | ({variable: value} if way == "variable" else {})
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=30)
    assert done.returncode == 2
    assert option in done.stderr
    assert variable in done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "key" not in name or value not in done.stderr


def test_a_variable_that_is_empty_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files and charts pass `${FLASH_DRAFT:-}` on; an option that is empty was meant."""
    for name in Settings.model_fields:
        monkeypatch.setenv(f"FLASH_{name.upper()}", "")
    assert Settings() == Settings.model_construct()
    with pytest.raises(ValidationError, match="threads"):
        Settings.model_validate({"threads": ""})


def test_a_prompt_that_is_allowed_fits_into_a_body() -> None:
    with pytest.raises(ValueError, match="max_prompt_chars: must not exceed max_text_bytes"):
        Settings(max_prompt_chars=4 * 10**6)
    assert Settings(max_prompt_chars=10**6, max_text_bytes=4 * 10**6).max_prompt_chars == 10**6


def test_every_setting_is_an_option_with_a_description() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "serve", "--help"],
        env={"PATH": "/usr/bin", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=30,
    )
    assert done.returncode == 0
    for name, field in Settings.model_fields.items():
        assert field.description
        if name != "engine":
            assert f"--{name.replace('_', '-')}" in done.stdout
            assert f"FLASH_{name.upper()}" in done.stdout
        for choice in get_args(field.annotation):
            assert not isinstance(choice, str) or choice in field.description
    for option, kind in (("threads", "NUMBER"), ("watch-draft", "NUMBER"), ("max-n", "NUMBER"), ("draft", "TEXT")):
        assert f" --{option} {kind} " in " ".join(done.stdout.split())


def test_devices_and_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    on_cpu = Settings(device="cpu", workers=2).engine_options()
    assert [(one["device"], one["threads"]) for one in on_cpu] == [("cpu", 4), ("cpu", 4)]
    assert [one["device"] for one in Settings(device="cuda:0,2").engine_options()] == ["cuda:0", "cuda:2"]
    assert Settings(threads=3).engine_options()[0]["threads"] == 3
    limits = {
        "prefill_chunk": 64,
        "max_decode_slowdown": 2.0,
        "max_nodes": 7,
        "max_verify_tokens": 32,
        "encoder_cache_bytes": 0,
    }
    assert Settings(**limits).engine_options()[0].items() >= limits.items()  # type: ignore[arg-type]
    assert "draft" not in Settings().engine_options()[0], "what is not set is the engine's to choose"


def test_workers_on_one_device_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free is read once: a worker that starts again must not take for lack what the others hold."""
    read: list[int] = []

    def of_machine() -> int:
        read.append(1)
        return 1000

    monkeypatch.setattr("model.backends.free_memory.of_machine", of_machine)
    three = Settings(device="cpu", workers=3, memory_utilization=0.6).engine_options()
    assert [(one["free_host_memory"], round(one["memory_utilization"], 6)) for one in three] == [(1000, 0.2)] * 3
    assert read == [1]
    apart = Settings(device="cuda:0,1", memory_utilization=0.6).engine_options()
    assert [one["memory_utilization"] for one in apart] == [0.6, 0.6]


def test_clients_never_see_the_path_of_a_model() -> None:
    assert Settings().model_name == "demo"
    assert Settings(model="/srv/models/llava-7b").model_name == "llava-7b"
    assert Settings(model="/srv/models/llava-7b", served_model_name="vlm").model_name == "vlm"


@pytest.mark.parametrize(
    ("name", "former", "text", "value"),
    [
        ("max_decode_slowdown", "prefill_stretch", "3.5", 3.5),
        ("adaptive_drafting", "load_aware", "false", False),
        ("max_verify_tokens", "max_rows", "64", 64),
    ],
)
def test_former_names_of_settings_still_work(
    monkeypatch: pytest.MonkeyPatch, name: str, former: str, text: str, value: object
) -> None:
    assert getattr(Settings(**{former: value}), name) == value  # type: ignore[arg-type]
    option = f"--{former.replace('_', '-')}"
    with pytest.raises(ValidationError) as error:
        Settings(**{former: "?"})  # type: ignore[arg-type]
    assert option in error_messages(error.value)[0]
    monkeypatch.setenv(f"FLASH_{former.upper()}", text)
    assert getattr(Settings(), name) == value
    assert Settings(**{name: None if name.startswith("max") else True}) != Settings(), "the present name comes first"  # type: ignore[arg-type]
    monkeypatch.delenv(f"FLASH_{former.upper()}")
    served: list[dict[str, str]] = []
    command = typer.Typer()
    command.command()(with_settings_options(lambda **options: served.append(options)))
    assert CliRunner().invoke(command, [option, text]).exit_code == 0
    assert served == [{name: text}]


def test_keys_do_not_show_in_what_settings_print() -> None:
    assert "hunter2" not in repr(Settings.model_validate({"api_key": "hunter2,other"}))


# -- the rest


def test_seeds_of_choices_are_stable_and_apart() -> None:
    assert seed_of_choice(7, 0) == 7
    seeds = [seed_of_choice(seed, choice) for seed in (0, 7) for choice in range(50)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of_choice(7, 1) == 6064367806889537054, "a released derivation must never change"


def test_the_rate_falls_to_zero_when_nothing_happens() -> None:
    now = [100.0]
    metrics = Metrics("demo", clock=lambda: now[0])
    for tokens in (50, 0, 150):
        metrics.engine_stats(0, EngineStats(running=1, waiting=0, kv_cache_usage=0.5, generation_tokens=tokens))
        now[0] += 4
    assert metrics.tokens_per_second() == 15.0, "the first 50 are more than 10 s old"
    now[0] += 10
    assert b'flash_tokens_per_second{model="demo"} 0.0' in metrics.render()


@pytest.mark.parametrize("shared", [False, True])
def test_media_reach_the_worker_unchanged(shared: bool) -> None:
    """Through its socket, or through the memory it shares: then they do not go through the socket."""
    arena = Arena(1 << 20) if shared else None
    frames = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)
    if arena is not None:
        piece = arena.allocate(frames.nbytes)
        assert piece is not None
        piece[:] = frames.reshape(-1)
        frames = piece.reshape(frames.shape)
    source = VideoMetadata(total_frames=90, fps=30.0, duration=3.0, width=71, height=51)
    options = (("max_pixels", 4096), ("do_image_splitting", False), ("size", (("height", 448), ("width", 448))))
    video = Medium("video", frames, 0.4, (0.0, 0.4, 0.8), source, options)
    parts = ("before", video, Medium("image", frames[:1, ::-1]), "after")
    submit = m.Submit("r", (Message("user", parts),), SamplingParams(stop=("x",), seed=2**63 - 1), False)
    sent = m.frame(submit, m.encoder(arena))
    assert len(sent) < (2 if shared else 5) * 50 * 70 * 3, "one medium of the two, reversed, is none of the arena's"
    received = m.to_worker(None if arena is None else ArenaReader(os.dup(arena.fd))).decode(sent[m.HEADER_BYTES :])
    assert isinstance(received, m.Submit)
    before, medium, reversed_, after = received.request.messages[0].content
    assert isinstance(medium, Medium)
    assert isinstance(reversed_, Medium)
    assert (before, after, medium.kind, reversed_.kind) == ("before", "after", "video", "image")
    assert np.array_equal(medium.frames, frames)
    assert np.array_equal(reversed_.frames, frames[:1, ::-1])
    for name in ("seconds_per_frame", "frame_times", "source", "options"):
        assert getattr(medium, name) == getattr(video, name)
    assert medium.prompt_digest == video.prompt_digest, "a cache finds it by this"
    assert (received.params, received.speculation) == (SamplingParams(stop=("x",), seed=2**63 - 1), False)
    frames[:] = 0
    assert medium.frames.any(), "what a worker has is its own"


def test_the_arena_gives_out_no_byte_twice_and_gets_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the system gets back what lies beyond the part that is kept, from between what others hold."""
    monkeypatch.setattr("service.pool.arena.RETAINED", 16 * 4096)
    arena, rng = Arena(64 * 4096), random.Random(0)
    held: dict[int, np.ndarray] = {}
    refused = 0
    for number in range(2_000):
        piece = arena.allocate(rng.randint(2, 6 * 4096))
        if piece is None:
            refused += 1
        else:
            piece[:] = number % 251
            held[number] = piece[1:].reshape(1, -1)  # any view keeps it
        while held and (piece is None or rng.random() < 0.4):
            gone = rng.choice(list(held))
            assert (held.pop(gone) == gone % 251).all()
            piece = held.get(gone)
            if rng.random() < 0.5:
                break
    assert refused, "it was never full: nothing was tried"
    assert all((piece == number % 251).all() for number, piece in held.items())

    def taken_from_the_system() -> int:
        return os.fstat(arena.fd).st_blocks * 512

    most = taken_from_the_system()
    held.clear()
    del piece
    assert arena.allocate(1) is not None
    assert taken_from_the_system() <= 16 * 4096 < most
    whole = arena.allocate(64 * 4096)
    assert whole is not None
    assert arena.allocate(1) is None
    assert arena.offset_of(whole) == 0
    assert arena.offset_of(whole[4096:]) == 4096
    assert arena.offset_of(np.zeros(4096, np.uint8)) is None
    assert arena.offset_of(whole[::2]) is None


def test_a_place_outside_of_the_shared_memory_is_an_error() -> None:
    arena = Arena(4096)
    shared = ArenaReader(os.dup(arena.fd))
    for at, count in ((4090, 7), (-1, 1), (0, 4097)):
        with pytest.raises(ValueError, match="outside"):
            shared.read(at, count)


def test_every_error_has_a_status_a_type_and_the_envelope() -> None:
    def tree(cls: type[ServiceError]) -> list[type[ServiceError]]:
        return [cls, *(leaf for child in cls.__subclasses__() for leaf in tree(child))]

    for cls in tree(ServiceError):
        error = cls("message", param="p")
        assert 400 <= cls.status < 600
        assert cls.status != 422
        assert error.envelope()["error"]["param"] == "p"
