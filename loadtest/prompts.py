"""Write pictures with questions about them as files for load generators.

    python -m loadtest.prompts runs/prompts [--number 32] [--seed 0]

The pictures are scenes from the bundled model's own generator, none of which was trained on, so that its draft is
accepted as often as in normal use. Each picture is written once; `guidellm.jsonl` and `aiperf.jsonl` list the same
questions in the two tools' formats.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from loadtest import media
from loadtest.client import Question
from model.demo import captions, scenes

FIRST_SCENE = 300_000  # earlier held-out scenes belong to training's evaluation and to the benchmark
CAPTION_SHARE = 0.7  # the other questions have answers of a few words


def draw(number: int, *, seed: int = 0, max_tokens: int = 128) -> list[Question]:
    """Draw `number` questions, each about a picture of its own; the same ones for the same seed."""
    rng = random.Random(seed)
    questions = []
    for index in range(number):
        scene = scenes.random_image_scene(scenes.scene_seed("heldout", "image", FIRST_SCENE + seed * 1_000_000 + index))
        turn = captions.image_turn(scene, rng, caption=rng.random() < CAPTION_SHARE)
        questions.append(Question(turn.question, (media.scene_image(scene),), {"max_tokens": max_tokens}))
    return questions


def write(folder: Path, questions: list[Question]) -> None:
    """Write the pictures and one list for each tool; both tools take absolute paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {"guidellm": [], "aiperf": []}
    for index, question in enumerate(questions):
        picture = folder.resolve() / f"{index}.png"
        picture.write_bytes(question.files[0].data)
        rows["guidellm"].append({"prompt": question.prompt, "image": str(picture)})
        rows["aiperf"].append({"text": question.prompt, "image": str(picture)})
    for tool, lines in rows.items():
        (folder / f"{tool}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.prompts", description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where to write; created if it does not exist")
    parser.add_argument("--number", type=int, default=32, help="of pictures, each with one question (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures (default 0)")
    options = parser.parse_args()
    write(options.folder, draw(options.number, seed=options.seed))
    print(f"{options.number} pictures, guidellm.jsonl and aiperf.jsonl are in {options.folder}")


if __name__ == "__main__":
    main()
