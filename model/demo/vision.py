"""First stage of the bundled model: train the vision tower to predict, for every patch, which object covers it.

Dense labels teach a small tower to see in minutes; captions alone would take hours. The heads are removed afterwards.
The tower is transformers' own `CLIPVisionModel`.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel

from model.demo import scenes
from model.demo.scenes import Scene, Thing
from model.demo.training import Numbered

SIDE, PATCH = 192, 16
GRID = SIDE // PATCH
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)
# Questions about each patch and their number of classes; class 0 means "background here", except in the last one.
QUESTIONS: dict[str, int] = {
    "shape": len(scenes.SHAPES) + 1,
    "colour": len(scenes.COLOURS) + 1,
    "size": len(scenes.SIZES) + 1,
    "texture": len(scenes.TEXTURES) + 1,
    "cell": 10,
    "x": GRID + 1,
    "y": GRID + 1,
    "anchor": 2,  # whether the patch contains the object's centre
    "background": len(scenes.BACKGROUNDS),  # labelled everywhere
}


def vision_config() -> CLIPVisionConfig:
    """Return the configuration of the tower."""
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )


def owners(scene: Scene, moment: float) -> np.ndarray:
    """Find the object that covers each patch: (GRID, GRID) int64, an index into scene.things, -1 for the background."""
    owner = np.full((GRID, GRID), -1)
    covered = np.full((GRID, GRID), 0.12)
    axis = (np.arange(GRID * 4) + 0.5) / (GRID * 4)
    for index, thing in enumerate(scene.things):
        cx, cy = thing.at(moment)
        x, y = np.meshgrid((axis - cx) / thing.radius, (axis - cy) / thing.radius)
        inside = (scenes.DISTANCE[thing.shape](x, y) < 0).reshape(GRID, 4, GRID, 4).mean((1, 3))
        owner[inside > covered] = index
        covered = np.maximum(covered, inside)
        if anchor := _anchor(thing, moment):
            owner[anchor] = index
    return owner


def _anchor(thing: Thing, moment: float) -> tuple[int, int] | None:
    """Return the patch (row, column) that contains the object's centre, or None if that is outside the frame."""
    cx, cy = thing.at(moment)
    return (int(cy * GRID), int(cx * GRID)) if 0 <= cx < 1 and 0 <= cy < 1 else None


def patch_labels(scene: Scene, moment: float) -> np.ndarray:
    """Compute the class of every question at every patch: (GRID * GRID, num_questions) int64."""
    labels = np.zeros((GRID, GRID, len(QUESTIONS)), np.int64)
    labels[:, :, -1] = list(scenes.BACKGROUNDS).index(scene.background)
    owner = owners(scene, moment)
    for index, thing in enumerate(scene.things):
        px, py = (min(GRID - 1, max(0, int(c * GRID))) for c in thing.at(moment))
        labels[owner == index, :8] = (
            scenes.SHAPES.index(thing.shape) + 1,
            list(scenes.COLOURS).index(thing.colour) + 1,
            list(scenes.SIZES).index(thing.size) + 1,
            scenes.TEXTURES.index(thing.texture) + 1,
            min(2, int(py * 3 / GRID)) * 3 + min(2, int(px * 3 / GRID)) + 1,
            px + 1,
            py + 1,
            0,
        )
        if anchor := _anchor(thing, moment):
            labels[(*anchor, 7)] = 1
    return labels.reshape(GRID * GRID, -1)


def weathered(frame: np.ndarray, rng: random.Random) -> np.ndarray:
    """Degrade a frame as a file format or a camera might: JPEG artefacts in some, noise in some."""
    if rng.random() < 0.35:
        out = io.BytesIO()
        Image.fromarray(frame).save(out, "JPEG", quality=rng.randint(50, 95))
        frame = np.asarray(Image.open(out))
    if rng.random() < 0.15:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(1, 6), frame.shape)
        frame = np.clip(frame + noise, 0, 255).astype(np.uint8)
    return frame


def normalised(frames: np.ndarray) -> torch.Tensor:
    """Convert (..., H, W, 3) uint8 to (..., 3, H, W) float32, as the checkpoint's image processor does."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float() / 255.0
    pixels = (pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return pixels.movedim(-1, -3)


class PatchData(Numbered[tuple[torch.Tensor, torch.Tensor]]):
    """Yield batches of images and their patch labels; every fourth image is a frame of a clip."""

    def __init__(self, first: int, batch: int) -> None:
        self.first, self.batch_size = first, batch

    def batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw batch `index`: pixels (batch, 3, SIDE, SIDE) and labels (batch, GRID * GRID, num_questions)."""
        frames, labels = [], []
        for i in range(index * self.batch_size, (index + 1) * self.batch_size):
            rng = random.Random(i)
            if i % 4 == 3:
                scene, moment = scenes.random_video_scene(scenes.scene_seed("train", "video", i)), rng.random()
            else:
                scene, moment = scenes.random_image_scene(scenes.scene_seed("train", "image", i)), 0.0
            frames.append(weathered(scenes.render(scene, SIDE, moment), rng))
            labels.append(patch_labels(scene, moment))
        return normalised(np.stack(frames)), torch.from_numpy(np.stack(labels))


def _sine_table(width: int) -> torch.Tensor:
    """Compute two-dimensional sine and cosine position embeddings, (1 + GRID * GRID, width).

    They only initialise the learnt embeddings: with them, attention to "the patch to the left" is a linear map.
    """
    waves = 1.0 / 60.0 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(GRID)[:, None] * waves
    axis = torch.cat((angle.sin(), angle.cos()), -1)  # (GRID, width / 2)
    table = torch.cat((axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)), -1).flatten(0, 1)
    return torch.cat((torch.zeros(1, width), table))


class PatchReader(nn.Module):
    """Add one linear head per question to the tower."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(vision_config())
        with torch.no_grad():
            self.tower.embeddings.position_embedding.weight.copy_(_sine_table(vision_config().hidden_size) * 0.5)
        self.heads = nn.Linear(vision_config().hidden_size, sum(QUESTIONS.values()))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Map pixels (batch, 3, SIDE, SIDE) to logits, (batch, patches, classes) for each question."""
        hidden = self.tower(pixels).last_hidden_state[:, 1:]
        return list(self.heads(hidden).float().split(list(QUESTIONS.values()), -1))


def patch_loss(logits: list[torch.Tensor], labels: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Sum the mean cross-entropy of each question, with a larger weight for patches with an object.

    Returns the loss and the accuracy of each question on those patches.
    """
    there = labels[..., 0] > 0
    weight = there.float() * 4 + 0.3
    loss, right = torch.zeros(()), []
    for q, answer in enumerate(logits):
        target = labels[..., q]
        share = 3.0 if q == 0 else 1.0  # shapes are the hardest to learn
        loss = (
            loss
            + share
            * (F.cross_entropy(answer.flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()).mean()
        )
        right.append((answer.argmax(-1) == target)[there].float().mean().item())
    return loss, right


def train(folder: Path, steps: int = 4300, batch: int = 32, rate: float = 1.2e-3) -> None:
    """Train (or resume) the tower, and write `vision.pt` to `folder`."""
    torch.manual_seed(0)
    reader = PatchReader()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    file, step = folder / "vision.pt", 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        reader.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        step = saved["step"]
    data = iter(DataLoader(PatchData(step, batch), batch_size=None, num_workers=1, prefetch_factor=4))
    begun, started_at = time.time(), step
    while step < steps:
        pixels, labels = next(data)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader(pixels)
        loss, right = patch_loss(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 25 == 0 or step == steps:
            pace = (time.time() - begun) / (step - started_at)
            names = " ".join(f"{n}={r:.3f}" for n, r in zip(QUESTIONS, right, strict=True))
            print(f"vision {step}/{steps} loss {loss.item():.3f} {names} ({pace:.2f} s/step)", flush=True)
        if step % 200 == 0 or step == steps:
            scratch = file.with_suffix(".tmp")
            torch.save({"model": reader.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, scratch)
            scratch.replace(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=4300)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    train(arguments.folder, arguments.steps)
