"""LLaVA's families: a projector between a CLIP, SigLIP or Pixtral tower and any decoder."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    DeepseekVLConfig,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
    Granite4VisionConfig,
    Granite4VisionProcessor,
    LightOnOcrConfig,
    LightOnOcrProcessor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Mistral3Config,
    PixtralImageProcessor,
    PixtralProcessor,
    VipLlavaConfig,
)

from tests.families.zoo import HIDDEN, VISION, WINDOW, Checkpoint, chat, family, text, tokenizer

SIDE, PATCH = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
CLIP = VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": SIDE, "projection_dim": 32}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "num_hidden_layers": 3, "image_size": SIDE}
PIXTRAL = VISION | {"model_type": "pixtral", "head_dim": 16, "image_size": 84}
# A user's turn has all pictures before its texts; the tokenizer writes BOS, the template does not.
VICUNA = chat(
    "{% if role != 'system' %}{{ role.upper() }}: {% endif %}",
    " ",
    "ASSISTANT:",
    image="<image>\n",
    video="<video>\n",
    media_first=True,
)
MISTRAL: dict[str, Any] = {
    "before": "{% if role == 'system' %}[SYSTEM_PROMPT]{% elif role == 'user' %}[INST]{% endif %}",
    "after": "{% if role == 'system' %}[/SYSTEM_PROMPT]{% elif role == 'user' %}[/INST]{% else %}</s>{% endif %}",
    "answer": "",
    "start": "{{ bos_token }}",
}
IMAGE_TOKENS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")


def llama_tokens() -> Any:
    """Return a tokenizer that writes BOS before every text, as Llama's does."""
    return tokenizer("<image>", "<video>", eos="</s>", pad="<pad>", bos="<s>", adds_bos=True)


def clip_processor() -> Any:
    """Return the processor of LLaVA-1.5."""
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        llama_tokens(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def image_id(processor: Any, token: str = "<image>") -> int:
    """Return the id of a processor's image token."""
    found: int = processor.tokenizer.convert_tokens_to_ids(token)
    return found


@family(backend="pil")
def llava() -> Checkpoint:
    """Its own target resizes as the media decoder does, which is as PIL does."""
    processor = clip_processor()
    config = LlavaConfig(
        text_config=text(processor.tokenizer, model_type="llama"),
        vision_config=CLIP,
        image_token_index=image_id(processor),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def vipllava() -> Checkpoint:
    """The features are those of several layers side by side."""
    processor = clip_processor()
    processor.chat_template = chat(
        "###{% if role == 'user' %}Human{% else %}{{ role | capitalize }}{% endif %}: ",
        "",
        "###Assistant:",
        image="<image>\n",
        media_first=True,
    )
    config = VipLlavaConfig(
        text_config=text(processor.tokenizer, model_type="llama"),
        vision_config=CLIP | {"num_hidden_layers": 4},
        vision_feature_layer=[-1, -2, -3, -4, 1],
        image_token_index=image_id(processor),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


def pixtral_processor(processor: Any = PixtralProcessor, merge: int = 2, **options: Any) -> Any:
    """Return a processor of Pixtral's kind: the sides of a picture are multiples of a patch, with a token after each
    row."""
    words = tokenizer(
        *IMAGE_TOKENS,
        eos="</s>",
        pad="<pad>",
        bos="<s>",
        adds_bos=True,
        named={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    )
    unit = PATCH * merge
    images = PixtralImageProcessor(patch_size={"height": unit, "width": unit}, size={"longest_edge": 84})
    options = {"chat_template": chat(**MISTRAL, image="[IMG]")} | options
    return processor(images, words, patch_size=PATCH, spatial_merge_size=merge, **options)


@family()
def llava_pixtral() -> Checkpoint:
    """Pixtral 12B: LLaVA's classes around Pixtral's tower and a Mistral."""
    processor = pixtral_processor(merge=1)
    processor.image_processor.size = {"longest_edge": 70}
    config = LlavaConfig(
        text_config=text(processor.tokenizer, model_type="mistral", sliding_window=None),
        vision_config=PIXTRAL,
        image_token_index=processor.tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def mistral3() -> Checkpoint:
    processor = pixtral_processor()
    config = Mistral3Config(
        text_config=text(processor.tokenizer, model_type="mistral", sliding_window=None),
        vision_config=PIXTRAL,
        image_token_index=processor.tokenizer.image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def mistral3_window() -> Checkpoint:
    """As `mistral3`, with a window in every layer."""
    processor = pixtral_processor()
    config = Mistral3Config(
        text_config=text(processor.tokenizer, model_type="mistral", sliding_window=WINDOW),
        vision_config=PIXTRAL,
        image_token_index=processor.tokenizer.image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def ministral3() -> Checkpoint:
    """The same processor around a decoder with YaRN and queries scaled by position."""
    processor = pixtral_processor()
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 64.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    config = Mistral3Config(
        text_config=text(processor.tokenizer, model_type="ministral3", sliding_window=None, rope_parameters=yarn),
        vision_config=PIXTRAL,
        image_token_index=processor.tokenizer.image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def lighton_ocr() -> Checkpoint:
    """Pixtral's tower without the tokens after rows, and a Qwen3."""
    named = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    words = tokenizer("<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", named=named)
    processor = LightOnOcrProcessor(
        PixtralImageProcessor(patch_size={"height": 28, "width": 28}, size={"longest_edge": 84}),
        words,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=chat(
            "<|im_start|>{{ role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n", image="<|image_pad|>"
        ),
    )
    config = LightOnOcrConfig(
        text_config=text(words, model_type="qwen3", tie_word_embeddings=True),
        vision_config=PIXTRAL,
        image_token_id=words.image_token_id,
    )
    return Checkpoint(config, processor)


@family()
def llava_next() -> Checkpoint:
    words = llama_tokens()
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
        ),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat(
            "{% if role == 'system' %}<<SYS>>\n{% elif role == 'user' %}[INST] {% endif %}",
            "{% if role == 'system' %}\n<</SYS>>\n\n{% elif role == 'user' %} [/INST]{% else %}</s>{% endif %}",
            "",
            image="<image>\n",
            media_first=True,
        ),
    )
    config = LlavaNextConfig(
        text_config=text(words, model_type="mistral", sliding_window=None),
        vision_config=CLIP,
        image_grid_pinpoints=PINPOINTS,
        image_token_index=image_id(processor),
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family(video=True)
def llava_onevision() -> Checkpoint:
    words = tokenizer("<|im_start|>", "<image>", "<video>", eos="<|im_end|>", pad="<|endoftext|>")
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS),
        words,
        LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat(
            "<|im_start|>{{ role }} ",
            "<|im_end|>",
            "<|im_start|>assistant\n",
            image="<image>\n",
            video="<video>\n",
            media_first=True,
        ),
    )
    config = LlavaOnevisionConfig(
        text_config=text(words, model_type="qwen2"),
        vision_config=SIGLIP,
        image_grid_pinpoints=PINPOINTS,
        image_token_index=image_id(processor),
        video_token_index=image_id(processor, "<video>"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def granite4_vision() -> Checkpoint:
    """Features enter several layers, and the placeholders' own rows are zero; multipliers everywhere."""
    words = tokenizer(
        "<|start_of_role|>", "<|end_of_role|>", eos="<|end_of_text|>", pad="<|pad|>", named={"image_token": "<image>"}
    )
    processor = Granite4VisionProcessor(
        LlavaNextImageProcessor(
            size={"height": SIDE, "width": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=PINPOINTS,
        ),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        chat_template=chat(
            "<|start_of_role|>{{ role }}<|end_of_role|>",
            "<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
            image="<image>\n",
        ),
    )
    config = Granite4VisionConfig(
        text_config=text(
            words,
            num_hidden_layers=6,
            logits_scaling=3.0,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.25,
            tie_word_embeddings=True,
        ),
        vision_config=SIGLIP | {"hidden_size": HIDDEN, "num_hidden_layers": 4},
        image_token_index=words.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0], [2, 1]],
        spatial_vision_layer=-1,
        spatial_target_layers=[2, 3, 4, 5],
        vision_feature_select_strategy="full",
        qformer_config={
            "model_type": "blip_2_qformer",
            "hidden_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 48,
            "encoder_hidden_size": HIDDEN,
        },
    )
    return Checkpoint(config, processor)


@family()
def deepseek_vl() -> Checkpoint:
    words = tokenizer(
        eos="<end_of_sentence>",
        pad="<pad>",
        bos="<begin_of_sentence>",
        adds_bos=True,
        named={"image_token": "<image_placeholder>"},
    )
    processor = DeepseekVLProcessor(
        DeepseekVLImageProcessor(size={"height": SIDE, "width": SIDE}, min_size=14),
        words,
        num_image_tokens=16,
        chat_template=chat(
            "{% if role != 'system' %}{{ role | capitalize }}: {% endif %}",
            "{% if role == 'assistant' %}<end_of_sentence>{% else %}\n\n{% endif %}",
            "Assistant:",
            image="<image_placeholder>",
        ),
    )
    config = DeepseekVLConfig(
        text_config=text(words, model_type="llama"),
        vision_config=SIGLIP | {"vision_use_head": False},
        image_token_id=words.image_token_id,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)
