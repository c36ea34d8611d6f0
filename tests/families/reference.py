"""Answers by transformers alone: its own processor, chat template, model class and `generate`; none of our code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from model.request import Medium, Message


@dataclass(frozen=True)
class Answer:
    """prompt: its token ids; tokens: the answer's; logits: (tokens, vocabulary) in the reference's precision."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor


class Reference:
    """A checkpoint as transformers' users run it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> None:
        """backend: of the image processor, "pil" or "torchvision"; None for transformers' own choice."""
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        if backend is not None:
            self.processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.dtype = dtype

    def inputs(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Tokenise a conversation and process its media by the family's processor."""
        turns, metadata = [], []
        for message in messages:
            parts: list[dict[str, Any]] = []
            for part in message.content:
                if not isinstance(part, Medium):
                    parts.append({"type": "text", "text": part})
                elif part.kind == "image":
                    parts.append({"type": "image", "image": Image.fromarray(part.frames[0])})
                else:
                    parts.append({"type": "video", "video": part.frames})
                    metadata.append(video_metadata(part))
            turns.append({"role": message.role, "content": parts})
        options = {"do_sample_frames": False, "video_metadata": metadata} if metadata else {}
        inputs = self.processor.apply_chat_template(
            turns,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs=options,
        )
        return {
            name: value.to(self.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in inputs.items()
            if name != "video_metadata"
        }

    @torch.inference_mode()
    def answer(self, messages: Sequence[Message], num_tokens: int) -> Answer:
        """Answer greedily with `num_tokens` tokens, past any end of sequence."""
        inputs = self.inputs(messages)
        ids = inputs["input_ids"]
        self.model.generation_config.eos_token_id = None
        out = self.model.generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, ids.shape[1] :].tolist()
        return Answer(ids[0].tolist(), tokens, torch.stack(out.logits)[:, 0])

    @torch.inference_mode()
    def logits(self, messages: Sequence[Message], answer: Sequence[int]) -> Tensor:
        """Compute the logits (vocabulary,) of the token after `answer` in one pass, without a cache."""
        inputs = self.inputs(messages)
        tokens = torch.tensor([list(answer)], dtype=torch.long)
        length = inputs["input_ids"].shape[1]
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.shape == (1, length):
                fill = tokens if name == "input_ids" else torch.full_like(tokens, 1 if name == "attention_mask" else 0)
                inputs[name] = torch.cat([value, fill], 1)
        scores: Tensor = self.model(**inputs, use_cache=False).logits[0, -1]
        return scores


def video_metadata(medium: Medium) -> Any:
    """Describe a video whose frames are sampled already."""
    frames, height, width = medium.frames.shape[:3]
    seconds = medium.seconds_per_frame or 0.5
    return VideoMetadata(
        total_num_frames=frames,
        fps=1 / seconds,
        width=width,
        height=height,
        duration=frames * seconds,
        frames_indices=np.arange(frames).tolist(),
    )
