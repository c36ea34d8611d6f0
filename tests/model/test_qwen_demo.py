"""Test that the second bundled target is a usual Qwen2.5-VL checkpoint, trained on inputs like those it serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.config import DEMO_WEIGHTS
from model.demo import checkpoint, qwen, qwen_target, qwen_vision, scenes
from model.demo.motion import MOTION_QUESTIONS
from model.demo.qwen_target import QwenConversations
from model.demo.vision import GRID, QUESTIONS, patch_labels

CLIP = scenes.render_clip(scenes.random_video_scene(scenes.scene_seed("heldout", "video", 3)), 6)
LARGEST = 15_500_000  # bytes, beside the other weights in the repository


@pytest.fixture(scope="module")
def first() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(DEMO_WEIGHTS / "target")


@pytest.fixture(scope="module")
def tokenizer(first: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return qwen.renamed_tokenizer(first)


@pytest.fixture(scope="module")
def target(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    return qwen.new_target(qwen.target_config(tokenizer)).eval()


@pytest.fixture(scope="module")
def folder(
    target: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    qwen.save(target, tokenizer, path)
    return path


def test_the_folder_loads_by_the_auto_classes(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert AutoConfig.from_pretrained(folder).model_type == "qwen2_5_vl"
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(loaded, Qwen2_5_VLForConditionalGeneration)
    assert loaded.dtype == torch.bfloat16
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "whoever may read one file, may read all"
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id
    assert (folder / "model.safetensors").stat().st_size <= LARGEST
    again = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which is larger?<|im_end|>\n"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids) == text
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}]
    assert again.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_words_keep_their_numbers(first: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> None:
    """The first target's embedding rows can be copied only if ids are the same."""
    text = "A large red striped star is above the blue circle. Qwen? ✓"
    assert tokenizer(text).input_ids == first(text, add_special_tokens=False).input_ids
    assert len(tokenizer) == len(first) == checkpoint.VOCABULARY
    assert tokenizer.convert_tokens_to_ids(list(qwen.SPECIAL)) == first.convert_tokens_to_ids(list(checkpoint.SPECIAL))


def test_clips_are_laid_out_as_the_image_processor_lays_out_images(folder: Path) -> None:
    """A pair of equal frames must give the patches that transformers makes of the frame as an image."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    frame = CLIP[2]
    given = processor(images=[Image.fromarray(frame)], return_tensors="pt")
    assert given["image_grid_thw"].tolist() == [qwen.grid(np.stack([frame] * 2))] == [[1, 2 * GRID, 2 * GRID]]
    still = qwen.patches(np.stack([frame] * 4))
    torch.testing.assert_close(still, given["pixel_values"].repeat(2, 1))
    # If the clip moves, each patch contains both frames of a pair.
    moving = qwen.patches(CLIP).unflatten(1, (3, 2, -1))
    for pair in range(3):
        for k in range(2):
            alone = qwen.patches(np.stack([CLIP[2 * pair + k]] * 2)).unflatten(1, (3, 2, -1))
            torch.testing.assert_close(moving.unflatten(0, (3, -1))[pair, :, :, k], alone[:, :, k])


@pytest.mark.parametrize(("size", "tokens"), [((192, 192), 144), ((384, 384), 144), ((40, 40), 64), ((640, 480), 130)])
def test_pictures_of_any_size_take_so_many_tokens(folder: Path, size: tuple[int, int], tokens: int) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    grid = processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0]
    assert int(grid.prod()) // qwen.MERGE**2 == tokens


def test_training_computes_what_the_model_computes(target: Qwen2_5_VLForConditionalGeneration) -> None:
    """The faster forwards of the training are the same functions as transformers' own (uncompiled here)."""
    tower, text = target.model.visual, target.model.language_model
    clip = torch.cat([qwen.patches(CLIP[:2]), qwen.patches(CLIP[2:4])])
    grid = torch.tensor([[1, 2 * GRID, 2 * GRID]] * 2)
    with torch.no_grad():
        wanted = tower(clip, grid).pooler_output
        view = qwen_vision.views(tower.config, 2)
        view = view._replace(cos=view.cos.float(), sin=view.sin.float())
        torch.testing.assert_close(qwen_vision.tokens_of(tower, clip, view), wanted, rtol=1e-2, atol=1e-2)
        hidden = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(0))
        places = torch.arange(7).expand(3, 2, 7)
        cos, sin = text.rotary_emb(hidden, places)
        below = hidden
        for layer in text.layers:
            below = qwen_target.above(layer, below, cos[:, None], sin[:, None])
        own = text(inputs_embeds=hidden, position_ids=places).last_hidden_state
        torch.testing.assert_close(
            F.rms_norm(below, (256,), text.norm.weight, text.norm.variance_epsilon), own, rtol=1e-4, atol=1e-4
        )


def test_batches_depend_on_their_number_alone(
    target: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """So a resumed training continues exactly. Labels are answers, at positions that the model can predict."""
    data = QwenConversations(tokenizer, target.config, 0, 2)
    image, video = target.config.image_token_id, target.config.video_token_id
    kinds = set()
    for index in range(16):
        batch, again = data.batch(index), QwenConversations(tokenizer, target.config, index, 2).batch(index)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        ids, labels = batch["input_ids"], batch["labels"]
        media = int(((ids == image) | (ids == video)).sum())
        assert media == int(batch["grid"].prod(-1).sum()) // qwen.MERGE**2
        assert batch["pixels"].shape == (int(batch["grid"].prod(-1).sum()), 3 * 2 * qwen.PATCH**2)
        asked = labels != -100
        assert torch.equal(labels[asked], ids[asked])
        for row in range(len(ids)):
            answers = tokenizer.decode(labels[row][asked[row]])
            assert answers.endswith("<|im_end|>")
            assert "<|im_start|>" not in answers
        if "frames" in batch:
            assert batch["patches"].shape == (media // (GRID * GRID), GRID * GRID, len(QUESTIONS))
            assert len(batch["frames"]) == len(batch["patches"])
        if "motions" in batch:
            assert batch["motions"].shape == (media, len(MOTION_QUESTIONS))
        kinds.add("video" if "motions" in batch else "square" if "frames" in batch else "stretched")
    assert kinds == {"video", "square", "stretched"}


def test_the_tower_is_asked_only_what_it_can_know() -> None:
    """Its positions are relative, so its labels are offsets to the centre and no absolute places."""
    scene = scenes.random_image_scene(scenes.scene_seed("heldout", "image", 1))
    labels = qwen_vision.tower_labels(patch_labels(scene, 0.0))
    names = list(qwen_vision.TOWER_QUESTIONS)
    assert not {"cell", "x", "y"} & set(names)
    for question, count in enumerate(qwen_vision.TOWER_QUESTIONS.values()):
        assert labels[:, question].min() >= 0
        assert labels[:, question].max() < count
    middle = labels[labels[:, names.index("anchor")] == 1]
    ways = [names.index("x to the centre"), names.index("y to the centre")]
    assert len(middle) == len(scene.things)
    assert (middle[:, ways] == qwen_vision.REACH + 1).all(), "at the centre there is no way to go"
