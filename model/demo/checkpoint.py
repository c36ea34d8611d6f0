"""Define the bundled target in the terms of transformers: tokenizer, chat template, processor and configuration.

All classes are transformers' own LLaVA classes. The folder that they save loads with `AutoProcessor` and
`LlavaForConditionalGeneration` like any other LLaVA checkpoint.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from model.demo import captions, scenes
from model.demo.vision import GRID, IMAGE_MEAN, IMAGE_STD, PATCH, SIDE, vision_config

VOCABULARY = 768
PAD, BOS, END, IMAGE, VIDEO, USER, ASSISTANT, SYSTEM = SPECIAL = (
    "<pad>",
    "<s>",
    "<|end|>",
    "<image>",
    "<|video|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
TOKENS_PER_IMAGE = GRID * GRID

# A video is written as the marker <|video|>, then each frame as an image.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}<|video|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Added to the corpus so that common words outside of the demo's text take few tokens.
PLAIN_ENGLISH = (
    "please tell me what you can see here and where it is, if anything is moving and how fast it goes. "
    "could you explain this to me in a few words or one sentence? thank you very much. "
    "the quick brown fox jumps over the lazy dog. I would like to know which one of these is the biggest. "
    "how would you describe the scene, its colors, its shapes and their positions? is there something else? "
    "what changed between the first and the second image? "
    "who, when, why, because, not, can, will, has, have, with, from."
)


def _corpus() -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on: the demo's own, and PLAIN_ENGLISH repeated."""
    for i in range(6000):
        rng = random.Random(i)
        image = scenes.random_image_scene(scenes.scene_seed("train", "image", i))
        video = scenes.random_video_scene(scenes.scene_seed("train", "video", i))
        for caption in (True, False, False):
            for turn in (
                captions.image_turn(image, rng, caption=caption),
                captions.video_turn(video, rng, caption=caption),
            ):
                yield turn.question
                yield turn.answer
    for turn in captions.SMALL_TALK:
        yield from (turn.question, turn.answer)
    yield from [PLAIN_ENGLISH] * 200


def train_tokenizer(corpus: Iterable[str] | None = None, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can encode any text.

    The most frequent words of `corpus` become one token each; the default corpus is the demo's own text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus() if corpus is None else corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[IMAGE, VIDEO, USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def processor(tokenizer: PreTrainedTokenizerFast, side: int = SIDE, patch: int = PATCH) -> LlavaProcessor:
    """Build the LLaVA processor for square images of `side` pixels."""
    images = CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        crop_size={"height": side, "width": side},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def target_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Return the configuration of the bundled target."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=ids[BOS],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=ids[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS_PER_IMAGE,
        bos_token_id=ids[BOS],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
        tie_word_embeddings=False,
    )


def new_target(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Create an untrained target. Residual branches start small, which suits a deep and narrow stack."""
    torch.manual_seed(0)
    target = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for layer in target.model.language_model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(1.5 / math.sqrt(2 * config.text_config.num_hidden_layers))
    return target
