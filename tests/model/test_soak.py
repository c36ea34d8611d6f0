"""Test that two hundred random requests, a fifth of them aborted, leave nothing behind."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from model.engine.engine import Engine
from model.request import Medium, Request, RequestError, RequestOutput
from tests.model import tiny
from tests.model.oracle import with_oracle

WORDS = (
    "star",
    "ring",
    "Describe",
    "how many?",
    "<image>",
    "<|end|>",
    "\U0001f680",
    "\u4f60\u597d",
    "left of",
    "\n",
    " ",
)
STOPS = ("a", "e ", "in", "the", "\n", "star")


def random_request(number: int, rng: random.Random) -> Request:
    """Draw a request; some are too long to be served."""
    content: list[str | Medium] = [" ".join(rng.choices(WORDS, k=rng.randint(0, 12)))]
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2))):
        seed = rng.randrange(6)
        content.insert(
            rng.randint(0, len(content)),
            tiny.image(seed) if rng.random() < 0.6 else tiny.video(seed, rng.randint(1, 4)),
        )
    params: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, 5, 9, 17, 30)) if rng.random() < 0.97 else 400,
        "temperature": rng.choice((0.0, 0.0, 0.7, 1.0, 2.5)),
        "top_p": rng.choice((1.0, 0.9, 0.3)),
        "top_k": rng.choice((0, 0, 1, 50)),
        "min_p": rng.choice((0.0, 0.0, 0.1)),
        "seed": rng.getrandbits(64),
        "stop": tuple(rng.sample(STOPS, rng.choice((0, 0, 1, 3)))),
        "ignore_eos": rng.random() < 0.5,
    }
    return tiny.ask(f"q{number}", *content, speculation=rng.random() < 0.85, **params)


@pytest.mark.parametrize("oracle", [True, False], ids=["oracle", "untrained"])
def test_a_long_day_leaves_nothing_behind(crowd: Engine, plain_engine: Engine, oracle: bool) -> None:
    """Check integrity after every step and every abort, and one last output for each request.

    The tokens are those of each request alone; aborted answers are the beginnings of the whole ones.
    """
    rng = random.Random(int(oracle))
    requests = [random_request(i, rng) for i in range(200)]
    known: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for request in requests:
        try:
            outputs = tiny.drain(plain_engine, [request])[request.request_id]
        except RequestError:
            continue
        known[request.request_id] = tiny.token_ids(outputs)
        texts[request.request_id] = tiny.text_of(outputs)
    assert 150 < len(known) < 200
    if oracle:
        with_oracle(crowd, known, truth=0.8)

    coming, got, refused = list(requests), dict[str, list[RequestOutput]](), 0
    while coming or crowd.has_work:
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 6))):
            if not coming:
                break
            request = coming.pop(0)
            try:
                crowd.add(request)
                got[request.request_id] = []
            except RequestError:
                refused += 1
        if rng.random() < 0.06 and (alive := [r for r, o in got.items() if not (o and o[-1].finish_reason)]):
            victim = rng.choice(alive)
            last = crowd.abort(victim)
            assert last is not None
            got[victim].append(last)
            crowd.check_integrity()
        for output in crowd.step():
            got[output.request_id].append(output)
        crowd.check_integrity()
    tiny.assert_idle(crowd)

    assert len(got) == len(known) == 200 - refused
    ends = Counter(o[-1].finish_reason for o in got.values())
    assert ends["error"] == 0
    assert 20 < ends["abort"] < 80
    assert ends["stop"] > 5
    assert ends["length"] > 20
    for request_id, each in got.items():
        assert [o.finish_reason is not None for o in each] == [False] * (len(each) - 1) + [True], request_id
        tokens, text = tiny.token_ids(each), tiny.text_of(each)
        if each[-1].finish_reason == "abort":
            assert known[request_id][: len(tokens)] == tokens
            assert texts[request_id].startswith(text)
        else:
            assert (tokens, text) == (known[request_id], texts[request_id]), request_id
        stats = each[-1].stats
        assert stats is not None
        assert stats.completion_tokens == len(tokens)
        assert stats.accepted_tokens == sum(t.source == "draft" for o in each for t in o.tokens)
    assert crowd.pop_stats().running == crowd.pop_stats().waiting == 0
