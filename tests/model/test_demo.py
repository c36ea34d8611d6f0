"""Test the demo's scenes: captions can be parsed, and training scenes are not those of the evaluation."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from model.bench import grammars as bench_grammars
from model.config import DEMO_WEIGHTS
from model.demo import build, captions, evaluate, motion, prompts, scenes, vision
from model.demo.captions import Claim
from model.demo.scenes import Scene, Thing
from model.demo.target import LlavaConversations
from model.demo.vision import GRID, QUESTIONS

IMAGES = [scenes.random_image_scene(scenes.scene_seed("heldout", "image", i)) for i in range(300)]
VIDEOS = [scenes.random_video_scene(scenes.scene_seed("heldout", "video", i)) for i in range(300)]


# -- reading captions back


def claimed(thing: Thing) -> tuple[str, str, str, str]:
    return thing.size, thing.colour, thing.texture, thing.shape


@pytest.mark.parametrize("write", [captions.detailed_caption, captions.brief_caption, captions.item_list])
def test_every_object_of_an_image_is_read_back_with_its_place(write: object) -> None:
    """The evaluation counts by this: an object misread would be charged to the model."""
    assert callable(write)
    for number, scene in enumerate(IMAGES):
        for turn in range(3):
            text = write(scene, random.Random(number * 10 + turn))
            found = captions.named_objects(text)
            assert [(c.size, c.colour, c.texture, c.shape) for c in found] == [claimed(t) for t in scene.things], text
            places = [captions.claimed_place(c) for c in found]
            assert places == [captions.cell_name(t.row, t.column) for t in scene.things], text


@pytest.mark.parametrize("write", [captions.video_caption, captions.brief_video_caption])
def test_every_object_of_a_video_is_read_back_with_its_motion(write: object) -> None:
    assert callable(write)
    for number, scene in enumerate(VIDEOS):
        for turn in range(3):
            text = write(scene, random.Random(number * 10 + turn))
            found = captions.named_objects(text)
            assert [(c.size, c.colour, c.texture, c.shape) for c in found] == [claimed(t) for t in scene.things], text
            assert [c.rest for c in found] == [captions.moving(scene, t) for t in scene.things], text


def test_what_is_only_referred_to_is_not_claimed() -> None:
    text = "A small red dotted ring is at the top left. The red ring is above the blue star. There is nothing else."
    assert captions.named_objects(text) == [Claim("small", "red", "dotted", "ring", "is at the top left")]
    assert captions.named_objects("No, there is no green cross in the image.") == []


def test_questions_of_every_kind_have_answers_that_are_true() -> None:
    """Spot checks that need no parser: counts, and what an answer introduces is there."""
    for number, scene in enumerate(IMAGES):
        rng = random.Random(number)
        there = {claimed(t) for t in scene.things}
        for _ in range(12):
            turn = captions.image_turn(scene, rng)
            assert turn.question[-1] in "?."
            assert turn.answer[0].isupper()
            assert turn.answer[-1] == "."
            assert {(c.size, c.colour, c.texture, c.shape) for c in captions.named_objects(turn.answer)} <= there
            if turn.question in ("How many objects are there?", "Count the objects."):
                assert captions.NUMBERS[len(scene.things)] in turn.answer
    for number, scene in enumerate(VIDEOS):
        rng = random.Random(number)
        there = {claimed(t) for t in scene.things}
        for _ in range(8):
            turn = captions.video_turn(scene, rng)
            assert {(c.size, c.colour, c.texture, c.shape) for c in captions.named_objects(turn.answer)} <= there


# -- scenes


def test_seeds_of_different_splits_and_kinds_never_meet() -> None:
    """A held-out scene that was trained on is not held out."""
    seeds = [
        {scenes.scene_seed(split, kind, i) for i in (*range(3000), *range(5_000_000, 5_003_000))}
        for split in ("train", "heldout")
        for kind in ("image", "video")
    ]
    for one, other in combinations(seeds, 2):
        assert not one & other


def test_prompts_of_the_splits_show_different_scenes() -> None:
    """Compare pixels, not seeds: the draft must be measured on scenes that it has not seen."""

    def pictures(split: object) -> set[bytes]:
        found = set()
        for i in range(20):
            content = prompts.messages(i, split=split)[0].content  # type: ignore[arg-type]
            found |= {p.frames.tobytes() for p in content if not isinstance(p, str)}
        return found

    train, heldout = pictures("train"), pictures("heldout")
    assert len(train) == len(heldout) == 20
    assert not train & heldout


def test_prompts_are_of_their_task_and_the_same_each_time() -> None:
    for i in range(20):
        content = prompts.messages(i)[0].content
        again = prompts.messages(i)[0].content
        medium = content[0]
        assert not isinstance(medium, str)
        assert medium.kind == prompts.task_of(i).split()[0]
        assert content[1] == again[1]
        assert np.array_equal(medium.frames, again[0].frames)  # type: ignore[union-attr]
        assert medium.frames.shape[1:] == (192, 192, 3)


def test_what_drafts_learn_from_is_of_every_kind_and_none_of_it_is_measured_on() -> None:
    drawn = prompts.Scenes(examples=40, frames=9, each=2)
    assert {drawn.kind(number) for number in drawn.train} == set(prompts.KINDS)
    assert [drawn.kind(number) for number in drawn.held_out] == [*prompts.KINDS] * 2
    seen: dict[bool, set[bytes]] = {True: set(), False: set()}
    for number in (*drawn.train, *drawn.held_out):
        ((*media, question),) = (message.content for message in drawn.messages(number))
        shown = [medium for medium in media if not isinstance(medium, str)]
        frames = [len(medium.frames) for medium in shown]
        kind = drawn.kind(number)
        assert isinstance(question, str)
        expected = {"two images": [1, 1], "long video": [9]}
        assert frames == expected.get(kind, [1] if kind.startswith("image") else [prompts.NUM_FRAMES])
        seen[number in drawn.held_out] |= {medium.frames.tobytes() for medium in shown}
    assert not seen[True] & seen[False]


def test_objects_of_an_image_never_touch_and_lie_inside() -> None:
    """Two objects in one place cannot be told apart by anyone."""
    for scene in IMAGES:
        assert 1 <= len(scene.things) <= 5
        for a, b in combinations(scene.things, 2):
            assert math.dist(a.start, b.start) > a.radius + b.radius
            assert (a.row, a.column) != (b.row, b.column)
            assert (a.shape, a.colour) != (b.shape, b.colour)
        for thing in scene.things:
            assert all(thing.radius <= v <= 1 - thing.radius for v in thing.start)
        assert [(t.row, t.column) for t in scene.things] == sorted((t.row, t.column) for t in scene.things)


def test_objects_of_a_video_never_run_through_each_other() -> None:
    """Those that collide come to touch at the middle of the clip, and nothing else ever touches."""
    for scene in VIDEOS:
        for a, b in combinations(scene.things, 2):
            nearest = min(math.dist(a.at(t / 100), b.at(t / 100)) for t in range(101))
            assert nearest > (a.radius + b.radius) * 0.98 - 0.025
            if a.motion.kind == b.motion.kind == "collide":
                assert math.dist(a.at(0.5), b.at(0.5)) == pytest.approx(a.radius + b.radius, abs=0.03)


def test_motions_are_what_they_are_called() -> None:
    """'Enters' begins outside and ends inside; 'moves right' ends further right; 'slowly' is slower than 'quickly'."""
    travelled: dict[str, list[float]] = {"slowly": [], "quickly": []}

    def outside(thing: Thing, time: float) -> bool:
        return any(v < -thing.radius or v > 1 + thing.radius for v in thing.at(time))

    for scene in VIDEOS:
        for thing in scene.things:
            m = thing.motion
            (x0, y0), (x1, y1) = thing.at(0.0), thing.at(1.0)
            assert outside(thing, 0.0) == (m.kind == "enter")
            assert outside(thing, 1.0) == (m.kind == "leave")
            if m.kind == "still":
                assert (x0, y0) == (x1, y1)
            elif m.kind != "collide":
                along = {"right": x1 - x0, "left": x0 - x1, "down": y1 - y0, "up": y0 - y1}[m.direction or ""]
                assert along > 0.1
                if m.kind == "move":
                    assert m.speed is not None
                    travelled[m.speed].append(along)
    assert max(travelled["slowly"]) < min(travelled["quickly"])


def test_a_scene_is_drawn_from_its_seed_alone() -> None:
    for make in (scenes.random_image_scene, scenes.random_video_scene):
        assert make(7) == make(7)
        assert make(7) != make(8)
    frames = scenes.render_clip(VIDEOS[0], 4, 48)
    assert frames.shape == (4, 48, 48, 3)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames[0], scenes.render(VIDEOS[0], 48, 0.0))
    assert np.array_equal(frames[3], scenes.render(VIDEOS[0], 48, 1.0))
    assert scenes.render_clip(VIDEOS[0], 1, 48).shape == (1, 48, 48, 3)


def test_an_object_is_drawn_where_it_is_said_to_be_in_its_colour() -> None:
    """Pixels of a solid object's own colour have their middle at its centre."""
    checked = 0
    for scene in IMAGES[:60]:
        frame = scenes.render(scene, 96).astype(int)
        for thing in scene.things:
            if thing.texture != "solid" or thing.shape not in ("circle", "square", "diamond"):
                continue
            ys, xs = np.nonzero((abs(frame - np.array(scenes.COLOURS[thing.colour])) <= 2).all(-1))
            if any(t.colour == thing.colour and t is not thing for t in scene.things):
                continue
            assert (xs.mean() + 0.5) / 96 == pytest.approx(thing.start[0], abs=0.02)
            assert (ys.mean() + 0.5) / 96 == pytest.approx(thing.start[1], abs=0.02)
            checked += 1
    assert checked > 10


# -- labels of patches


def labels(scene: Scene, moment: float = 0.0) -> dict[str, np.ndarray]:
    every = vision.patch_labels(scene, moment)
    assert every.shape == (GRID * GRID, len(QUESTIONS))
    return {name: every[:, i].reshape(GRID, GRID) for i, name in enumerate(QUESTIONS)}


def test_every_object_has_one_anchor_patch_that_tells_all_about_it() -> None:
    """The tower learns from these labels alone, so a wrong label teaches it an error."""
    for scene in IMAGES:
        told = labels(scene)
        anchors = np.argwhere(told["anchor"] == 1)
        assert len(anchors) == len(scene.things)
        for thing in scene.things:
            column, row = int(thing.start[0] * GRID), int(thing.start[1] * GRID)
            here = {name: int(told[name][row, column]) for name in QUESTIONS}
            assert here == {
                "shape": scenes.SHAPES.index(thing.shape) + 1,
                "colour": list(scenes.COLOURS).index(thing.colour) + 1,
                "size": list(scenes.SIZES).index(thing.size) + 1,
                "texture": scenes.TEXTURES.index(thing.texture) + 1,
                "cell": thing.row * 3 + thing.column + 1,
                "x": column + 1,
                "y": row + 1,
                "anchor": 1,
                "background": list(scenes.BACKGROUNDS).index(scene.background),
            }


def test_patches_far_from_every_object_are_background() -> None:
    for scene in IMAGES:
        told = labels(scene)
        for row in range(GRID):
            for column in range(GRID):
                centre = ((column + 0.5) / GRID, (row + 0.5) / GRID)
                if all(math.dist(centre, t.start) > t.radius * 1.2 + 1.0 / GRID for t in scene.things):
                    assert all(told[name][row, column] == 0 for name in QUESTIONS if name != "background")


def test_labels_stay_in_range_when_objects_leave_the_frame() -> None:
    """An index beyond its question's classes would crash a training after hours."""
    for scene in VIDEOS[:150]:
        for moment in (0.0, 0.37, 0.5, 1.0):
            told = labels(scene, moment)
            for name, classes in QUESTIONS.items():
                assert told[name].min() >= 0
                assert told[name].max() < classes, name
            visible = [t for t in scene.things if all(0 <= v < 1 for v in t.at(moment))]
            assert told["anchor"].sum() == len(visible)


# -- labels of motion, and the conversations a target is trained on


def test_motion_labels_follow_the_object_that_covers_the_patch() -> None:
    """Displacements are the object's in each frame; background has no labels; kinds are in the last frame only."""
    moments = [0.0, 1 / 3, 2 / 3, 1.0]
    still, absent = motion.REACH, motion.PLACES - 1
    seen: set[str] = set()
    for scene in VIDEOS[:120]:
        every = motion.motion_labels(scene, moments)
        for f, moment in enumerate(moments):
            owner = vision.owners(scene, moment).flatten()
            assert (every[f, owner < 0] == -100).all()
            for index, thing in enumerate(scene.things):
                rows = every[f, owner == index]
                if not len(rows):
                    continue
                assert (rows == rows[0]).all()
                frame, dx, dy, x, y, kind = rows[0].tolist()
                assert frame == f
                assert (kind >= 0) == (f == 3)
                if f == 0:
                    assert dx == dy == x == y == -100
                    continue
                seen.add(thing.motion.kind)
                if thing.motion.kind == "still":
                    assert dx == dy == x == y == still
                if thing.motion.kind == "collide" and f == 3:
                    assert x == y == still, "it is back where it began"
                if thing.motion.kind == "enter" and f == 1:
                    assert x == y == absent, "it was not there in the first frame"
                if thing.motion.kind == "move":
                    along = x if scene.lanes == "rows" else y
                    assert (along > still) == (thing.motion.direction in ("right", "down")) or along == still
    assert seen == set(motion.KINDS)


def test_a_conversation_asks_nothing_of_questions_and_media() -> None:
    """Only answers and their ends have labels; media have one token for each patch; a batch has one kind."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_WEIGHTS / "target")
    data = LlavaConversations(tokenizer, 0, 0, image_batch=4)
    image = tokenizer.convert_tokens_to_ids("<image>")
    kinds = set()
    for index in range(12):
        batch, again = data.batch(index), data.batch(index)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        ids, labels = batch["input_ids"], batch["labels"]
        frames = batch["pixel_values"].shape[0]
        assert int((ids == image).sum()) == frames * GRID * GRID
        assert (labels[ids == image] == -100).all()
        asked = labels != -100
        assert torch.equal(labels[asked], ids[asked])
        for row in range(len(ids)):
            answers = tokenizer.decode(labels[row][asked[row]])
            assert answers.endswith("<|end|>")
            assert "<|user|>" not in answers
        kinds.add("video" if "motions" in batch else "image")
        if "motions" in batch:
            assert batch["motions"].shape == (frames, GRID * GRID, len(motion.MOTION_QUESTIONS))
    assert kinds == {"image", "video"}


def test_an_evaluation_writes_only_where_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluating a few scenes once replaced the figures beside the weights, which only a build may write."""
    monkeypatch.setattr(evaluate, "image_scores", lambda *_, **__: {"recall": 1.0})
    monkeypatch.setattr(evaluate, "video_scores", lambda *_, **__: {"motions": 1.0})

    def run(*asked: str) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate", *asked])
        evaluate.main()
        return capsys.readouterr().out

    told = run(str(tmp_path))
    assert json.loads(told) == {"image": {"recall": 1.0}, "video": {"motions": 1.0}}
    assert not list(tmp_path.iterdir())
    stages = [stage for stage in build.stages(str(tmp_path), rehearse=True) if stage[0] == "model.demo.evaluate"]
    assert [stage[1] for stage in stages] == [f"{tmp_path}/target", f"{tmp_path}/qwen-target"]
    for _, *asked in stages:
        Path(asked[0]).mkdir()
        assert run(*asked) == told == (Path(asked[0]) / "evaluation.json").read_text()


def test_schemas_that_drafts_learn_from_differ_from_each_other_and_from_the_benchmarks() -> None:
    """Otherwise the benchmark would measure how well a draft knows five schemas by heart."""
    drawn = prompts.Scenes(examples=4, frames=9, each=3, formed=40)
    bound = [number for number in drawn.train if drawn.grammar(number) is not None]
    assert bound == [number for number in drawn.train if number >= prompts.FORMED]
    assert len(bound) == 40
    assert {drawn.kind(number) for number in bound} == set(prompts.FORMS)
    assert [number for number in drawn.held_out if drawn.grammar(number)] == [
        number for number in drawn.held_out if drawn.kind(number) in prompts.FORMS
    ]
    sources = {grammar.source for number in (*bound, *drawn.held_out) if (grammar := drawn.grammar(number))}
    assert len(sources) > 40
    benchmark = {name for schema in bench_grammars.SCHEMAS.values() for name in keys(schema)}
    assert {"caption", "detections", "lines", "box", "color"} <= benchmark
    assert not benchmark & {name for source in sources for name in keys(json.loads(source))}
    for number in bound[:8]:
        ((medium, question),) = (message.content for message in drawn.messages(number))
        assert not isinstance(medium, str)
        assert isinstance(question, str)
        assert drawn.kind(number).startswith(medium.kind)
        assert drawn.grammar(number) == prompts.Scenes(9, 9, 9, 99).grammar(number), "whatever else is drawn"


def keys(schema: Any) -> set[str]:
    """Return the names of all properties in a schema."""
    if isinstance(schema, list):
        return set().union(*map(keys, schema))
    if not isinstance(schema, dict):
        return set()
    return set(schema.get("properties", ())).union(*map(keys, schema.values()))
