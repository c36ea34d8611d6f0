"""Train the second target's tower: dense labels for every token, and features of the first target to imitate.

As in vision.py, every token predicts which object covers it, and the heads are removed afterwards. Two things differ. A
tower with rotary positions only sees relative places, never absolute ones. So it predicts the offset to the object's
centre, and the language model predicts places (see qwen_target.py). And its tokens are read by a language model that is
initialised from the first target's. So they are pulled towards the features that the first target's projector returns
for the same places.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel as Tower,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm as Qwen2RMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from model.demo import qwen, scenes
from model.demo.motion import MOTION_QUESTIONS, motion_labels, motion_loss
from model.demo.training import Numbered, Training
from model.demo.vision import GRID, QUESTIONS, SIDE, normalised, patch_labels, patch_loss, weathered

REACH = 2  # largest offset to an object's centre in tokens
TOWER_QUESTIONS = {q: n for q, n in QUESTIONS.items() if q not in ("cell", "x", "y")} | {
    "x to the centre": 2 * REACH + 2,
    "y to the centre": 2 * REACH + 2,
}


class Views(NamedTuple):
    """Hold the position inputs of the tower for a batch of square frames; they depend only on the number of frames."""

    cos: torch.Tensor
    sin: torch.Tensor
    order: torch.Tensor  # permutation of the tokens, window by window
    back: torch.Tensor
    frames: int
    windows: int


def views(config: Qwen2_5_VLVisionConfig, frames: int) -> Views:
    """Compute the rotary embeddings and window order for `frames` square frames."""
    grid = torch.tensor([[1, GRID * qwen.MERGE, GRID * qwen.MERGE]] * frames)
    order, ends = get_vision_window_index(
        grid, spatial_merge_size=qwen.MERGE, window_size=config.window_size, patch_size=qwen.PATCH
    )
    rotary = Qwen2_5_VLVisionRotaryEmbedding(config)
    places = get_vision_position_ids(grid, qwen.MERGE)
    cos, sin = (
        wave.unflatten(0, (-1, qwen.MERGE**2))[order].flatten(0, 1).bfloat16()
        for wave in rotary(torch.zeros(1), places)
    )
    return Views(cos, sin, order, order.argsort(), frames, len(ends) - 1)


def normed(norm: Qwen2RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    """Apply an RMSNorm in float32, under autocast as well."""
    return F.rms_norm(hidden.float(), (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embeddings to queries or keys."""
    a, b = states.chunk(2, -1)
    return states * cos + torch.cat((-b, a), -1) * sin


@cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a function in torch.compile with static shapes: each new shape is compiled again, and training has few."""
    return torch.compile(function, dynamic=False)


def tokens_of(tower: Tower, pixels: torch.Tensor, view: Views) -> torch.Tensor:
    """Compute `tower(pixels, grid).pooler_output` faster, for square frames of SIDE pixels.

    All windows have the same length, so attention is one call instead of hundreds, and the patch embedding is a matrix
    product instead of a convolution. Compiling it makes it faster still. A test compares it with the tower's own
    forward.
    """
    hidden = F.linear(pixels, tower.patch_embed.proj.weight.flatten(1))
    hidden = hidden.unflatten(0, (-1, qwen.MERGE**2))[view.order].flatten(0, 1)
    for number, block in enumerate(tower.blocks):
        parts = view.frames if number in tower.fullatt_block_indexes else view.windows
        heads, width = block.attn.num_heads, block.attn.head_dim
        qkv = block.attn.qkv(normed(block.norm1, hidden)).reshape(parts, -1, 3, heads, width).permute(2, 0, 3, 1, 4)
        cos, sin = view.cos.view(parts, 1, -1, width), view.sin.view(parts, 1, -1, width)
        attended = F.scaled_dot_product_attention(turned(qkv[0], cos, sin), turned(qkv[1], cos, sin), qkv[2])
        hidden = hidden + block.attn.proj(attended.transpose(1, 2).reshape(hidden.shape[0], -1))
        inner = normed(block.norm2, hidden)
        hidden = hidden + block.mlp.down_proj(F.silu(block.mlp.gate_proj(inner)) * block.mlp.up_proj(inner))
    merger = tower.merger
    return merger.mlp(normed(merger.ln_q, hidden).view(-1, merger.hidden_size))[view.back]


def tower_labels(labels: np.ndarray) -> np.ndarray:
    """Convert patch_labels' classes (..., GRID * GRID, questions) to those of TOWER_QUESTIONS."""
    columns = dict(zip(QUESTIONS, np.moveaxis(labels, -1, 0), strict=True))
    own = {"x": np.arange(GRID * GRID) % GRID, "y": np.arange(GRID * GRID) // GRID}
    for axis, place in own.items():
        way = np.clip(columns[axis] - 1 - place, -REACH, REACH) + REACH + 1
        columns[f"{axis} to the centre"] = np.where(columns[axis] > 0, way, 0)
    return np.stack([columns[q] for q in TOWER_QUESTIONS], -1)


class PairData(Numbered[dict[str, torch.Tensor]]):
    """Yield batches without end from number `first` on: two frames of a clip, or an image twice."""

    def __init__(self, first: int, batch: int) -> None:
        self.first, self.batch_size = first, batch

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Draw batch `index`: pixels, normalised frames, and labels of scene and motion."""
        pixels, frames, labels, motions = [], [], [], []
        for i in range(index * self.batch_size, (index + 1) * self.batch_size):
            rng = random.Random(i)
            if i % 2:
                scene, now = scenes.random_video_scene(scenes.scene_seed("train", "video", i)), rng.uniform(0.2, 1.0)
                moments = [now - rng.choice((0.2, 0.2, 1 / 3, 1 / 7)), now]
                moments[0] = max(0.0, moments[0])
                pair = np.stack([weathered(scenes.render(scene, SIDE, m), rng) for m in moments])
                moved = motion_labels(scene, moments)[1]
                moved[:, [q.startswith(("frame", "what")) or "first" in q for q in MOTION_QUESTIONS]] = -100
            else:
                scene, now = scenes.random_image_scene(scenes.scene_seed("train", "image", i)), 0.0
                pair = np.stack([weathered(scenes.render(scene, SIDE), rng)] * 2)
                moved = np.full((GRID * GRID, len(MOTION_QUESTIONS)), -100)
            pixels.append(qwen.patches(pair))
            frames.append(pair[1])
            labels.append(tower_labels(patch_labels(scene, now)))
            motions.append(moved)
        return {
            "pixels": torch.cat(pixels),
            "frames": normalised(np.stack(frames)),
            "labels": torch.from_numpy(np.stack(labels)),
            "motions": torch.from_numpy(np.concatenate(motions)),
        }


class TokenReader(nn.Module):
    """Read the tower's tokens with two linear heads: one for the scene's questions, one for those about motion."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scene = nn.Linear(width, sum(TOWER_QUESTIONS.values()))
        self.motion = nn.Linear(width, sum(MOTION_QUESTIONS.values()))


def first_features(first: LlavaForConditionalGeneration, frames: torch.Tensor) -> torch.Tensor:
    """Compute the first target's projected image features of frames (n, 3, SIDE, SIDE): (n * tokens, width)."""
    with torch.no_grad():
        seen = first.model.vision_tower(frames.to(first.dtype)).last_hidden_state[:, 1:]
        return first.model.multi_modal_projector(seen).flatten(0, 1).float()


def likeness_loss(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared difference in units of the variance of the wanted features."""
    return F.mse_loss(tokens.float(), wanted) / wanted.var()


def tower_optimisers(tower: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Create Muon for the weights of linear layers and AdamW for all other parameters."""
    matrices = [p for m in tower.modules() if isinstance(m, nn.Linear) for p in [m.weight]]
    apart = {id(p) for p in matrices}
    others = [p for p in tower.parameters() if id(p) not in apart]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
    ]


def train(folder: Path, first_folder: Path, steps: int, batch: int = 24, rate: float = 2e-3) -> None:
    """Train (or resume) the tower, and write `qwen-vision.pt` to `folder`."""
    first = LlavaForConditionalGeneration.from_pretrained(first_folder, dtype=torch.bfloat16).eval()
    tokenizer = qwen.renamed_tokenizer(PreTrainedTokenizerFast.from_pretrained(first_folder))
    tower = qwen.new_target(qwen.target_config(tokenizer)).model.visual
    reader = TokenReader(tower.config.out_hidden_size)
    optimisers = [
        *tower_optimisers(tower, rate),
        torch.optim.AdamW(reader.parameters(), lr=rate, betas=(0.9, 0.98), fused=True),
    ]
    training = Training(folder / "qwen-vision.pt", steps, {"model": tower, "heads": reader}, optimisers)
    data = iter(DataLoader(PairData(training.step, batch), batch_size=None, num_workers=1, prefetch_factor=4))
    view = views(tower.config, batch)
    while training.step < steps:
        example = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = compiled(tokens_of)(tower, example["pixels"], view)
            answers, moved = reader.scene(tokens), reader.motion(tokens)
        answers = answers.float().unflatten(0, (batch, -1)).split(list(TOWER_QUESTIONS.values()), -1)
        dense, right = patch_loss(list(answers), example["labels"])
        motion, by_kind = motion_loss(moved, example["motions"])
        alike = likeness_loss(tokens, first_features(first, example["frames"]))
        training.learn(dense + 0.5 * motion + alike, [tower.parameters()])
        if training.step % 20 == 0 or training.step == steps:
            names = " ".join(f"{n}={r:.3f}" for n, r in zip(TOWER_QUESTIONS, right, strict=True))
            moves = " ".join(f"{t:.2f}" for t in by_kind[1:3])
            print(
                f"tower {training.step}/{steps} dense {dense.item():.3f} alike {alike.item():.3f} {names} "
                f"motion {moves} ({training.pace})",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--first", type=Path, default=Path("runs/demo/target"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    train(arguments.folder, arguments.first, arguments.steps, rate=arguments.rate)
