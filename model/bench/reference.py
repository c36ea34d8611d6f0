"""transformers by itself: its own processor, model class and `generate`. Shares no code with the engine.

What is measured and compared against; so it renders, tokenises and preprocesses prompts without our target adapters.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, StoppingCriteria

from model.request import Medium, Message, SamplingParams

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Generated:
    tokens: tuple[tuple[int, ...], ...]  # of each answer, EOS included, padding not
    first_token_at: float  # on time.perf_counter's clock


class Reference:
    def __init__(self, model: str, *, device: str, dtype: str) -> None:
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.processor = AutoProcessor.from_pretrained(model)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=self.dtype)
        self.model.to(self.device).eval().requires_grad_(False)
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = eos if isinstance(eos, list) else [self.tokenizer.eos_token_id if eos is None else eos]

    def inputs(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        """Left-padded ids, their mask, and the pixels of all frames in order."""
        texts, images = [], []
        for conversation in conversations:
            turns = []
            for message in conversation:
                parts: list[dict[str, str]] = []
                for part in message.content:
                    if isinstance(part, Medium):
                        parts += [{"type": "video"}] if part.kind == "video" else []  # a marker; the frames follow it
                        parts += [{"type": "image"}] * len(part.frames)
                        images += [Image.fromarray(frame) for frame in part.frames]
                    else:
                        parts.append({"type": "text", "text": part})
                turns.append({"role": message.role, "content": parts})
            texts.append(self.processor.apply_chat_template(turns, add_generation_prompt=True))
        made = self.processor(
            text=texts, images=images or None, return_tensors="pt", padding=True, add_special_tokens=False
        ).to(self.device)
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in made.items()}

    @torch.inference_mode()
    def generate(self, conversations: list[Conversation], params: SamplingParams) -> Generated:
        """One call of `generate` for all conversations; max_tokens, temperature and seed of `params` are followed."""
        inputs = self.inputs(conversations)
        sampled = params.temperature > 0.0
        # Made from nothing: a checkpoint's own habits (top-k, penalties) are not the engine's.
        config = GenerationConfig(
            max_new_tokens=params.max_tokens,
            do_sample=sampled,
            eos_token_id=None if params.ignore_eos else self.eos_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            **({"temperature": params.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}),
        )
        if sampled:
            torch.manual_seed(params.seed)
        clock = _Clock()
        output = self.model.generate(**inputs, generation_config=config, stopping_criteria=[clock])
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        return Generated(tuple(self._until_end(a, params) for a in answers), clock.first or time.perf_counter())

    def _until_end(self, answer: list[int], params: SamplingParams) -> tuple[int, ...]:
        ends = () if params.ignore_eos else [i for i, token in enumerate(answer) if token in self.eos_ids]
        return tuple(answer[: ends[0] + 1] if ends else answer)

    @torch.inference_mode()
    def logits(self, conversation: Conversation, answer: tuple[int, ...]) -> Tensor:
        """(vocab,) float64: what decides the token after `answer`, in one pass over everything before it."""
        inputs = self.inputs([conversation])
        more = torch.tensor([answer], dtype=torch.long, device=self.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        known: dict[str, Any] = {
            k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")
        }
        scores: Tensor = self.model(**known).logits[0, -1]
        return scores.double().cpu()


class _Clock(StoppingCriteria):
    """Stops nothing; notes when the first token was there. (Streamers would do too, but only for a batch of one.)"""

    first: float | None = None

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        if self.first is None:
            input_ids[0, -1].item()  # a GPU may still be computing it
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
