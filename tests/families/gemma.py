"""Google's families: layers with windows, pictures that look both ways, scaled embeddings."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
)

from tests.families.zoo import FULL, SLIDING, VISION, WINDOW, Checkpoint, chat, family, text, tokenizer

PATCHES = 9  # tokens of a picture


@family()
def gemma3() -> Checkpoint:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer("<start_of_turn>", eos="<end_of_turn>", pad="<pad>", bos="<bos>", adds_bos=True, named=named)
    # The system's text goes before the first user's, and texts are trimmed.
    template = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}"
        "{% set prefix = messages[0]['content'] + '\n\n' %}{% else %}"
        "{% set prefix = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}{% set turns = messages[1:] %}"
        "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}{% for message in turns %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
        "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 84, "width": 84}), words, image_seq_length=PATCHES, chat_template=template
    )
    config = Gemma3Config(
        text_config=text(
            words,
            sliding_window=WINDOW,
            query_pre_attn_scalar=1,  # sharp attention, or answers repeat one word
            tie_word_embeddings=True,
            layer_types=[SLIDING, SLIDING, FULL, SLIDING],
        ),
        vision_config=VISION | {"model_type": "siglip_vision_model", "image_size": 84},
        mm_tokens_per_image=PATCHES,
        image_token_id=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    return Checkpoint(config, processor)


def gemma4_processor() -> Any:
    """Return the processor of Gemma 4; a picture has at most nine tokens, a frame four."""
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    words = tokenizer(
        "<|video|>", "<|turn>", "<|channel>", "<channel|>", eos="<turn|>", pad="<pad>", bos="<bos>", named=named
    )
    template = chat(
        "<|turn>{{ role }}\n",
        "<turn|>\n",
        "<|turn>model\n",
        image="\n\n<|image|>\n\n",
        video="\n\n<|video|>\n\n",
        start="{{ bos_token }}",
        roles={"assistant": "model"},
        text="part['text'] | trim",
    )
    pooling = {"patch_size": 16, "pooling_kernel_size": 2}
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(max_soft_tokens=70, **pooling),
        words,
        Gemma4VideoProcessor(max_soft_tokens=70, **pooling),
        chat_template=template,
    )


def gemma4_config(words: Any, **fields: Any) -> Any:
    """Return a config of Gemma 4: two head sizes, per-layer inputs, capped logits."""
    ids = {
        "image_token_id": words.image_token_id,
        "video_token_id": words.convert_tokens_to_ids("<|video|>"),
        "audio_token_id": words.audio_token_id,
        "boi_token_id": words.boi_token_id,
        "eoi_token_id": words.eoi_token_id,
    }
    text_config = text(
        words,
        num_hidden_layers=6,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        sliding_window=WINDOW,
        global_head_dim=32,
        num_global_key_value_heads=1,
        final_logit_softcapping=0.3,
        tie_word_embeddings=True,
        **fields,
    )
    return Gemma4Config(
        text_config={**text_config, "vocab_size_per_layer_input": text_config["vocab_size"]},
        vision_config=VISION | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 16, "pooling_kernel_size": 2},
        audio_config=None,
        **ids,
    )


@family(video=True, unified=True)
def gemma4() -> Checkpoint:
    """The small kind: the last two layers use keys and values of earlier ones; pictures are causal."""
    processor = gemma4_processor()
    config = gemma4_config(processor.tokenizer, hidden_size_per_layer_input=8, num_kv_shared_layers=2)
    return Checkpoint(config, processor)


@family(video=True, unified=True)
def gemma4_vision() -> Checkpoint:
    """The large kind: pictures look both ways, in the layers with windows only."""
    processor = gemma4_processor()
    config = gemma4_config(
        processor.tokenizer,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        use_bidirectional_attention="vision",
    )
    return Checkpoint(config, processor)
