"""Answers with transformers alone: its own processor, model class and `generate`.

The benchmark and the equality check compare with it, so it shares no code with the engine: not even what renders,
tokenises and preprocesses prompts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, StoppingCriteria

from model.bench.inputs import ByProcessor, Qwen25VL
from model.bench.inputs import Conversation as Conversation  # for other modules
from model.request import SamplingParams


@dataclass(frozen=True)
class Generated:
    tokens: tuple[tuple[int, ...], ...]  # of each answer, EOS included, padding not
    first_token_at: float  # on time.perf_counter's clock


class Reference:
    def __init__(self, model: str, *, device: str, dtype: str) -> None:
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=self.dtype)
        self.model.to(self.device).eval().requires_grad_(False)
        qwen = self.model.config.model_type == "qwen2_5_vl"
        self._inputs: ByProcessor | Qwen25VL = Qwen25VL(model) if qwen else ByProcessor(model)
        self.tokenizer = self._inputs.tokenizer
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = eos if isinstance(eos, list) else [self.tokenizer.eos_token_id if eos is None else eos]

    def inputs(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        """Build left-padded ids, their mask, and the pixels of all frames in order."""
        inputs = {name: value.to(self.device) for name, value in self._inputs(conversations).items()}
        return {name: value.to(self.dtype) if name.startswith("pixel") else value for name, value in inputs.items()}

    @torch.inference_mode()
    def generate(self, conversations: list[Conversation], params: SamplingParams) -> Generated:
        """Answer all conversations as one batch by transformers' `generate`.

        Of `params` it uses max_tokens, temperature, seed and ignore_eos.
        """
        inputs = self.inputs(conversations)
        sampled = params.temperature > 0.0
        # Nothing of the checkpoint's own defaults (top-k, penalties), which the engine does not apply.
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
        """Cut the padding after EOS."""
        ends = () if params.ignore_eos else [i for i, token in enumerate(answer) if token in self.eos_ids]
        return tuple(answer[: ends[0] + 1] if ends else answer)

    @torch.inference_mode()
    def logits(self, conversation: Conversation, answer: tuple[int, ...]) -> Tensor:
        """Compute the logits (vocab,) float64 of the token after `answer`, in one pass over everything before it."""
        inputs = self.inputs([conversation])
        tokens = torch.tensor([answer], dtype=torch.long, device=self.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if (types := inputs.get("mm_token_type_ids")) is not None:
            inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(tokens)], 1)
        scores: Tensor = self.model(**inputs).logits[0, -1]
        return scores.double().cpu()


class _Clock(StoppingCriteria):
    """Stops nothing; records when the first token was generated. (Streamers do so for a batch of one alone.)"""

    first: float | None = None

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        if self.first is None:
            input_ids[0, -1].item()  # a GPU may still be computing it
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
