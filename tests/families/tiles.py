"""Families that cut a picture into tiles: InternVL's, Idefics', Cohere's and others."""

from __future__ import annotations

from typing import Any

from transformers import (
    AyaVisionConfig,
    AyaVisionProcessor,
    Cohere2VisionConfig,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    DeepseekOcr2Config,
    DeepseekOcr2ImageProcessor,
    DeepseekOcr2Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    Lfm2VlConfig,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    Molmo2Config,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    Ovis2Config,
    Ovis2ImageProcessor,
    Ovis2Processor,
    QianfanOCRConfig,
    QianfanOCRProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.families.llava import SIGLIP
from tests.families.zoo import FULL, HIDDEN, SLIDING, VISION, WINDOW, Checkpoint, chat, family, text, tokenizer

SIDE = {"height": 56, "width": 56}
TURN = ("<|im_start|>{{ role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
SQUARE = VISION | {"image_size": [56, 56], "patch_size": [14, 14]}


# -- InternVL


def internvl_tokens() -> Any:
    """Return InternVL's tokenizer."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return tokenizer("<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", named=named)


def internvl_around(**decoder: Any) -> Checkpoint:
    """Return InternVL around a decoder."""
    words = internvl_tokens()
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4),
        words,
        InternVLVideoProcessor(size=SIDE),
        image_seq_length=4,
        chat_template=chat(*TURN, image="<IMG_CONTEXT>\n", video="<video>\n"),
    )
    config = InternVLConfig(
        text_config=text(words, **decoder),
        vision_config=SQUARE,
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family(video=True)
def internvl() -> Checkpoint:
    return internvl_around(model_type="qwen2")


@family(video=True)
def internvl_qwen3() -> Checkpoint:
    return internvl_around(model_type="qwen3")


@family(video=True)
def internvl_gpt_oss() -> Checkpoint:
    """Windows, sinks and experts."""
    return internvl_around(
        model_type="gpt_oss",
        sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        num_local_experts=4,
        num_experts_per_tok=2,
    )


@family()
def qianfan_ocr() -> Checkpoint:
    words = tokenizer(
        "<|im_start|>",
        "<image>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
    )
    processor = QianfanOCRProcessor(
        GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4),
        words,
        image_seq_length=4,
        chat_template=chat(*TURN, image="<image>\n"),
    )
    config = QianfanOCRConfig(
        text_config=text(words, model_type="qwen3"),
        vision_config=SQUARE,
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
    )
    return Checkpoint(config, processor)


# -- Idefics 3 and SmolVLM


def idefics_tokens() -> Any:
    """Return the tokenizer of Idefics 3 and SmolVLM, with a token for every row and column."""
    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    return tokenizer(
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        "<video>",
        *places,
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        bos="<|im_start|>",
    )


def idefics_chat(video: str = "") -> str:
    """Return the template of Idefics 3: no space behind the colon of a turn that begins with a medium."""
    return chat(
        "{{ role | capitalize }}{% if message['content'][0]['type'] in ('image', 'video') %}:{% else %}: {% endif %}",
        "<end_of_utterance>\n",
        "Assistant:",
        image="<image>",
        video=video,
        start="<|im_start|>",
    )


TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}


@family(video=True, mixed=False)
def smolvlm() -> Checkpoint:
    words = idefics_tokens()
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**TILES),
        words,
        SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 56}),
        image_seq_len=4,
        chat_template=idefics_chat("<video>"),
    )
    config = SmolVLMConfig(
        text_config=text(words, model_type="llama"),
        vision_config=VISION | {"image_size": 56},
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def idefics3() -> Checkpoint:
    words = idefics_tokens()
    processor = Idefics3Processor(Idefics3ImageProcessor(**TILES), words, image_seq_len=4, chat_template=idefics_chat())
    config = Idefics3Config(
        text_config=text(words, model_type="llama"),
        vision_config=VISION | {"image_size": 56},
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


# -- Cohere

COHERE = {
    "model_type": "cohere2",
    "sliding_window": WINDOW,
    "logit_scale": 0.25,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
    "tie_word_embeddings": True,
}
COHERE_ROLES = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}
COHERE_TURN = (
    "<|START_OF_TURN_TOKEN|><|{{ role }}_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)
COHERE_TOKENS = ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
COHERE_IMAGE = {
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "image_token": "<|IMG_PATCH|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}


@family()
def aya_vision() -> Checkpoint:
    words = tokenizer(
        *COHERE_TOKENS,
        "<image>",
        *COHERE_IMAGE.values(),
        "TILE",
        "TILE_GLOBAL",
        *(f"TILE_{i}" for i in range(1, 5)),
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        bos="<BOS_TOKEN>",
        adds_bos=True,
    )
    processor = AyaVisionProcessor(
        GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=4),
        words,
        patch_size=28,
        img_size=56,
        chat_template=chat(*COHERE_TURN, image="<image>", start="{{ bos_token }}", roles=COHERE_ROLES),
    )
    config = AyaVisionConfig(
        text_config=text(words, **COHERE),
        vision_config=SIGLIP | {"vision_use_head": False},
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        alignment_intermediate_size=HIDDEN,
    )
    return Checkpoint(config, processor)


@family()
def cohere2_vision() -> Checkpoint:
    """Its processor gives a tile as many tokens as a patch has pixels: right for 512 pixels and patches of 16, as
    published, and for 32 pixels and patches of 4."""
    words = tokenizer(
        *COHERE_TOKENS,
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        bos="<BOS_TOKEN>",
        adds_bos=True,
        named=COHERE_IMAGE,
    )
    processor = Cohere2VisionProcessor(
        Cohere2VisionImageProcessor(
            size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4, patch_size=4, downsample_factor=2
        ),
        words,
        chat_template=chat(*COHERE_TURN, image="<|IMG_PATCH|>", start="{{ bos_token }}", roles=COHERE_ROLES),
    )
    config = Cohere2VisionConfig(
        text_config=text(words, **COHERE),
        vision_config=SIGLIP | {"image_size": 32, "patch_size": 4, "vision_use_head": False},
        image_token_id=words.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=HIDDEN,
    )
    return Checkpoint(config, processor)


# -- others


@family()
def ovis2() -> Checkpoint:
    """Tokens around a picture and its tiles have embeddings of their own, made by the tower."""
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    words = tokenizer(
        "<|im_start|>",
        "<image>",
        *marks,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={"image_token": "<IMG_ATOM>"},
    )
    processor = Ovis2Processor(
        Ovis2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=4),
        words,
        image_seq_length=4,
        chat_template=chat(*TURN, image="<image>\n"),
    )
    config = Ovis2Config(
        text_config=text(words, model_type="qwen2"),
        vision_config=VISION
        | {"image_size": 56, "vocab_size": 100, "hidden_stride": 2, "num_visual_indicator_tokens": len(marks)},
        image_token_id=words.image_token_id,
        visual_indicator_token_ids=words.convert_tokens_to_ids(list(marks)),
        vocab_size=text(words)["vocab_size"],
        hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family(attention=8.0)
def lfm2_vl() -> Checkpoint:
    """Layers with short convolutions between those with attention."""
    places = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(4) for column in range(4)]
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    words = tokenizer(
        "<|im_start|>",
        *places,
        eos="<|im_end|>",
        pad="<|pad|>",
        bos="<|startoftext|>",
        adds_bos=True,
        named=named,
    )
    processor = Lfm2VlProcessor(
        Lfm2VlImageProcessor(
            encoder_patch_size=16,
            min_image_tokens=4,
            max_image_tokens=16,
            min_tiles=2,
            max_tiles=4,
            tile_size=64,
            max_num_patches=64,
        ),
        words,
        chat_template=chat(*TURN, image="<image>", start="{{ bos_token }}"),
    )
    config = Lfm2VlConfig(
        text_config=text(
            words,
            model_type="lfm2",
            layer_types=["conv", FULL, "conv", FULL],
            block_auto_adjust_ff_dim=False,
            block_ff_dim=96,
            tie_word_embeddings=True,
        ),
        vision_config=VISION
        | {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 64, "vision_use_head": False},
        image_token_id=words.image_token_id,
        projector_hidden_size=HIDDEN,
    )
    return Checkpoint(config, processor)


@family()
def deepseek_ocr2() -> Checkpoint:
    """A whole view and tiles, read by two towers in a row; experts. A view always has 256 tokens, a tile 144."""
    words = tokenizer("<image>", eos="<end_of_sentence>", pad="<pad>", bos="<begin_of_sentence>", adds_bos=True)
    processor = DeepseekOcr2Processor(
        DeepseekOcr2ImageProcessor(size={"height": 128, "width": 128}, tile_size=96, min_patches=2, max_patches=3),
        words,
        patch_size=2,
        downsample_ratio=4,
        chat_template=chat("", "{% if role == 'assistant' %}<end_of_sentence>{% endif %}", "", image="<image>\n"),
    )
    config = DeepseekOcr2Config(
        text_config=text(
            words,
            num_key_value_heads=4,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        ),
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 128,
                "patch_size": 2,
                "window_size": 4,
                "global_attn_indexes": [],
                "downsample_channels": [32, 32],
            },
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
            },
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return Checkpoint(config, processor)


@family(video=True, mixed=False)
def molmo2() -> Checkpoint:
    """Features are added to the placeholders' embeddings, and all pictures of a prompt look both ways."""
    marks = (
        "<im_patch>",
        "<im_col>",
        "<im_start>",
        "<low_res_im_start>",
        "<frame_start>",
        "<im_end>",
        "<frame_end>",
        "<im_low>",
    )
    words = tokenizer(
        "<|im_start|>",
        *marks,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        bos="<|endoftext|>",
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
    )
    processor = Molmo2Processor(
        Molmo2ImageProcessor(
            size={"height": 56, "width": 56}, patch_size=14, max_crops=2, overlap_margins=[1, 1], pooling_size=[2, 2]
        ),
        Molmo2VideoProcessor(size={"height": 56, "width": 56}, patch_size=14, pooling_size=[2, 2]),
        words,
        chat_template=chat(*TURN, image="<|image|>", video="<|video|>"),
    )
    ids = dict(zip(marks, words.convert_tokens_to_ids(list(marks)), strict=True))
    config = Molmo2Config(
        text_config=text(words, additional_vocab_size=0),
        vision_config=VISION | {"num_key_value_heads": 2, "head_dim": 16, "image_size": [56, 56]},
        adapter_config={
            "vision_feature_layer": [-1, -2],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "text_hidden_size": HIDDEN,
        },
        image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"],
        image_patch_id=ids["<im_patch>"],
        image_col_id=ids["<im_col>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
    )
    return Checkpoint(config, processor)
