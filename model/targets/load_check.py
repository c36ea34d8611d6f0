"""Compares a loaded model with transformers' own forward, on a few short prompts, before it is served.

The reference runs first, with the family's own attention, since packing the decoder for the native library releases its
layers. It also shows which tokens see each other in both directions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model.backends.attention import AttentionMetadata, AttentionTensors, MaskKind, prompt_rows
from model.backends.kv_cache import KVCache, LayerShape
from model.config import EngineConfig
from model.errors import ConfigError
from model.request import Medium, Message, RequestError
from model.targets.base import Target
from model.targets.blocks import RULES, Rule
from model.targets.chat_processor import ChatProcessor
from model.targets.language import language_model
from model.targets.prompt import TokenizedPrompt

HEIGHT, WIDTH, FRAMES = 90, 124, 4  # of the pictures and clips in the prompts
TREE = (-1, 0, 0, 2)  # parents of the rows of the tree; row 1 is no part of the prompt
# Largest mean difference of logits, in their standard deviation. A wrong mask or position gives about 0.1 to 1.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


_NO_CACHE = KVCache(
    layers=(), num_slots=0, capacity=0, margin=0, dtype=torch.float32, device=torch.device("cpu")
)  # for masks alone


class Checked(Target, Protocol):
    """What the checks ask of a target."""

    model: Any  # transformers' own, whole
    chat: ChatProcessor

    def placed(self, value: Any) -> Any:
        """Move an argument to the target's device and dtype."""
        ...


@dataclass(frozen=True)
class Check:
    """A prompt, and what the family's own model makes of it.

    logits: (tokens, vocab); masks: by type of layer, which tokens each token sees (tokens, tokens) bool; "" stands for
    all layers, and a type without an entry is causal.
    """

    name: str
    prompt: TokenizedPrompt
    logits: Tensor
    masks: dict[str, Tensor]


class _CapturedError(Exception):
    """Carries what a base model hands to its decoder."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__("captured")
        self.options = options


def _messages(*kinds: str) -> tuple[Message, ...]:
    """Build a conversation that shows these kinds of media."""
    rng = np.random.default_rng(0)
    media: list[str | Medium] = []
    for kind in kinds:
        frames = rng.integers(0, 256, (1 if kind == "image" else FRAMES, HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        frames = frames.repeat(8, 1).repeat(8, 2)
        if kind == "video":
            frames[2] = frames[1]  # some families drop what does not change
        media.append(Medium("video" if kind == "video" else "image", frames, 0.5 if kind == "video" else None))
    return (Message("user", (*media, "What is this? Answer in one word, please.")),)


@torch.no_grad()
def reference(target: Checked, config: EngineConfig) -> list[Check]:
    """Run the family's own forward on prompts with pictures and a video, as far as the family takes them.

    Token ids of a prompt with text alone are compared, too. A prompt with one picture only runs if one with two cannot,
    since a forward pass of a large model takes long. Raises ConfigError if no picture works, or if token ids differ
    from those of the family's processor.
    """
    checks: list[Check] = []
    for kinds in ((), ("image", "image"), ("image",), ("video",)):
        if "video" in kinds and not target.chat.takes_videos:
            continue
        name = " and ".join(kinds) or "text"
        messages = _messages(*kinds)
        try:
            prompt = target.prompt(messages)
            inputs = target.chat.family_inputs(messages)
        except RequestError as error:
            if not kinds or len(kinds) > 1:  # some templates want a picture, and some take no more than one
                continue
            raise ConfigError(f"model {config.model!r} cannot be served: its prompt with {name}: {error}") from error
        if len(prompt.ids) + len(TREE) > config.context(target.model.config.get_text_config().max_position_embeddings):
            continue
        theirs = inputs["input_ids"][0].tolist()
        if prompt.ids != theirs and (learned := target.chat.learn(prompt.ids, theirs, messages)) is not None:
            prompt = learned
        if prompt.ids != theirs:
            raise ConfigError(
                f"model {config.model!r} cannot be served: a prompt with {name} has other tokens than those of its "
                f"processor: {_first_difference(prompt.ids, theirs)}"
            )
        if not kinds or (kinds == ("image",) and checks):
            continue
        try:
            checks.append(_run(target, name, prompt, inputs))
        except Exception as error:  # whatever its own code raises
            if "video" not in kinds:
                raise ConfigError(
                    f"model {config.model!r} cannot be served: its own forward fails for a prompt with {name}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            target.chat.refuse_videos(f"transformers' own forward fails with {type(error).__name__}: {error}")
    return checks


def _run(target: Checked, name: str, prompt: TokenizedPrompt, inputs: dict[str, Any]) -> Check:
    """Run the family's own forward, and catch the masks of its decoder."""
    model, language = target.model, language_model(target.model)
    accepted = inspect.signature(model.forward).parameters
    inputs = {key: target.placed(value) for key, value in inputs.items() if key in accepted or key.startswith("pixel")}
    inputs.pop("attention_mask", None)
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
    logits = model(**inputs, position_ids=positions, use_cache=False).logits[0]

    def capture(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        """End the pass at the decoder."""
        raise _CapturedError(options)

    hook = language.register_forward_pre_hook(capture, with_kwargs=True)
    base = {
        key: value for key, value in inputs.items() if key in inspect.signature(model.base_model.forward).parameters
    }
    try:
        model.base_model(**base, position_ids=positions, use_cache=False)
        raise AssertionError("a base model did not call its decoder")
    except _CapturedError as captured:
        found = captured.options.get("attention_mask")
    finally:
        hook.remove()
    if len(logits) != len(prompt.ids):
        raise ValueError(f"it makes {len(logits)} rows of {len(prompt.ids)} tokens")
    masks = found if isinstance(found, dict) else {"": found}
    return Check(name, prompt, logits, {kind: _seen(mask) for kind, mask in masks.items() if isinstance(mask, Tensor)})


def _seen(mask: Tensor) -> Tensor:
    """Return which tokens each token sees by a mask that is boolean or added to scores: (tokens, tokens) bool."""
    seen = mask[0, 0]
    return seen if seen.dtype is torch.bool else seen > -1


def look_ahead(
    target: Checked,
    checks: Sequence[Check],
    shapes: Sequence[LayerShape | None],
    layer_types: Sequence[str] | None,
) -> tuple[list[LayerShape | None], Rule | None]:
    """Find which tokens see each other in both directions, and in which layers.

    Returns the shapes with `blocks`, and the rule; None if no token sees a later one. Raises ConfigError if a mask
    follows no rule.
    """
    types = list(layer_types) if layer_types is not None else [""] * len(shapes)
    kinds = {kind for check in checks for kind, mask in check.masks.items() if bool(mask.triu(1).any())}
    for rule in RULES if kinds else [None]:
        marked = [
            replace(shape, blocks=rule.blocks) if rule and shape and kinds & {kind, ""} else shape
            for shape, kind in zip(shapes, types, strict=True)
        ]
        if all(_follows(check, target.chat.with_blocks(check.prompt, rule), marked, types) for check in checks):
            return marked, rule
    raise ConfigError("its layers see tokens by a rule of their own, which is not supported")


def _follows(check: Check, prompt: TokenizedPrompt, shapes: Sequence[LayerShape | None], types: Sequence[str]) -> bool:
    """Return whether the masks of a check are those that we would use."""
    num = len(prompt.ids)
    tensors = AttentionTensors(
        _NO_CACHE, 0, torch.zeros(1), torch.zeros(1), torch.ones(1, num, num, dtype=torch.bool).tril(), num
    )
    numbers = prompt.block_numbers(0, num)
    if numbers is not None:
        tensors = replace(tensors, blocks=torch.from_numpy(numbers))
    for kind in dict.fromkeys(zip(types, shapes, strict=True)):
        mask = check.masks.get(kind[0], check.masks.get(""))
        if kind[1] is None or mask is None:
            continue
        if not torch.equal(tensors.rows_visible(kind[1].window, kind[1].blocks)[0], mask.cpu()):
            return False
    return True


@torch.no_grad()
def compare(target: Checked, checks: Sequence[Check], model: str) -> None:
    """Compute the prompts by our own passes: parts of the prompt, then a tree. Raises ConfigError if logits differ."""
    for check in checks:
        ours = _ours(target, check.prompt)
        off = (ours.float() - check.logits.float()).abs().mean() / check.logits.float().std()
        if not off <= TOLERANCE[target.dtype]:
            raise ConfigError(
                f"model {model!r} cannot be served: its logits for a prompt with {check.name} differ from those of "
                f"transformers by {off:.2g} of their standard deviation, where {TOLERANCE[target.dtype]:g} would be "
                "rounding"
            )


def _ours(target: Checked, prompt: TokenizedPrompt) -> Tensor:
    """Compute the logits of every token of a prompt: (tokens, vocab)."""
    num, tree = len(prompt.ids), len(TREE)
    capacity = num + tree
    cache = KVCache(
        layers=target.layers,
        num_slots=1,
        capacity=capacity,
        margin=2 * tree,
        rows=capacity,
        dtype=target.dtype,
        device=target.device,
        states=None if target.states is None else target.states.allocate(1, saving=False),
    )
    slot = cache.allocate()
    positions = target.positions(prompt)[:, None]
    features = [target.encode(medium, 0, target.pieces(medium)) for medium in prompt.media]
    hidden = []
    for start, end in _parts(prompt, num - tree + 1):
        ids = torch.tensor([prompt.ids[start:end]], device=target.device)
        rows = prompt_rows(cache, slot, start, end - start, prompt.block_numbers(start, end))
        inner: dict[str, list[Tensor]] = {}
        for index, (medium, each) in enumerate(zip(prompt.media, features, strict=True)):
            first, last = np.searchsorted(prompt.visual_tokens(index), (start, end)).tolist()
            if first < last:
                inner.setdefault(target.stream(medium.kind), []).append(each[first:last])
        joined = {stream: torch.cat(parts) for stream, parts in inner.items()}
        done = target.forward(ids, np.ascontiguousarray(positions[..., start:end]), rows, joined)
        hidden.append(done.hidden[0])
        cache.keep([slot], [range(end - start)])
    done_until = cache.lengths[slot]
    if done_until < num:
        own = prompt.ids[done_until:]
        tokens = [own[0], prompt.ids[0], *own[1:]]
        depths = np.array([0, 1, 1, 2], np.int32)
        rows = AttentionMetadata(
            cache,
            0,
            tree,
            np.array([done_until], np.int32),
            np.array([tree], np.int32),
            MaskKind.TREE,
            np.array([TREE], np.int32),
        )
        places = positions[..., done_until : done_until + 1] + depths
        ids = torch.tensor([tokens], device=target.device)
        done = target.forward(ids, np.ascontiguousarray(places.astype(np.int32)), rows)
        hidden.append(done.hidden[0, [0, 2, 3]])
    return target.logits(torch.cat(hidden))


def _parts(prompt: TokenizedPrompt, end: int) -> Iterator[tuple[int, int]]:
    """Yield ranges that make up the first `end` tokens of a prompt, or all of it where a block reaches further."""
    if any(first < end < last for first, last in prompt.blocks):
        end = len(prompt.ids)
    edges = [0]
    for wanted in (end // 3, 2 * end // 3, end):
        while edges[-1] < wanted:
            edges.append(prompt.cut(edges[-1], wanted))
    yield from pairwise(edges)


def _first_difference(ours: list[int], theirs: list[int]) -> str:
    """Describe where two lists of tokens begin to differ."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{len(ours)} tokens and {len(theirs)}, different from token {at} on"
