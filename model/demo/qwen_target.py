"""Train the second target's language model to talk about images and clips, on its trained tower (see qwen_vision.py).

It is initialised with nine of the first target's layers above one new layer. The new layer has to work out the place of
each token: the first target's tower encodes places, this one cannot. So at first the states above it are pulled towards
the features that the first target's layers expect, and the states above the next layer are trained to predict places.
Motion is predicted half way up, as in the first target (motion.py).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from model.demo import qwen
from model.demo.conversations import Conversations, Style
from model.demo.evaluate import image_scores, video_scores
from model.demo.motion import MOTION_QUESTIONS, motion_labels, motion_loss
from model.demo.qwen_vision import (
    TOWER_QUESTIONS,
    TokenReader,
    compiled,
    first_features,
    likeness_loss,
    normed,
    tokens_of,
    tower_labels,
    tower_optimisers,
    turned,
    views,
)
from model.demo.training import Training
from model.demo.vision import GRID, QUESTIONS, normalised, patch_labels, patch_loss

# The first target's layers whose removal raised its loss most; found greedily, one at a time.
KEPT = (0, 1, 3, 4, 7, 8, 10, 12, 13)
WHERE, MOVED = 2, 5  # the place and motion heads read the states above this many layers
DENSE, PLACES, MOTION = 0.1, 0.1, 0.1  # weights of the dense losses; the weight of the answers is 1
STRETCHED = 0.12  # share of single-image batches in another size
INTERVALS = ((0.5, 1.0, 2.0), (1, 4, 1))  # seconds between pairs of frames, and their weights


def style(tokenizer: PreTrainedTokenizerFast) -> Style:
    """Build the Qwen chat template's style: an image or clip stands between vision start and end tokens."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    start, image, end, video = ids("<|vision_start|><|image_pad|><|vision_end|><|video_pad|>")

    def media(kind: str, num_frames: int) -> list[int]:
        """Return the tokens of a sample's media."""
        if kind == "video":
            return [start, *[video] * (GRID * GRID * num_frames // qwen.FRAMES_PER_PATCH), end]
        return [start, *[image] * GRID * GRID, end] * num_frames

    return Style(
        opening=[],
        before=ids("<|im_start|>user\n"),
        between=ids("<|im_end|>\n<|im_start|>assistant\n"),
        end=ids("<|im_end|>"),
        after=ids("\n"),
        media=media,
        text_tokens=216,
        frame_counts=((4, 6, 8), (8, 12, 1)),
    )


class QwenConversations(Conversations):
    """Yield batches: input_ids, labels (batch, tokens); positions (3, batch, tokens); pixels and grid.

    Batches without resized images also have frames and patch labels; batches of clips have motion labels.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, config: Qwen2_5_VLConfig, first: int, image_only: int
    ) -> None:
        super().__init__(tokenizer, style(tokenizer), first, image_only)
        self.image, self.video = config.image_token_id, config.video_token_id
        with torch.device("meta"):
            self.places = Qwen2_5_VLModel(config)  # without weights: only its get_rope_index is used

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Convert batch `index` to tensors."""
        drawn = self.draw(index)
        rng, video = drawn.rng, drawn.kind == "video"
        rows, clips = drawn.rows, [c if video else c.repeat(qwen.FRAMES_PER_PATCH, 0) for c in drawn.clips]
        stretched = drawn.kind == "image" and rng.random() < STRETCHED
        if stretched:
            down, across = rng.choice([(d, a) for d in range(6, 17) for a in range(6, 17) if 64 <= d * a <= 144])
            size = (across * qwen.CELL, down * qwen.CELL)
            clips = [np.stack([np.asarray(Image.fromarray(f).resize(size, 3)) for f in c]) for c in clips]
            rows = [self._resized(row, down * across) for row in rows]
        # Padded to the largest width, so that there are few batch shapes to compile.
        most = len(self.style.media(drawn.kind, drawn.num_frames)) + self.style.text_tokens
        ids, labels = self.padded(rows, -(-most // 32) * 32)
        grid = torch.tensor([qwen.grid(c) for c in clips])
        times = torch.tensor(rng.choices(*INTERVALS, k=len(clips)))
        positions, _ = self.places.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.image).int() + 2 * (ids == self.video).int(),
            image_grid_thw=None if video else grid,
            video_grid_thw=grid if video else None,
            second_per_grid_ts=times if video else None,
        )
        batch = {
            "input_ids": ids,
            "labels": labels,
            "positions": positions,
            "pixels": torch.cat([qwen.patches(c) for c in clips]),
            "grid": grid,
        }
        if not stretched:
            step = qwen.FRAMES_PER_PATCH if video else 1
            moments = [m[step - 1 :: step] for m in drawn.moments]
            batch["frames"] = normalised(np.concatenate([c[1 :: qwen.FRAMES_PER_PATCH] for c in clips]))
            batch["patches"] = torch.from_numpy(np.stack([patch_labels(*m) for row in moments for m in row]))
        if video:
            moved = [motion_labels(row[0][0], [m for _, m in row])[1::2] for row in drawn.moments]
            batch["motions"] = torch.from_numpy(np.concatenate(moved).reshape(-1, len(MOTION_QUESTIONS)))
        return batch

    def _resized(self, row: tuple[list[int], list[int]], tokens: int) -> tuple[list[int], list[int]]:
        """Change the number of a conversation's image tokens to `tokens`."""
        if self.image not in row[0]:
            return row
        at = row[0].index(self.image)
        ids, labels = ([*part[:at], *[part[at]] * tokens, *part[at + GRID * GRID :]] for part in row)
        return ids, labels


@torch.no_grad()
def borrow(target: Qwen2_5_VLForConditionalGeneration, first: LlavaForConditionalGeneration) -> None:
    """Initialise embeddings, lm_head, norm and layers from the first target.

    MLPs are narrower here, so each keeps the hidden units with the largest weights.
    """
    text, source = target.model.language_model, first.model.language_model
    text.embed_tokens.weight.copy_(source.embed_tokens.weight)
    target.lm_head.weight.copy_(first.lm_head.weight)
    text.norm.weight.copy_(source.norm.weight)
    bottom = text.layers[0].self_attn
    for bias in (bottom.q_proj.bias, bottom.k_proj.bias):  # so that heads start with attention at different distances
        bias.normal_(generator=torch.Generator().manual_seed(2))
    for layer, number in zip(text.layers[1:], KEPT, strict=True):
        old = source.layers[number]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).weight.copy_(getattr(old.self_attn, name).weight)
        mlp, weight = old.mlp, old.mlp.up_proj.weight.norm(dim=1) * old.mlp.down_proj.weight.norm(dim=0)
        units = weight.topk(layer.mlp.intermediate_size).indices.sort().values
        layer.mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[units])
        layer.mlp.up_proj.weight.copy_(mlp.up_proj.weight[units])
        layer.mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, units])
        layer.input_layernorm.weight.copy_(old.input_layernorm.weight)
        layer.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)


def above(layer: Qwen2_5_VLDecoderLayer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Compute the states above a decoder layer, as `layer` itself does, but in a form that compiles.

    hidden: (batch, tokens, width). All rows begin at position 0, so the causal mask needs no padding mask.
    """
    attention, mlp = layer.self_attn, layer.mlp
    inner = normed(layer.input_layernorm, hidden)
    q, k, v = (
        proj(inner).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    attended = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, is_causal=True)
    hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
    inner = normed(layer.post_attention_layernorm, hidden)
    return hidden + mlp.down_proj(F.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner))


class Heads(nn.Module):
    """Hold the heads that are removed after training: those of the tower and of the language model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = TokenReader(width)
        self.places = nn.Linear(width, sum(QUESTIONS.values()))
        self.motion = nn.Linear(width, sum(MOTION_QUESTIONS.values()))


@dataclass
class Losses:
    """Hold the losses of one batch, and the accuracies for the log."""

    answers: torch.Tensor
    dense: torch.Tensor
    likeness: torch.Tensor
    accuracy: float
    right: list[float]  # shape from the tower; x and y from the language model
    motions: list[float]


def losses(
    target: Qwen2_5_VLForConditionalGeneration,
    heads: Heads,
    batch: dict[str, torch.Tensor],
    first: LlavaForConditionalGeneration | None,
) -> Losses:
    """Compute the losses of one batch: cross-entropy over answer tokens, and the dense losses.

    first: the first target, for the likeness loss; None skips it. Dense losses need frames of the usual size.
    """
    text, tower, config = target.model.language_model, target.model.visual, target.config
    square = "frames" in batch
    if square:
        tokens = compiled(tokens_of)(tower, batch["pixels"], views(tower.config, len(batch["frames"])))
    else:
        tokens = tower(batch["pixels"], batch["grid"]).pooler_output
    ids = batch["input_ids"]
    medium = (ids == config.image_token_id) | (ids == config.video_token_id)
    hidden = text.embed_tokens(ids)
    hidden = hidden.masked_scatter(medium[:, :, None].expand_as(hidden), tokens.to(hidden.dtype))
    cos, sin = (wave[:, None].bfloat16() for wave in text.rotary_emb(hidden, batch["positions"]))
    states = [hidden]
    for layer in text.layers:
        states.append(compiled(above)(layer, states[-1], cos, sin))
    wanted = batch["labels"][:, 1:]
    labelled = wanted != -100
    logits = target.lm_head(normed(text.norm, states[-1][:, :-1][labelled])).float()
    accuracy = (logits.argmax(-1) == wanted[labelled]).float().mean().item()
    dense, likeness, right, moved = torch.zeros(()), torch.zeros(()), [math.nan] * 3, [math.nan] * len(MOTION_QUESTIONS)
    if square:
        seen = heads.tower.scene(tokens).float().unflatten(0, (len(batch["frames"]), -1))
        by_tower = torch.from_numpy(tower_labels(batch["patches"].numpy()))
        loss, shares = patch_loss(list(seen.split(list(TOWER_QUESTIONS.values()), -1)), by_tower)
        placed = heads.places(states[WHERE][medium]).float().unflatten(0, (len(batch["frames"]), -1))
        there, at = patch_loss(list(placed.split(list(QUESTIONS.values()), -1)), batch["patches"])
        dense = DENSE * loss + PLACES * there
        right = [shares[0], at[list(QUESTIONS).index("x")], at[list(QUESTIONS).index("y")]]
        if first is not None:
            likeness = likeness_loss(states[1][medium], first_features(first, batch["frames"]))
    if "motions" in batch:
        loss, moved = motion_loss(heads.motion(states[MOVED][medium]), batch["motions"])
        dense = dense + MOTION * loss
    return Losses(F.cross_entropy(logits, wanted[labelled]), dense, likeness, accuracy, right, moved)


def train(folder: Path, first_folder: Path, steps: int, image_only: int, borrowed: int, rate: float) -> None:
    """Train (or resume) the target from `folder`/qwen-vision.pt, and write a checkpoint to `folder`/qwen-target."""
    torch._dynamo.config.recompile_limit = 64  # several functions, a few batch shapes each
    first = LlavaForConditionalGeneration.from_pretrained(first_folder, dtype=torch.float32).eval()
    tokenizer = qwen.renamed_tokenizer(PreTrainedTokenizerFast.from_pretrained(first_folder))
    target = qwen.new_target(qwen.target_config(tokenizer))
    borrow(target, first)
    first.to(torch.bfloat16)
    seen = torch.load(folder / "qwen-vision.pt", weights_only=True)
    text, tower = target.model.language_model, target.model.visual
    tower.load_state_dict(seen["model"])
    heads = Heads(target.config.text_config.hidden_size)
    heads.tower.load_state_dict(seen["heads"])
    matrices = [p for p in text.layers.parameters() if p.ndim == 2]
    apart = {id(p) for p in [*tower.parameters(), *matrices]}
    others = [p for p in target.parameters() if id(p) not in apart] + [*heads.parameters()]
    optimisers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.7 * rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
        *tower_optimisers(tower, 0.4 * rate),
    ]
    training = Training(folder / "qwen-target.pt", steps, {"model": target, "heads": heads}, optimisers)
    batches = QwenConversations(tokenizer, target.config, training.step, image_only)
    data = iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))
    recent: list[tuple[float, ...]] = []
    while training.step < steps:
        borrowing = max(0.0, 1 - training.step / max(1, borrowed))
        with torch.autocast("cpu", torch.bfloat16):
            now = losses(target, heads, next(data), first if borrowing else None)
        loss = now.answers + now.dense + borrowing * now.likeness
        training.learn(loss, [[*matrices, *others], tower.parameters()])
        figures = (
            now.answers.item(),
            now.accuracy,
            now.dense.item(),
            now.likeness.item(),
            *now.right,
            *now.motions,
        )
        recent = [*recent[-39:], figures]
        if training.step % 20 == 0:
            means = np.nanmean(recent, 0)
            print(
                f"target {training.step}/{steps} loss {means[0]:.4f} right {means[1]:.4f} dense {means[2]:.2f} "
                f"alike {means[3]:.2f} shape, x, y {' '.join(f'{m:.3f}' for m in means[4:7])} "
                f"motion {' '.join(f'{m:.2f}' for m in means[7:])} ({training.pace})",
                flush=True,
            )
        if training.step % 300 == 0:
            qwen.save(target, tokenizer, folder / "qwen-target")
            print(
                "  held out:",
                image_scores(folder / "qwen-target", 24),
                video_scores(folder / "qwen-target", 16) if training.step > image_only else "",
                flush=True,
            )
    qwen.save(target, tokenizer, folder / "qwen-target")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--first", type=Path, default=Path("runs/demo/target"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--image-only", type=int, default=150)
    parser.add_argument("--borrowed", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    train(
        arguments.folder,
        arguments.first,
        arguments.steps,
        arguments.image_only,
        arguments.borrowed,
        arguments.rate,
    )
