"""Measure how well the bundled target sees: compare its captions of held-out scenes with the scenes.

Answers come from transformers' `generate`, greedy, so that the figures are about the model and not about our engine.
`python -m model.demo.evaluate CHECKPOINT` prints them. The `evaluation.json` beside the bundled weights covers all
scenes and clips, and was written when they were built.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from model.demo import captions, qwen, scenes

SIDE = 192
BATCH = 16
VIDEO_FRAMES = 6


def prompt(question: str, num_frames: int, *, video: bool) -> str:
    """Write the first target's prompt for a question about an image or a clip."""
    marker = "<|video|>" if video else ""
    return f"<s><|user|>{marker}{'<image>' * num_frames}{question}<|end|><|assistant|>"


def _answers(folder: Path, clips: list[np.ndarray], question: str, *, video: bool, progress: bool) -> list[str]:
    """Answer one question about each clip (frames, SIDE, SIDE, 3), greedily; an image is a clip of one frame."""
    inputs: Callable[[list[np.ndarray]], Mapping[str, torch.Tensor]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if AutoConfig.from_pretrained(folder).model_type == "qwen2_5_vl":

        def inputs(group: list[np.ndarray]) -> Mapping[str, torch.Tensor]:
            return qwen.inputs(tokenizer, group, question, video=video)
    else:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        processor.tokenizer.padding_side = "left"

        def inputs(group: list[np.ndarray]) -> Mapping[str, torch.Tensor]:
            texts = [prompt(question, len(clip), video=video) for clip in group]
            images = [Image.fromarray(frame) for clip in group for frame in clip]
            return processor(text=texts, images=images, return_tensors="pt", add_special_tokens=False)

    target = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    answers: list[str] = []
    for start in tqdm(range(0, len(clips), BATCH), desc="video" if video else "image", disable=not progress):
        batch = inputs(clips[start : start + BATCH])
        with torch.inference_mode():
            out = target.generate(**batch, max_new_tokens=140, do_sample=False)
        answers += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def image_scores(folder: Path, count: int, *, progress: bool = False) -> dict[str, float]:
    """Score captions of `count` held-out images.

    precision: share of named objects that exist with that colour, shape and cell. recall: share of existing objects
    that are named so. with_size_and_texture: share of existing objects that are also named with the right size and
    texture. perfect_captions: share of captions that name all objects so, and no others.
    """
    drawn = [scenes.random_image_scene(scenes.scene_seed("heldout", "image", i)) for i in range(count)]
    frames = [scenes.render(s, SIDE)[None] for s in drawn]
    texts = _answers(folder, frames, captions.DETAILED[0], video=False, progress=progress)
    named = there = right = whole = perfect = 0
    for scene, text in zip(drawn, texts, strict=True):
        claims = captions.named_objects(text)
        truth = {(t.colour, t.shape, captions.cell_name(t.row, t.column)): t for t in scene.things}
        found = {(c.colour, c.shape, captions.claimed_place(c)): c for c in claims}
        hits = truth.keys() & found.keys()
        full = [k for k in hits if (truth[k].size, truth[k].texture) == (found[k].size, found[k].texture)]
        named, there, right, whole = named + len(claims), there + len(truth), right + len(hits), whole + len(full)
        perfect += len(full) == len(truth) == len(claims)
    return {
        "scenes": count,
        "objects": there,
        "precision": round(right / max(1, named), 4),
        "recall": round(right / max(1, there), 4),
        "with_size_and_texture": round(whole / max(1, there), 4),
        "perfect_captions": round(perfect / count, 4),
    }


def video_scores(folder: Path, count: int, *, progress: bool = False) -> dict[str, float]:
    """Score captions of `count` held-out clips.

    named: share of objects that are named with the right colour and shape. motions: share of objects whose motion is
    described right as well (kind, direction, speed, lane).
    """
    drawn = [scenes.random_video_scene(scenes.scene_seed("heldout", "video", i)) for i in range(count)]
    frames = [scenes.render_clip(s, VIDEO_FRAMES, SIDE) for s in drawn]
    texts = _answers(folder, frames, captions.VIDEO[0], video=True, progress=progress)
    there = named = right = 0
    for scene, text in zip(drawn, texts, strict=True):
        described = {(c.colour, c.shape): c.rest for c in captions.named_objects(text)}
        there += len(scene.things)
        named += sum((t.colour, t.shape) in described for t in scene.things)
        right += sum(described.get((t.colour, t.shape)) == captions.moving(scene, t) for t in scene.things)
    return {"clips": count, "objects": there, "named": round(named / there, 4), "motions": round(right / there, 4)}


def main() -> None:
    """Print the scores of a checkpoint as JSON, and write them to --output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(__file__).parent / "weights" / "target")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--output", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    result = {
        "image": image_scores(arguments.checkpoint, arguments.scenes, progress=True),
        "video": video_scores(arguments.checkpoint, arguments.clips, progress=True),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
