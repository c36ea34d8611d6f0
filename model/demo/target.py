"""Second stage of the bundled model: train the language model to talk about what the tower sees.

The tower is trained further, on the answers and, with a smaller weight, on its dense labels (see vision.py).
conversations.py draws the conversations.
"""

from __future__ import annotations

import argparse
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from model.demo.checkpoint import (
    ASSISTANT,
    BOS,
    END,
    IMAGE,
    TOKENS_PER_IMAGE,
    USER,
    VIDEO,
    new_target,
    processor,
    target_config,
    train_tokenizer,
)
from model.demo.conversations import Conversations, Style
from model.demo.evaluate import image_scores, video_scores
from model.demo.motion import LAYER, MOTION_QUESTIONS, motion_labels, motion_loss
from model.demo.training import Training
from model.demo.vision import QUESTIONS, PatchReader, normalised, patch_labels, patch_loss

DENSE, MOTION = 0.15, 0.1  # weights of the dense losses; the weight of the answers is 1


def style(tokenizer: PreTrainedTokenizerFast) -> Style:
    """Build the style of the first target's chat template: a clip is a marker and then its frames, each an image."""
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in (BOS, END, IMAGE, VIDEO, USER, ASSISTANT)}

    def media(kind: str, num_frames: int) -> list[int]:
        return [ids[VIDEO]] * (kind == "video") + [ids[IMAGE]] * (TOKENS_PER_IMAGE * num_frames)

    return Style([ids[BOS]], [ids[USER]], [ids[END], ids[ASSISTANT]], [ids[END]], [], media)


class LlavaConversations(Conversations):
    """Yield batches: input_ids, labels (batch, tokens); pixel_values (frames, 3, SIDE, SIDE); patch labels.

    Batches of clips have motion labels, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, first: int, image_only: int, image_batch: int = 16) -> None:
        super().__init__(tokenizer, style(tokenizer), first, image_only, image_batch)

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Convert batch `index` to tensors."""
        drawn = self.draw(index)
        ids, labels = self.padded(drawn.rows)
        batch = {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": normalised(np.concatenate(drawn.clips)),
            "patches": torch.from_numpy(np.stack([patch_labels(*m) for row in drawn.moments for m in row])),
        }
        if drawn.kind == "video":
            motions = [motion_labels(row[0][0], [moment for _, moment in row]) for row in drawn.moments]
            batch["motions"] = torch.from_numpy(np.concatenate(motions))
        return batch


@dataclass
class Losses:
    """Hold the losses of one batch, and the accuracies for the log."""

    answers: torch.Tensor
    dense: torch.Tensor
    motion: torch.Tensor
    accuracy: float
    shapes: float
    motions: list[float]


def losses(
    target: LlavaForConditionalGeneration, heads: nn.Linear, motion_head: nn.Linear, batch: dict[str, torch.Tensor]
) -> Losses:
    """Compute the losses of one batch: cross-entropy over answer tokens, and the dense losses."""
    seen = target.model.vision_tower(batch["pixel_values"]).last_hidden_state[:, 1:]
    embeds = target.model.language_model.embed_tokens(batch["input_ids"])
    features = target.model.multi_modal_projector(seen).flatten(0, 1).to(embeds.dtype)
    is_image = batch["input_ids"] == target.config.image_token_index
    embeds = embeds.masked_scatter(is_image[:, :, None].expand_as(embeds), features)
    out = target.model.language_model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
    wanted = batch["labels"][:, 1:]
    labelled = wanted != -100
    logits = target.lm_head(out.last_hidden_state[:, :-1][labelled]).float()
    dense, right = patch_loss(list(heads(seen).float().split(list(QUESTIONS.values()), -1)), batch["patches"])
    motion, moved = torch.zeros(()), [math.nan] * len(MOTION_QUESTIONS)
    if "motions" in batch:
        motion, moved = motion_loss(motion_head(out.hidden_states[LAYER][is_image]), batch["motions"].flatten(0, 1))
    accuracy = (logits.argmax(-1) == wanted[labelled]).float().mean().item()
    return Losses(F.cross_entropy(logits, wanted[labelled]), dense, motion, accuracy, right[0], moved)


@torch.no_grad()
def wire_heads(
    target: LlavaForConditionalGeneration, heads: nn.Linear, questions: tuple[str, ...], seen: torch.Tensor
) -> None:
    """Initialise the least used units of the projector with the dense heads of these questions.

    Without this the language model learnt sizes, textures and shapes, but no colours even after 800 steps, although a
    linear map reads colours from the tower: their signal is small. seen: (patches, width), a sample of the tower's
    states.
    """
    projector = target.model.multi_modal_projector
    starts = dict(zip(QUESTIONS, np.cumsum([0, *QUESTIONS.values()]).tolist(), strict=False))
    rows = torch.cat([torch.arange(starts[q], starts[q] + QUESTIONS[q]) for q in questions])
    use = projector.act(projector.linear_1(seen)).std(0) * projector.linear_2.weight.norm(dim=0)
    units = use.argsort()[: len(rows)]
    read = heads.weight[rows] @ seen.T + heads.bias[rows][:, None]
    scale = 2.0 / read.std(1)
    projector.linear_1.weight[units] = heads.weight[rows] * scale[:, None]
    projector.linear_1.bias[units] = (heads.bias[rows] - read.mean(1)) * scale
    now = projector.linear_2(projector.act(projector.linear_1(seen))).std()
    columns = torch.randn(projector.linear_2.weight.shape[0], len(rows), generator=torch.Generator().manual_seed(1))
    projector.linear_2.weight[:, units] = columns * now * 0.35


def train(folder: Path, steps: int, image_only: int, rate: float = 1.5e-3) -> None:
    """Train (or resume) the target from `folder`/vision.pt, and write a LLaVA checkpoint to `folder`/target."""
    begun = (folder / "target.pt").exists()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "target") if begun else train_tokenizer()
    target = new_target(target_config(tokenizer))
    reader = PatchReader()
    reader.load_state_dict(torch.load(folder / "vision.pt", weights_only=True)["model"])
    target.model.vision_tower.load_state_dict(reader.tower.state_dict())
    heads = reader.heads
    sample = LlavaConversations(tokenizer, 0, 0).batch(0)["pixel_values"][:16]
    wire_heads(target, heads, ("colour",), target.model.vision_tower(sample).last_hidden_state[:, 1:].flatten(0, 1))
    motion_head = nn.Linear(target.config.text_config.hidden_size, sum(MOTION_QUESTIONS.values()))
    seeing = [*target.model.vision_tower.parameters(), *heads.parameters()]
    matrices = [p for p in target.model.language_model.layers.parameters() if p.ndim == 2]
    apart = {id(p) for p in [*seeing, *matrices]}
    others = [p for p in target.parameters() if id(p) not in apart] + [*motion_head.parameters()]
    # Muon for the decoder's matrices: its loss after 40 steps took AdamW about twice as many.
    optimisers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.7 * rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
        torch.optim.AdamW(seeing, lr=0.1 * rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True),
    ]
    modules = {"model": target, "heads": heads, "motion_head": motion_head}
    training = Training(folder / "target.pt", steps, modules, optimisers)
    batches = LlavaConversations(tokenizer, training.step, image_only)
    data = iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))
    recent: list[tuple[float, ...]] = []
    while training.step < steps:
        with torch.autocast("cpu", torch.bfloat16):
            now = losses(target, heads, motion_head, next(data))
        loss = now.answers + DENSE * now.dense + MOTION * now.motion
        training.learn(loss, [[*matrices, *others], seeing])
        step = training.step
        recent = [
            *recent[-39:],
            (now.answers.item(), now.accuracy, now.dense.item(), now.shapes, *now.motions),
        ]
        if step % 20 == 0:
            means = np.nanmean(recent, 0)
            print(
                f"target {step}/{steps} loss {means[0]:.4f} right {means[1]:.4f} dense {means[2]:.2f} "
                f"shape {means[3]:.3f} motion {' '.join(f'{m:.2f}' for m in means[4:])} ({training.pace})",
                flush=True,
            )
        if step % 300 == 0 and step > image_only // 2:
            target.eval()
            save_target(target, tokenizer, folder / "target")
            print(
                "  held out:",
                image_scores(folder / "target", 24),
                video_scores(folder / "target", 16) if step > image_only else "",
                flush=True,
            )
            target.train()
    save_target(target, tokenizer, folder / "target")


def save_target(target: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bfloat16, with its processor."""
    shipped = new_target(target.config)
    shipped.load_state_dict(target.state_dict())
    shipped.to(torch.bfloat16).save_pretrained(folder)
    # safetensors makes its file readable by the owner only.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    processor(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--image-only", type=int, default=600)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.steps, arguments.image_only, arguments.rate)
