"""Draw scenes and short clips of coloured shapes, from their content to their pixels.

This module knows nothing of language. A scene is drawn from a seed alone. So a data set is a range of integers and
needs no files, and held-out scenes are other seeds (see `scene_seed`). Coordinates are fractions of the frame's side,
with the origin at the top left.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "crescent")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 40),
    "green": (34, 160, 64),
    "blue": (36, 84, 228),
    "yellow": (248, 216, 36),
    "purple": (138, 48, 188),
    "orange": (252, 138, 16),
    "pink": (252, 134, 192),
    "cyan": (20, 206, 216),
    "brown": (126, 74, 34),
}
SIZES: dict[str, tuple[float, float]] = {  # radius, as a fraction of the frame's side
    "small": (0.066, 0.076),
    "medium": (0.096, 0.108),
    "large": (0.132, 0.150),
}
TEXTURES = ("solid", "striped", "dotted", "checkered")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "gray": (168, 168, 170),
    "black": (22, 22, 24),
    "beige": (232, 216, 180),
    "navy": (22, 28, 76),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

MotionKind = Literal["still", "move", "enter", "leave", "collide"]
Direction = Literal["left", "right", "up", "down"]


@dataclass(frozen=True)
class Motion:
    """Describe how an object moves."""

    kind: MotionKind
    direction: Direction | None = None  # None for "still"
    speed: Literal["slowly", "quickly"] | None = None  # only for "move"


@dataclass(frozen=True)
class Thing:
    """Hold one object. `start` and `velocity` are (x, y); a colliding object reverses its velocity at time 0.5."""

    shape: str
    colour: str
    size: str
    texture: str
    radius: float
    start: tuple[float, float]
    motion: Motion = Motion("still")
    velocity: tuple[float, float] = (0.0, 0.0)

    def at(self, time: float) -> tuple[float, float]:
        """Return the centre at `time`, from 0 to 1."""
        travelled = min(time, 1.0 - time) if self.motion.kind == "collide" else time
        return self.start[0] + self.velocity[0] * travelled, self.start[1] + self.velocity[1] * travelled

    @property
    def row(self) -> int:
        """Return the grid row of the starting position, 0 to 2."""
        return min(2, max(0, int(self.start[1] * 3)))

    @property
    def column(self) -> int:
        """Return the grid column of the starting position, 0 to 2."""
        return min(2, max(0, int(self.start[0] * 3)))


@dataclass(frozen=True)
class Scene:
    """Hold an image (`lanes` is None), or a clip whose objects move along rows or columns.

    Things are in reading order.
    """

    background: str
    tint: tuple[float, float, float]  # added to the background's colour
    gradient: tuple[float, float]  # brightness change over the frame, per axis
    things: tuple[Thing, ...]
    lanes: Literal["rows", "columns"] | None = None


def scene_seed(split: Literal["train", "heldout"], kind: Literal["image", "video"], index: int) -> int:
    """Compute a seed that no other split, kind or index shares."""
    return ((index * 2 + (kind == "video")) * 2 + (split == "heldout")) * 1_000_003 + 17


def _appearance(rng: random.Random, used: set[tuple[str, str]], sizes: tuple[str, ...] = tuple(SIZES)) -> Thing:
    """Choose shape, colour, size and texture of an object; no two in `used` share both shape and colour."""
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if (shape, colour) not in used:
            break
    used.add((shape, colour))
    size = rng.choice(sizes)
    texture = rng.choices(TEXTURES, (4, 2, 2, 2))[0]
    return Thing(shape, colour, size, texture, rng.uniform(*SIZES[size]), (0.5, 0.5))


def _moved(thing: Thing, start: tuple[float, float], motion: Motion, velocity: tuple[float, float]) -> Thing:
    """Copy an object with another start, motion and velocity."""
    return Thing(thing.shape, thing.colour, thing.size, thing.texture, thing.radius, start, motion, velocity)


def _surroundings(rng: random.Random) -> tuple[str, tuple[float, float, float], tuple[float, float]]:
    """Choose the background's colour, tint and gradient."""
    tint = (rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(-8, 8))
    return rng.choice(list(BACKGROUNDS)), tint, (rng.uniform(-14, 14), rng.uniform(-14, 14))


def random_image_scene(seed: int) -> Scene:
    """Draw one to five objects in different cells of a 3 x 3 grid. None touch, and none share shape and colour."""
    rng = random.Random(seed)
    background, tint, gradient = _surroundings(rng)
    count = rng.choices((1, 2, 3, 4, 5), (2, 4, 5, 4, 3))[0]
    used: set[tuple[str, str]] = set()
    things: list[Thing] = []
    cells = rng.sample(range(9), 9)
    while len(things) < count and cells:
        cell = cells.pop()
        thing = _appearance(rng, used)
        for _ in range(8):
            x, y = ((cell % 3) + 0.5) / 3 + rng.uniform(-0.09, 0.09), ((cell // 3) + 0.5) / 3 + rng.uniform(-0.09, 0.09)
            inside = all(thing.radius + 0.01 <= v <= 0.99 - thing.radius for v in (x, y))
            apart = all(math.dist((x, y), o.start) > thing.radius + o.radius + 0.015 for o in things)
            if inside and apart:
                things.append(_moved(thing, (x, y), Motion("still"), (0.0, 0.0)))
                break
    things.sort(key=lambda t: (t.row, t.column))
    return Scene(background, tint, gradient, tuple(things))


def _lane_motion(rng: random.Random, thing: Thing, rows: bool) -> tuple[float, float, Motion]:
    """Choose start and velocity along the lane, and the motion, of an object that is alone in its lane."""
    forward = rng.random() < 0.5
    direction: Direction = ("right" if forward else "left") if rows else ("down" if forward else "up")
    kind = rng.choices(("still", "move", "enter", "leave"), (3, 6, 2, 2))[0]
    low, high = thing.radius + 0.02, 0.98 - thing.radius
    if kind == "still":
        lane_cell = rng.randrange(3)
        at = (lane_cell + 0.5) / 3 + rng.uniform(-0.09, 0.09)
        return min(max(at, low), high), 0.0, Motion("still")
    if kind == "move":
        speed: Literal["slowly", "quickly"] = rng.choice(("slowly", "quickly"))
        travel = rng.uniform(0.18, 0.28) if speed == "slowly" else rng.uniform(0.5, 0.64)
        at, moving = rng.uniform(low, high - travel), travel
        motion = Motion("move", direction, speed)
    elif kind == "enter":
        at, motion = -thing.radius - 0.03, Motion("enter", direction)
        moving = rng.uniform(0.4, 0.75) - at
    else:
        at, motion = rng.uniform(0.25, 0.6), Motion("leave", direction)
        moving = 1.03 + thing.radius - at
    return (at, moving, motion) if forward else (1.0 - at, -moving, motion)


def random_video_scene(seed: int) -> Scene:
    """Draw one to three objects: each in a lane of its own, or two that share one and collide."""
    rng = random.Random(seed)
    background, tint, gradient = _surroundings(rng)
    rows = rng.random() < 0.5
    lanes = rng.sample(range(3), 3)
    count = rng.choices((1, 2, 3), (3, 5, 3))[0]
    used: set[tuple[str, str]] = set()
    placed: list[tuple[int, float, float, Motion, Thing]] = []  # lane, start, velocity, motion, thing
    if count >= 2 and rng.random() < 0.4:
        lane = lanes.pop()
        first, second = (_appearance(rng, used, ("small", "medium")) for _ in range(2))
        left, right = rng.uniform(first.radius + 0.02, 0.2), rng.uniform(0.8, 0.98 - second.radius)
        reach = (right - left - first.radius - second.radius) / 2  # each covers half of the gap until time 0.5
        forth: Direction = "right" if rows else "down"
        back: Direction = "left" if rows else "up"
        placed.append((lane, left, reach * 2, Motion("collide", forth), first))
        placed.append((lane, right, -reach * 2, Motion("collide", back), second))
    while len(placed) < count:
        thing = _appearance(rng, used)
        at, velocity, motion = _lane_motion(rng, thing, rows)
        placed.append((lanes.pop(), at, velocity, motion, thing))
    things = []
    for lane, at, velocity, motion, thing in sorted(placed, key=lambda p: (p[0], p[1])):
        across = (lane + 0.5) / 3 + rng.uniform(-0.012, 0.012)
        things.append(
            _moved(thing, (at, across), motion, (velocity, 0.0))
            if rows
            else _moved(thing, (across, at), motion, (0.0, velocity))
        )
    return Scene(background, tint, gradient, tuple(things), "rows" if rows else "columns")


# Signed distances (negative inside) in units of the object's radius; x to the right, y down.
Field = np.ndarray


def _circle(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 1.0


def _square(x: Field, y: Field) -> Field:
    return np.maximum(abs(x), abs(y)) - 0.84


def _triangle(x: Field, y: Field) -> Field:
    return np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.55


def _diamond(x: Field, y: Field) -> Field:
    return (abs(x) * 1.35 + abs(y) - 1.05) / 1.68


def _star(x: Field, y: Field) -> Field:
    # Fold into one tenth of the circle. The edge runs from the tip (radius 1.08) to the notch (0.45).
    angle = abs((np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    r = np.hypot(x, y)
    px, py = r * np.sin(angle), r * np.cos(angle)
    nx, ny = 0.45 * math.sin(math.pi / 5), 0.45 * math.cos(math.pi / 5)
    ex, ey = nx, ny - 1.08
    return (px * -ey + (py - 1.08) * ex) / math.hypot(ex, ey)


def _cross(x: Field, y: Field) -> Field:
    ax, ay = abs(x), abs(y)
    return np.minimum(np.maximum(ax - 0.31, ay - 0.98), np.maximum(ax - 0.98, ay - 0.31))


def _ring(x: Field, y: Field) -> Field:
    return abs(np.hypot(x, y) - 0.72) - 0.26


def _crescent(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x, y) - 1.0, 0.82 - np.hypot(x - 0.5, y))


DISTANCE: dict[str, Callable[[Field, Field], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
}


def _second_colour(texture: str, x: Field, y: Field) -> Field:
    """Compute the weight (0 to 1) of a texture's lighter second colour at each point, in units of the radius."""
    if texture == "striped":
        return np.clip(0.5 + 3.0 * np.sin((x + y) * 8.6), 0, 1)
    if texture == "dotted":
        return np.clip(6.0 * (np.cos(x * 8.6) * np.cos(y * 8.6) - 0.45), 0, 1)
    if texture == "checkered":
        return np.clip(0.5 + 4.0 * np.sin(x * 5.8) * np.sin(y * 5.8), 0, 1)
    return np.zeros_like(x)


def render(scene: Scene, side: int = 192, time: float = 0.0) -> np.ndarray:
    """Draw one frame: (side, side, 3) uint8 RGB. `time` is from 0 to 1 and only matters for clips."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    light = scene.gradient[0] * (axis[None, :] - 0.5) + scene.gradient[1] * (axis[:, None] - 0.5)
    base = np.asarray(BACKGROUNDS[scene.background], np.float32) + np.asarray(scene.tint, np.float32)
    canvas = base[None, None, :] + light[:, :, None]
    for thing in scene.things:
        cx, cy = thing.at(time)
        reach = thing.radius * 1.15 + 1.5 / side
        x0, x1 = max(0, int((cx - reach) * side)), min(side, int((cx + reach) * side) + 1)
        y0, y1 = max(0, int((cy - reach) * side)), min(side, int((cy + reach) * side) + 1)
        if x0 >= x1 or y0 >= y1:
            continue
        x, y = np.meshgrid((axis[x0:x1] - cx) / thing.radius, (axis[y0:y1] - cy) / thing.radius)
        inside = np.clip(0.5 - DISTANCE[thing.shape](x, y) * thing.radius * side, 0, 1)[:, :, None]
        first = np.asarray(COLOURS[thing.colour], np.float32)
        second = first * 0.35 + 255 * 0.65
        weight = _second_colour(thing.texture, x, y)[:, :, None]
        canvas[y0:y1, x0:x1] += inside * (first * (1 - weight) + second * weight - canvas[y0:y1, x0:x1])
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def render_clip(scene: Scene, num_frames: int, side: int = 192) -> np.ndarray:
    """Draw frames at evenly spaced times from first to last: (num_frames, side, side, 3) uint8 RGB."""
    times = [i / max(1, num_frames - 1) for i in range(num_frames)]
    return np.stack([render(scene, side, t) for t in times])
