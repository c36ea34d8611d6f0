"""vLLM on the same prompts, in an interpreter that has it: `python vllm_peer.py CHECKPOINT` serves rounds over pipes.

The file imports nothing of ours when it runs as a program, so that the interpreter needs vLLM only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

MAX_TOKENS = 160


def rows(
    python: str, checkpoint: str, target: str, batches: list[int], prompts: int, repeats: int
) -> list[dict[str, Any]]:
    """Rows of whole requests, greedy, image tasks, at each batch size."""
    import numpy as np
    from PIL import Image

    from model.bench import options as asked
    from model.bench import workload
    from model.request import Medium

    made = asked.parser("vllm")
    options = asked.read(made, made.parse_args(["--model", target, "--prompts", str(prompts)]))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs: dict[str, list[list[str]]] = {}
        for task in ("image caption", "image question"):
            jobs[task] = []
            for number, ((message,),) in enumerate(zip(workload.conversations(options, task), strict=True)):
                medium, question = message.content
                assert isinstance(medium, Medium)
                path = Path(folder) / f"{task} {number}.png"
                Image.fromarray(np.ascontiguousarray(medium.frames[0])).save(path)
                jobs[task].append([str(path), str(question)])
        order = json.dumps({"jobs": jobs, "batches": batches, "repeats": repeats, "max_tokens": MAX_TOKENS})
        done = subprocess.run(  # noqa: S603
            [python, "-P", str(Path(__file__).resolve()), checkpoint],
            input=order,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise OSError(f"vLLM did not run:\n{done.stderr[-2000:]}")
    for each in json.loads(done.stdout.splitlines()[-1]):
        found.append({"target": target, "sampling": "greedy", "drafter": "vllm", **each})
    return found


def _program(checkpoint: str) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    order = json.load(sys.stdin)

    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    processor = AutoProcessor.from_pretrained(checkpoint)
    engine = LLM(
        model=checkpoint,
        dtype="bfloat16",
        max_model_len=1200,
        limit_mm_per_prompt={"image": 1},
        max_num_seqs=max(order["batches"]),
        seed=0,
    )
    params = SamplingParams(temperature=0, max_tokens=order["max_tokens"])
    found = []
    for task, jobs in order["jobs"].items():
        requests = []
        for path, question in jobs:
            turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
            requests.append({"prompt": prompt, "multi_modal_data": {"image": Image.open(path).convert("RGB")}})
        for batch in order["batches"]:
            speeds = []
            for _ in range(order["repeats"] + 1):  # the first warms up
                tokens, begun = 0, time.perf_counter()
                for at in range(0, len(requests), batch):
                    outputs = engine.generate(requests[at : at + batch], params, use_tqdm=False)
                    tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
                speeds.append(tokens / (time.perf_counter() - begun))
            found.append({"task": task, "batch": batch, "tokens_per_second": round(median(speeds[1:]), 2)})
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    _program(sys.argv[1])
