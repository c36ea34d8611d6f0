"""Test that wrong indices end the process where they are checked, and that two engines share one library."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.backends.native.builds import SANITIZED
from model.engine.engine import Engine
from tests.model import tiny

WRONG = {
    "position": ("position < stack.num_positions", "places[0, 0, 3] = 300"),
    "negative position": ("0 <= position", "places[0, 1, 0] = -1"),
    "slot": ("rows.first_slot + rows.batch <= rows.cache.num_slots", "first_slot = 1"),
    "row": ("rows.starts[b] + rows.counts[b] <= rows.cache.num_positions", "starts[1] = 999"),
    "count": ("rows.counts[b] <= rows.rows", "counts[0] = 5"),
    "parent": ("parents[row] < row", "parents[0, 2] = 2"),
}
CALL = """
import numpy as np
from tests.model.test_native import *
shape = Shape(HIDDEN, 4, 2, 32, INNER, 1e-5)
stack = Stack(shape, [layer(1, 4, 2, 32, bias=False, clip=False)], rotary=rotary(32, 300))
places, parents = np.zeros((1, 2, 4), np.int32), np.array([[-1, 0, 1, 2]] * 2, np.int32)
starts, counts, first_slot = np.array([7, 9], np.int32), np.array([4, 4], np.int32), 0
{change}
kept = cache(shape, 2, torch.float32)
rows = AttentionMetadata(kept, first_slot, 4, starts, counts, MaskKind.TREE, parents)
stack.forward(normal(2, 4, HIDDEN, seed=2), places, rows)
"""


@pytest.mark.skipif(not SANITIZED, reason="compiled in for `make sanitize` alone")
@pytest.mark.parametrize("what", [None, *WRONG])
def test_a_wrong_index_ends_the_process_and_says_which(what: str | None) -> None:
    message, change = WRONG[what] if what else ("", "")
    code = CALL.format(change=change)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGABRT if what else 0), done.stderr
    assert message in done.stderr


def test_two_engines_in_two_threads_say_what_each_says_alone(tiny_checkpoint: Path, tiny_draft: Path) -> None:
    """Drafts and batches differ, so that both need different memory at the same time."""
    requests = [tiny.ask(str(i), tiny.image(i), "What is it?", max_tokens=30) for i in range(6)]
    one = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=4))
    other = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=6))
    alone = tiny.answers(one, requests)

    def answers(engine: Engine) -> list[dict[str, list[int]]]:
        return [tiny.answers(engine, requests, every=every) for every in (0, 1, 2)]

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(answers, (one, other))] == [[alone] * 3] * 2
