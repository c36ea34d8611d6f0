"""Save a LLaVA checkpoint small enough for tests, yet real: transformers saves it and loads it.

Weights are random but *wide*. With the usual initialisation a random model hardly attends to earlier tokens (a wrong
mask or position would go unnoticed), and its best tokens nearly tie (rounding would decide). Here attention matters and
gaps are healthy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from model.backends.graphs import Replays
from model.config import EngineConfig
from model.demo import checkpoint as demo
from model.drafters import checkpoint, presets
from model.drafters.checkpoint import Network
from model.drafters.eagle.network import EagleConfig, EagleNetwork
from model.drafters.flash.network import DraftConfig, DraftNetwork
from model.drafters.medusa.network import MedusaConfig, MedusaNetwork
from model.engine.engine import Engine
from model.engine.round import TorchRound
from model.request import Medium, Message, Request, RequestOutput, SamplingParams
from model.targets.base import Target
from model.targets.registry import load_target

SIDE, PATCH = 32, 8
TOKENS_PER_IMAGE = (SIDE // PATCH) ** 2
VOCABULARY = 384
CORPUS = (
    "Describe the image. What do you see in the video? The red circle is to the left of the blue square.",
    "How many objects are there? There are two objects on a white background: a large star and a small ring.",
    "The quick brown fox jumps over the lazy dog; where, when, why, and how quickly?",
)


def save_checkpoint(
    folder: Path,
    *,
    kv_heads: int = 2,
    seed: int = 0,
    layers: int = 4,
    positions: int = 512,
    width: int = 64,
    family: type[Any] = LlamaConfig,
    text: Mapping[str, Any] | None = None,
    vision: PreTrainedConfig | None = None,
    strategy: str = "default",
    class_tokens: int = 1,
) -> Path:
    """Save a checkpoint of four layers of width 64 with two heads; its tower makes 16 tokens of a 32 x 32 picture.

    family, text: config class of another language model, and additional fields of its config. vision: config of another
    tower, which adds `class_tokens` class tokens to a picture's patches.
    """
    tokenizer = demo.train_tokenizer(CORPUS, VOCABULARY)
    assert len(tokenizer) == VOCABULARY
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in demo.SPECIAL}
    special = {"bos_token_id": ids[demo.BOS], "eos_token_id": ids[demo.END], "pad_token_id": ids[demo.PAD]}
    config = LlavaConfig(
        vision_config=vision
        or CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=32,
        ),
        text_config=family(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=kv_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            **special,
            **(text or {}),
        ),
        image_token_index=ids[demo.IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
        image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=False,
        **special,
    )
    torch.manual_seed(seed)
    target = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3 if "embed_tokens" in name else 0.25)
        target.lm_head.weight.mul_(2.0)
    target.save_pretrained(folder)
    processor = demo.processor(tokenizer, SIDE, PATCH)
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = strategy, class_tokens
    processor.save_pretrained(folder)
    return folder


def new_draft(target: Target, *, seed: int = 0, **shape: Any) -> DraftNetwork:
    """Create an untrained FLASH draft for a tiny target, with a sequential head that has an effect."""
    settings = {"num_layers": 2, "num_heads": 2, "intermediate_size": 48, "block": 5, "num_latents": 4}
    config = DraftConfig(
        hidden_size=32,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        aux_layers=target.aux_layers,
        **{**settings, "sequential_rank": 8, **shape},
    )
    torch.manual_seed(seed)
    network = DraftNetwork(config)
    if network.sequential is not None:
        torch.nn.init.normal_(network.sequential.after.weight, std=0.5)
    choose_offered(network, target)
    return network.to(target.device, target.dtype).eval()


def choose_offered(network: Network, target: Target) -> None:
    """Choose a reduced draft vocabulary at random, if the network has one."""
    if network.offered is not None:
        drawn = torch.randperm(target.vocab_size, generator=torch.Generator().manual_seed(0))[: len(network.offered)]
        network.offered.copy_(drawn.sort().values)


def new_network(drafter: str, target: Target, *, seed: int = 0, vocabulary: int = 0) -> Network:
    """Create an untrained draft of any kind for a tiny target, with initial weights that have an effect."""
    common = {"target_hidden_size": target.hidden_size, "vocab_size": target.vocab_size, "vocabulary": vocabulary}
    torch.manual_seed(seed)
    network: Network
    if drafter == "medusa":
        network = MedusaNetwork(MedusaConfig(**common, aux_layers=target.aux_layers, block=4), target.final_norm)
        torch.nn.init.normal_(network.heads.weight, std=0.2)
    elif drafter == "eagle":
        shape = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "block": 5}
        network = EagleNetwork(EagleConfig(**common, **shape, aux_layers=target.aux_layers))
    else:
        paper = presets.PAPER if drafter == "flash-paper" else {}
        return new_draft(target, seed=seed, **{**paper, "vocabulary": vocabulary})
    choose_offered(network, target)
    return network.to(target.device, target.dtype).eval()


def target_for(drafter: str, model: Path, **settings: Any) -> Target:
    """Load the tiny target, set up to capture the hidden states that this drafter reads."""
    return load_target(config(model, **settings).resolved(), presets.TAP_LAYERS.get(drafter))


def save_network(folder: Path, drafter: str, model: Path, *, vocabulary: int = 0, **settings: Any) -> Path:
    """Save an untrained draft of this kind to `folder`."""
    target = target_for(drafter, model, **settings)
    network = new_network(drafter, target, vocabulary=vocabulary)
    checkpoint.save(folder, network, target, drafter=drafter, command="a test")
    return folder


def save_draft(folder: Path, model: Path, **shape: Any) -> Path:
    """Save an untrained FLASH draft to `folder`."""
    target = Engine(config(model)).target
    checkpoint.save(folder, new_draft(target, **shape), target, command="a test")
    return folder


def config(model: Path, **settings: Any) -> EngineConfig:
    """Return the config of a tiny checkpoint: CPU, float32, no adaptive drafting.

    There is no draft unless `settings` name one; it is then used at every step.
    """
    given = {
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 256,
        "encoder_cache_bytes": 1 << 20,
        "adaptive_drafting": False,
    }
    return EngineConfig(model=str(model), **{**given, **settings})


def engine_of(name: str, model: Path, drafts: Mapping[str, Path], **settings: Any) -> Engine:
    """Start an engine with this drafter, and with its draft if it needs one; prompts in chunks of 16."""
    draft = str(drafts[name]) if name in drafts else None
    given = {"max_num_seqs": 8, "prefill_chunk": 16, **settings}
    return Engine(config(model, drafter=name, draft=draft, **given))


# -- transformers' own processor


def by_processor(processor: Any, messages: Iterable[Message], *, split: bool = True, **options: Any) -> Any:
    """Tokenize a conversation with transformers' processor, called as its users call it.

    split: write a video as a marker and its frames, as LLaVA does.
    """
    turns = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message.content:
            if not isinstance(part, Medium):
                parts.append({"type": "text", "text": part})
            elif part.kind == "video" and not split:
                parts.append({"type": "video", "video": part.frames})
            else:
                parts += [{"type": "video"}] if part.kind == "video" else []
                parts += [{"type": "image", "image": Image.fromarray(frame)} for frame in part.frames]
        turns.append({"role": message.role, "content": parts})
    return processor.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True, **options)


def ids_by_processor(processor: Any, messages: Iterable[Message], **options: Any) -> list[int]:
    """Return the token ids of a conversation from transformers' processor."""
    ids: list[int] = by_processor(processor, messages, **options)["input_ids"][0]
    return ids


# -- requests


def picture(seed: int, num_frames: int = 1) -> np.ndarray:
    """Return blocks of colour that differ for every seed: (num_frames, SIDE, SIDE, 3) uint8."""
    blocks = np.random.default_rng(seed).integers(0, 256, (num_frames, 4, 4, 3), np.uint8)
    return blocks.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)


def image(seed: int) -> Medium:
    """Return an image that differs for every seed."""
    return Medium("image", picture(seed))


def video(seed: int, num_frames: int = 3) -> Medium:
    """Return a video that differs for every seed."""
    return Medium("video", picture(seed, num_frames))


def ask(request_id: str, *content: str | Medium, speculation: bool = True, **params: Any) -> Request:
    """Build a request of one user message: 24 tokens past any end of sequence, unless `params` differ."""
    settings: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, **params}
    return Request(request_id, (Message("user", content),), SamplingParams(**settings), speculation)


def drain(engine: Engine, requests: Iterable[Request] = (), *, every: int = 0) -> dict[str, list[RequestOutput]]:
    """Run the engine until it is idle, checking its integrity at every step, and return all outputs by request.

    Requests are added all at once, or one every `every` steps. Each must end with exactly one finishing output.
    """
    outputs: dict[str, list[RequestOutput]] = {}
    coming, steps = list(requests), 0
    while coming or engine.has_work:
        while coming and (not every or steps % every == 0):
            request = coming.pop(0)
            engine.add(request)
            outputs[request.request_id] = []
            if every:
                break
        steps += 1
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    assert_idle(engine)
    for request_id, each in outputs.items():
        assert [o.finish_reason is not None for o in each] == [False] * (len(each) - 1) + [True], request_id
    return outputs


def assert_idle(engine: Engine) -> None:
    """Check that an engine has no work and no slot in use."""
    assert not engine.has_work
    assert engine.cache.num_free == engine.cache.num_slots, "the engine is idle, yet a slot is taken"
    assert engine.cache.usage == 0.0
    engine.check_integrity()


def token_ids(outputs: Iterable[RequestOutput]) -> list[int]:
    """Join the token ids of a request's outputs."""
    return [token.id for output in outputs for token in output.tokens]


def text_of(outputs: Iterable[RequestOutput]) -> str:
    """Join the text of a request's outputs."""
    return "".join(output.text for output in outputs)


def answers(engine: Engine, requests: Iterable[Request], *, every: int = 0) -> dict[str, list[int]]:
    """Run requests and return the token ids of every whole answer."""
    return {request_id: token_ids(outputs) for request_id, outputs in drain(engine, requests, every=every).items()}


def in_torch(engine: Engine) -> TorchRound:
    """Return the engine's round, which must be torch's."""
    assert isinstance(engine.round, TorchRound)
    return engine.round


def replays(engine: Engine) -> Replays:
    """Return the target's recorded passes, which must exist."""
    passes = in_torch(engine).passes
    assert passes is not None
    return passes
