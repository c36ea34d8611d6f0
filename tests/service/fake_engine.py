"""A stand-in for `model.engine.engine.Engine`: the same interface, no tensors, text that depends on the request alone.

Commands hidden in a prompt make it misbehave. "CRASH AT n" dies at the n-th token of that request, but only where no
process did before (so that the replacement goes on); "ALWAYS CRASH" dies in every process; "CHOKE" breaks while it is
taken in; "DIE" and "ALWAYS DIE" end the process that tokenizes it; "FAIL AT n" ends it there with an engine error;
"HANG" stops the process from answering; "DIVERGE" makes the text depend on the process. The environment: FAKE_DELAY
seconds a step, FAKE_LOAD_DELAY, FAKE_FAIL_LOAD (by a setting or the model, or once: of the first process alone),
FAKE_BROKEN (every step raises), FAKE_CRASH_DIR, FAKE_ANY_SIZE (pictures keep their size, media are written to
FAKE_CRASH_DIR as they arrive, and it samples frames: every second one, or as many as num_frames says from the first
on; an fps of the table below makes it misbehave).

A draft's config.json may say {"refused": "why"}, {"refused_by_one": true} or {"load": seconds}. Files loaded-PID and
used-PID beside the crash markers tell which draft a process has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import ConfigError
from model.request import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Geometry,
    Medium,
    Request,
    RequestError,
    RequestOutput,
    RequestStats,
    Token,
    VideoMetadata,
)

MAX_PROMPT_TOKENS = 2000
SAMPLING_DIES, SAMPLING_DIES_ONCE, SAMPLING_HANGS, SAMPLING_REFUSES, SAMPLING_FAILS = 901.0, 902.0, 903.0, 904.0, 905.0
SAMPLING_HAS_NO_OPINION, SAMPLING_IS_WRONG, SAMPLING_IS_EMPTY, SAMPLING_IS_SLOW = 906.0, 907.0, 908.0, 909.0
SLOW_SECONDS = 1.5
ANY_SIZE = Geometry(
    default_num_frames=3,
    samples_frames=True,
    image_options=("max_pixels", "min_pixels", "size", "do_image_splitting"),
    video_options=("max_pixels", "min_pixels", "size"),
)
NUM_TOKENS = 2**24
WORDS: dict[int, str] = {}  # by token
BLOCK = 4  # tokens of a step with speculation: three from the draft, one from the target


def load(options: dict[str, Any]) -> FakeEngine:
    time.sleep(float(os.environ.get("FAKE_LOAD_DELAY", "0")))
    if (kind := os.environ.get("FAKE_FAIL_LOAD")) and (kind != "once" or _first("failed")):
        raise (ConfigError if kind == "setting" else ValueError)("there is no checkpoint at this path")
    if (draft := options.get("draft")) and not Path(draft).exists():
        raise ConfigError(f"draft {draft!r} is not there")
    return FakeEngine(options)


def answer_words(request: Request) -> list[str]:
    """What the fake says to a request: as many words as max_tokens allow, or 40, then an end."""
    digest = hashlib.sha256()
    for message in request.messages:
        digest.update(message.role.encode())
        for part in message.content:
            digest.update(part.frames.tobytes() if isinstance(part, Medium) else part.encode())
    if request.prompt is not None:
        digest.update(repr(request.prompt).encode())
    digest.update(repr((request.params.temperature, request.params.seed if request.params.temperature else 0)).encode())
    state = int.from_bytes(digest.digest()[:8], "big")
    words = []
    for position in range(request.params.max_tokens):
        if not request.params.ignore_eos and position >= 40:
            break
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        words.append(f"w{state >> 54} ")
    return words


def _crash_dir() -> Path:
    return Path(os.environ.get("FAKE_CRASH_DIR", "/nonexistent"))


def _first(what: str) -> bool:
    """Whether this is the first process that asks."""
    try:
        (_crash_dir() / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass
class Sequence:
    request: Request
    words: list[str]
    text: str  # of the prompt
    added: float
    said: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    first: float | None = None
    text_said: str = field(default="")


class FakeEngine:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.delay = float(os.environ.get("FAKE_DELAY", "0.002"))
        self.crash_dir = _crash_dir()
        self.info = EngineInfo(
            model="fake",
            device=str(options["device"]),
            dtype="float32",
            backend="torch",
            drafter="flash",
            max_model_len=4096,
            max_num_seqs=int(options["max_num_seqs"]),
            tokens_per_image=16,
            geometry=ANY_SIZE
            if os.environ.get("FAKE_ANY_SIZE")
            else Geometry(exact=None, shortest_edge=64, crop=(64, 64), resample=3, default_num_frames=4),
            max_frames=200,
        )
        self.sequences: dict[str, Sequence] = {}
        self._counts: dict[str, int] = {}
        self._lengths: list[int] = []
        self._sizes: list[int] = []
        self._step_tokens: list[int] = []
        self._note("loaded", str(options.get("draft")))

    def read_draft(self, folder: str) -> str:
        told = json.loads((Path(folder) / "config.json").read_text())
        time.sleep(told.get("load", 0))
        if "refused" in told:
            raise ConfigError(f"draft {folder!r} {told['refused']}")
        if "refused_by_one" in told:
            if _first("refused"):
                raise ConfigError(f"draft {folder!r} is not to one worker's taste")
        return folder

    def pack_draft(self, draft: str) -> str:
        return draft

    def swap(self, draft: str) -> None:
        self._note("used", draft)

    def _note(self, what: str, draft: str) -> None:
        """The content of the draft's weights, by which tests know it."""
        weights = Path(draft) / "model.safetensors"
        if self.crash_dir.exists():
            (self.crash_dir / f"{what}-{os.getpid()}").write_text(weights.read_text() if weights.exists() else "none")

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    def sample_frames(self, source: VideoMetadata, num_frames: int | None, fps: float | None) -> list[int] | None:
        with (self.crash_dir / "sampled").open("a") as file:
            file.write(f"{os.getpid()} {source} {num_frames} {fps}\n")
        if fps == SAMPLING_DIES or (fps == SAMPLING_DIES_ONCE and _first("sampling")):
            os.kill(os.getpid(), signal.SIGKILL)
        if fps in (SAMPLING_HANGS, SAMPLING_IS_SLOW):
            time.sleep(SLOW_SECONDS if fps == SAMPLING_IS_SLOW else 3600)
        if fps == SAMPLING_REFUSES:
            raise RequestError("the model's processor takes no such rate")
        if fps == SAMPLING_FAILS:
            raise KeyError("secret details of a processor")
        if fps == SAMPLING_HAS_NO_OPINION:
            return None
        if fps in (SAMPLING_IS_WRONG, SAMPLING_IS_EMPTY):
            return [0, source.total_frames] if fps == SAMPLING_IS_WRONG else []
        return list(range(0, source.total_frames, 2) if num_frames is None else range(num_frames))

    def tokenize(self, request: Request) -> list[int]:
        """One token a word; of a raw prompt in token ids, those."""
        if isinstance(request.prompt, tuple):
            return list(request.prompt)
        words = _text(request).split()
        if "CHOKE" in words:
            raise KeyError("a tokenizer's own trouble")
        if "DIE" in words and ("ALWAYS" in words or _first("tokenizing")):
            os.kill(os.getpid(), signal.SIGKILL)
        WORDS.update({_id(word): word for word in words})
        return [_id(word) for word in words]

    def token_names(self, ids: Seq[int]) -> list[str]:
        return [WORDS.get(token, f"t{token}") for token in ids]

    def detokenize(self, ids: Seq[int]) -> str:
        if unknown := [token for token in ids if not 0 <= token < NUM_TOKENS]:
            raise RequestError(f"tokens names token {unknown[0]}; tokens are 0 to {NUM_TOKENS - 1}", param="tokens")
        return " ".join(self.token_names(ids))

    def prepare(self, request: Request) -> Sequence:
        if os.environ.get("FAKE_ANY_SIZE"):
            media = [part for m in request.messages for part in m.content if isinstance(part, Medium)]
            for index, medium in enumerate(media):
                np.save(self.crash_dir / f"medium-{index}.npy", medium.frames)
                note = [medium.kind, medium.seconds_per_frame, medium.frame_times, medium.source, medium.options]
                (self.crash_dir / f"medium-{index}.txt").write_text(repr(note))
        text = _text(request)
        if len(text.split()) > MAX_PROMPT_TOKENS:
            param = "messages" if request.prompt is None else "prompt"
            raise RequestError("the prompt is too long for the model", param=param, code="context_length_exceeded")
        if "CHOKE" in text:
            raise KeyError("a template's own trouble")
        return Sequence(request, answer_words(request), text, time.monotonic())

    def add(self, sequence: Sequence) -> None:
        self.sequences[sequence.request.request_id] = sequence
        self._count(prompt_tokens=len(sequence.text.split()))

    def abort(self, request_id: str) -> RequestOutput | None:
        gone = self.sequences.pop(request_id, None)
        return None if gone is None else RequestOutput(request_id, "", (), "abort")

    def step(self) -> list[RequestOutput]:
        time.sleep(self.delay)
        running = list(self.sequences.values())[: self.info.max_num_seqs]
        self._sizes.append(len(running))
        outputs = [self._advance(sequence) for sequence in running]
        self._step_tokens.append(sum(len(output.tokens) for output in outputs))
        return outputs

    def pop_stats(self) -> EngineStats:
        running = min(len(self.sequences), self.info.max_num_seqs)
        stats = EngineStats(
            running=running,
            waiting=len(self.sequences) - running,
            kv_cache_usage=running / self.info.max_num_seqs,
            acceptance_lengths=tuple(self._lengths),
            batch_sizes=tuple(self._sizes),
            step_tokens=tuple(self._step_tokens),
            accepted_per_position=(self._counts.get("drafts", 0),) * (BLOCK - 1),
            step_seconds=(("verify", self.delay),) if self._sizes else (),
            **self._counts,
        )
        self._counts, self._lengths, self._sizes, self._step_tokens = {}, [], [], []
        return stats

    def _advance(self, s: Sequence) -> RequestOutput:
        self._misbehave(s)
        if (fail := re.search(r"FAIL AT (\d+)", s.text)) and s.said >= int(fail[1]):
            del self.sequences[s.request.request_id]
            return RequestOutput(s.request.request_id, "", (), "error", error="secret details of /a/path")
        size = BLOCK if s.request.speculation and s.said else 1
        words = s.words[s.said : s.said + size]
        tokens = []
        for place, word in enumerate(words):
            word = f"p{os.getpid()} " if "DIVERGE" in s.text else word
            tokens.append(Token(_id(word), word, "draft" if place < size - 1 else "target"))
        if size > 1:
            s.drafts += 1
            s.draft_tokens += 7
            s.accepted += len(words) - 1
            self._count(drafts=1, draft_tokens=7, accepted_tokens=len(words) - 1)
            self._lengths.append(len(words))
        s.said += len(words)
        s.first = s.first or time.monotonic()
        self._count(generation_tokens=len(words))
        return self._output(s, tokens)

    def _output(self, s: Sequence, tokens: list[Token]) -> RequestOutput:
        said, text = s.text_said + "".join(token.text for token in tokens), "".join(token.text for token in tokens)
        cut, stop = min(
            ((at, stop) for stop in s.request.params.stop if (at := said.find(stop)) >= 0), default=(None, None)
        )
        reason: FinishReason | None = None
        if cut is not None:
            text, reason = text[: max(0, cut - len(s.text_said))], "stop"
        elif s.said == len(s.words):
            reason = "length" if s.said == s.request.params.max_tokens else "stop"
        s.text_said = said
        stats = None
        if reason:
            del self.sequences[s.request.request_id]
        if reason or s.request.running_stats:
            assert s.first is not None
            stats = RequestStats(
                prompt_tokens=len(s.text.split()),
                completion_tokens=s.said,
                drafts=s.drafts,
                draft_tokens=s.draft_tokens,
                accepted_tokens=s.accepted,
                queue=0.0,
                time_to_first_token=s.first - s.added,
                decode=time.monotonic() - s.first,
            )
        return RequestOutput(s.request.request_id, text, tuple(tokens), reason, stats, stop_reason=stop)

    def _misbehave(self, s: Sequence) -> None:
        if os.environ.get("FAKE_BROKEN"):
            raise RuntimeError("the engine is broken for everybody")
        crash = re.search(r"CRASH AT (\d+)", s.text)
        if crash and s.said >= int(crash[1]):
            marker = self.crash_dir / hashlib.sha256(s.text.encode()).hexdigest()
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if "ALWAYS CRASH" in s.text:
            raise RuntimeError("the engine is broken")
        if "HANG" in s.text:
            time.sleep(3600)

    def _count(self, **counts: int) -> None:
        for name, number in counts.items():
            self._counts[name] = self._counts.get(name, 0) + number


def _text(request: Request) -> str:
    if request.prompt is None:
        return " ".join(part for m in request.messages for part in m.content if isinstance(part, str))
    return request.prompt if isinstance(request.prompt, str) else " ".join(f"t{token}" for token in request.prompt)


def _id(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:3], "big")
