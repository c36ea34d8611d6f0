"""Families with towers for any size and rotary positions on several axes: Qwen's and those built like them."""

from __future__ import annotations

from typing import Any

from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
    Exaone4_5_Config,
    Exaone4_5_Processor,
    HunYuanVLConfig,
    HunYuanVLImageProcessor,
    HunYuanVLProcessor,
    Kimi_K25Config,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    VideoLlama3Config,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)

from tests.families.zoo import FULL, HIDDEN, SLIDING, VISION, WINDOW, Checkpoint, chat, family, text, tokenizer

PADS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
IM_TURN = ("<|im_start|>{{ role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
HELPFUL = (  # Qwen's template adds a system message to a conversation without one
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
TOWER = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN}


def between(unit: int, fewest: int = 4, most: int = 20) -> dict[str, int]:
    """Return a processor's `size` that lets a picture have between `fewest` and `most` tokens of unit x unit pixels."""
    return {"shortest_edge": fewest * unit**2, "longest_edge": most * unit**2}


def axes(*sections: int, **fields: Any) -> dict[str, Any]:
    """Return rotary positions with these sections."""
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **fields}
    }


def qwen_tokens() -> Any:
    """Return the tokenizer of the Qwen families."""
    return tokenizer("<|im_start|>", *PADS, eos="<|im_end|>", pad="<|endoftext|>")


def pads(words: Any) -> dict[str, Any]:
    """Return the ids of the tokens that a Qwen config names."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: words.convert_tokens_to_ids(token) for name, token in zip(names, PADS, strict=True)}


def qwen2(processor: Any, **options: Any) -> Any:
    """Return a processor of Qwen2-VL's generation."""
    return processor(
        Qwen2VLImageProcessor(patch_size=14, size=between(28)),
        qwen_tokens(),
        Qwen2VLVideoProcessor(patch_size=14, size=between(28), **options),
        chat_template=chat(*IM_TURN, image=IMAGE, video=VIDEO, start=HELPFUL),
    )


@family(video=True)
def qwen2_vl() -> Checkpoint:
    processor = qwen2(Qwen2VLProcessor)
    words = processor.tokenizer
    config = Qwen2VLConfig(
        text_config=text(words, **axes(2, 3, 3)),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
        tie_word_embeddings=False,
        **pads(words),
    )
    return Checkpoint(config, processor)


@family(video=True, backend="pil")
def qwen2_5_vl() -> Checkpoint:
    """Its own target resizes as the media decoder does, which is as PIL does."""
    processor = qwen2(Qwen2_5_VLProcessor)
    words = processor.tokenizer
    config = Qwen2_5_VLConfig(
        text_config=text(words, **axes(2, 3, 3)),
        vision_config=TOWER | {"depth": 4, "patch_size": 14, "fullatt_block_indexes": [1, 3], "window_size": 56},
        tie_word_embeddings=False,
        **pads(words),
    )
    return Checkpoint(config, processor)


def qwen3(answer: str = IM_TURN[2]) -> Any:
    """Return a processor of Qwen3-VL's generation."""
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, size=between(32)),
        qwen_tokens(),
        Qwen3VLVideoProcessor(patch_size=16, size=between(32, 4, 48)),
        chat_template=chat(*IM_TURN[:2], answer, image=IMAGE, video=VIDEO),
    )


QWEN3_TOWER = TOWER | {"depth": 4, "patch_size": 16, "num_position_embeddings": 64}
DEEPSTACK = QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1, 2]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Three of four layers keep a state instead of keys and values.
HYBRID = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", FULL],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    **axes(1, 1, 0, mrope_interleaved=True, partial_rotary_factor=0.25),
}


@family(video=True)
def qwen3_vl() -> Checkpoint:
    processor = qwen3()
    words = processor.tokenizer
    text_config = text(words, **axes(4, 2, 2, mrope_interleaved=True))
    config = Qwen3VLConfig(text_config=text_config, vision_config=DEEPSTACK, tie_word_embeddings=False, **pads(words))
    return Checkpoint(config, processor)


@family(video=True)
def qwen3_vl_tied() -> Checkpoint:
    """The small sizes of Qwen3-VL share the embeddings with the head."""
    processor = qwen3()
    words = processor.tokenizer
    text_config = text(words, tie_word_embeddings=True, **axes(4, 2, 2, mrope_interleaved=True))
    config = Qwen3VLConfig(text_config=text_config, vision_config=DEEPSTACK, tie_word_embeddings=True, **pads(words))
    return Checkpoint(config, processor)


@family(video=True)
def qwen3_vl_moe() -> Checkpoint:
    processor = qwen3()
    words = processor.tokenizer
    text_config = text(words, **EXPERTS, **axes(4, 2, 2, mrope_interleaved=True))
    config = Qwen3VLMoeConfig(
        text_config=text_config, vision_config=DEEPSTACK, tie_word_embeddings=False, **pads(words)
    )
    return Checkpoint(config, processor)


@family(video=True, unified=True)
def qwen3_5() -> Checkpoint:
    processor = qwen3("<|im_start|>assistant\n<think>\n")
    words = processor.tokenizer
    config = Qwen3_5Config(
        text_config=text(words, **HYBRID), vision_config=QWEN3_TOWER, tie_word_embeddings=False, **pads(words)
    )
    return Checkpoint(config, processor)


@family(video=True, unified=True)
def qwen3_5_moe() -> Checkpoint:
    processor = qwen3("<|im_start|>assistant\n<think>\n")
    words = processor.tokenizer
    config = Qwen3_5MoeConfig(
        text_config=text(words, **HYBRID, **EXPERTS, shared_expert_intermediate_size=32),
        vision_config=QWEN3_TOWER,
        tie_word_embeddings=False,
        **pads(words),
    )
    return Checkpoint(config, processor)


@family(video=True, unified=True)
def minicpmv4_6() -> Checkpoint:
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    words = tokenizer("<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", named=named)
    sizes = {"scale_resolution": 56, "patch_size": 14, "max_slice_nums": 4}
    processor = MiniCPMV4_6Processor(
        MiniCPMV4_6ImageProcessor(**sizes),
        MiniCPMV4_6VideoProcessor(**sizes),
        words,
        chat_template=chat(
            *IM_TURN[:2], "<|im_start|>assistant\n<think>\n", image="<|image_pad|>\n", video="<|video_pad|>\n"
        ),
    )
    config = MiniCPMV4_6Config(
        text_config=text(words, model_type="qwen3_5_text", **HYBRID),
        vision_config=VISION | {"num_hidden_layers": 3, "image_size": 112, "insert_layer_id": 1},
        insert_layer_id=1,
        image_size=56,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
    return Checkpoint(config, processor)


@family()
def paddleocr_vl() -> Checkpoint:
    named = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    words = tokenizer(
        "<|IMAGE_START|>", "<|IMAGE_END|>", eos="</s>", pad="<unk>", bos="<|begin_of_sentence|>", named=named
    )
    turn = (
        "{% if role == 'user' %}User: {% elif role == 'assistant' %}Assistant:\n{% endif %}",
        "{% if role == 'assistant' %}</s>{% else %}\n{% endif %}",
        "Assistant:\n",
    )
    processor = PaddleOCRVLProcessor(
        PaddleOCRVLImageProcessor(patch_size=14, size=between(28)),
        words,
        chat_template=chat(
            *turn,
            image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
            start="<|begin_of_sentence|>",
            media_first=True,
        ),
    )
    config = PaddleOCRVLConfig(
        text_config=text(words, **axes(2, 3, 3)),
        vision_config=VISION | {"image_size": 56},
        image_token_id=words.image_token_id,
        vision_start_token_id=words.convert_tokens_to_ids("<|IMAGE_START|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|IMAGE_END|>"),
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def ernie4_5_vl_moe() -> Checkpoint:
    """Its router reads which tokens belong to pictures. Videos have times drawn onto their frames by a font that comes
    with the checkpoint: that is not tried here."""
    named = {
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token": "<|VIDEO_START|>",
        "video_end_token": "<|VIDEO_END|>",
    }
    words = tokenizer(
        "<|begin_of_sentence|>", "<|end_of_sentence|>", eos="</s>", pad="<unk>", bos="<s>", adds_bos=True, named=named
    )
    turn = (
        "{% if role == 'user' %}User: {% elif role == 'assistant' %}Assistant: {% endif %}",
        "{% if role == 'assistant' %}<|end_of_sentence|>{% else %}\n{% endif %}",
        "Assistant: ",
    )
    processor = Ernie4_5_VLMoeProcessor(
        Ernie4_5_VLMoeImageProcessor(patch_size=14, size=between(28)),
        words,
        Ernie4_5_VLMoeVideoProcessor(patch_size=14, size=between(28), draw_on_frames=False),
        chat_template=chat(
            *turn, image="Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", start="<|begin_of_sentence|>"
        ),
    )
    config = Ernie4_5_VLMoeConfig(
        text_config=text(
            words,
            **axes(3, 3, 2),
            moe_intermediate_size=[32, 32],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        ),
        vision_config={**VISION, "depth": 2, "num_heads": 2},
        image_start_token_id=words.image_start_token_id,
        image_end_token_id=words.image_end_token_id,
        image_token_id=words.image_token_id,
        video_start_token_id=words.video_start_token_id,
        video_end_token_id=words.video_end_token_id,
        video_token_id=words.video_token_id,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family(video=True)
def exaone4_5() -> Checkpoint:
    words = tokenizer("[|user|]", "[|assistant|]", "[|system|]", *PADS, eos="[|endofturn|]", pad="[PAD]", bos="[BOS]")
    processor = Exaone4_5_Processor(
        Qwen2VLImageProcessor(patch_size=14, size=between(28)),
        words,
        Qwen2VLVideoProcessor(patch_size=14, size=between(28)),
        chat_template=chat(
            "[|{{ role }}|]\n",
            "[|endofturn|]\n",
            "[|assistant|]\n<think>\n\n</think>\n\n",
            image=IMAGE + "\n",
            video=VIDEO + "\n",
        ),
    )
    config = Exaone4_5_Config(
        text_config=text(
            words,
            model_type="exaone4",
            sliding_window=WINDOW,
            sliding_window_pattern="LLLG",
            layer_types=[SLIDING, SLIDING, SLIDING, FULL],
        ),
        vision_config=TOWER
        | {"num_key_value_heads": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": (1,)},
        tie_word_embeddings=False,
        **{name: token for name, token in pads(words).items() if name.startswith(("image", "video"))},
    )
    return Checkpoint(config, processor)


@family()
def kimi_k25() -> Checkpoint:
    """Its keys are wider than its values. Videos are left out: transformers' own class counts their features wrong."""
    media = ("<|media_begin|>", "<|media_content|>", "<|media_end|>")
    roles = ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
    named = {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"}
    words = tokenizer(*media, *roles, eos="<|im_end|>", pad="[PAD]", bos="[BOS]", named=named)
    processor = Kimi_K25Processor(
        Kimi_K25ImageProcessor(patch_size=14, max_patches=64),
        words,
        Kimi_K25VideoProcessor(patch_size=14, max_patches=32, temporal_patch_size=2),
        chat_template=chat(
            "<|im_{{ role }}|>{{ role }}<|im_middle|>",
            "<|im_end|>",
            "<|im_assistant|>assistant<|im_middle|><think>",
            image="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n",
            video="<|kimi_k25_video_placeholder|>\n",
        ),
    )
    config = Kimi_K25Config(
        text_config=text(
            words,
            model_type="deepseek_v3",
            num_key_value_heads=4,
            head_dim=8,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        vision_config=VISION | {"pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=32,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)


@family()
def hunyuan_vl() -> Checkpoint:
    named = {"image_token": "<image>", "image_start_token": "<img_start>", "image_end_token": "<img_end>"}
    words = tokenizer("<user>", "<assistant>", eos="<eos>", pad="<pad>", bos="<bos>", named=named)
    processor = HunYuanVLProcessor(
        HunYuanVLImageProcessor(patch_size=16, size=between(32)),
        words,
        chat_template=chat(
            "",
            "{% if role == 'user' %}<user>{% elif role == 'assistant' %}<assistant>{% endif %}",
            "",
            image="<img_start><image><img_end>",
            start="<bos>",
        ),
    )
    config = HunYuanVLConfig(
        text_config=text(words, tie_word_embeddings=True, **axes(2, 2, 2, 2)),
        vision_config=VISION
        | {"out_hidden_size": HIDDEN, "text_hidden_size": HIDDEN, "patch_size": 16, "max_image_size": 128},
        image_token_id=words.image_token_id,
        image_start_token_id=words.image_start_token_id,
        image_end_token_id=words.image_end_token_id,
    )
    return Checkpoint(config, processor)


@family(video=True)
def video_llama_3() -> Checkpoint:
    """It drops the tokens of a video whose pixels hardly changed."""
    words = tokenizer("<|im_start|>", "<image>", *PADS[2:], eos="<|im_end|>", pad="<|endoftext|>")
    processor = VideoLlama3Processor(
        VideoLlama3ImageProcessor(patch_size=14, merge_size=2, size=between(28)),
        words,
        VideoLlama3VideoProcessor(patch_size=14, size=between(28)),
        chat_template=chat(*IM_TURN, image="<|image_pad|>\n", video="<|video_pad|>\n", start=HELPFUL),
    )
    config = VideoLlama3Config(
        text_config=text(words, model_type="qwen2"),
        vision_config=VISION,
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        tie_word_embeddings=False,
    )
    return Checkpoint(config, processor)
