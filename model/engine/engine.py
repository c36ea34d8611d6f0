"""Runs the FLASH engine: schedule, prefill or draft and verify, emit. Knows nothing of HTTP, processes or wall clocks.

The life of a request: `prepare` applies the chat template, tokenises, and refuses what cannot be served -> `add` puts
it into the waiting list -> steps allocate a slot of the KV cache, encode its media and prefill its prompt, chunk by
chunk -> further steps draft a tree for every decoding sequence, verify all trees in one pass of the target, and emit
the accepted draft tokens plus the bonus token -> the request finishes and its slot is freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import transformers

from model.backends import graphs
from model.backends.attention import prompt_rows
from model.backends.kv_cache import KVCache
from model.backends.native import library
from model.config import EngineConfig
from model.decoding import sampling, verify
from model.decoding.detokenize import Vocabulary
from model.decoding.grammar import Grammars, Guide
from model.decoding.guided_trees import Guided
from model.decoding.tree import IDLE, PLAIN
from model.drafters import hot_swap, registry
from model.drafters.base import Drafter, Room
from model.drafters.flash.drafter import FlashDrafter
from model.drafters.hot_swap import Incoming, Packed
from model.engine import choice, intake
from model.engine.description import describe
from model.engine.encoder_cache import EncoderCache
from model.engine.media import MediaEncoder
from model.engine.native_round import NativeRound
from model.engine.prefix_cache import PrefixCache, parting_positions
from model.engine.round import Round, TorchRound
from model.engine.scheduler import Chunk, Decoding, Scheduler
from model.engine.sequence import Sequence
from model.engine.sizing import Sizing
from model.engine.speculation import SpeculationController
from model.engine.stats import Counters
from model.engine.warm_up import Chains, warm_up
from model.request import (
    EngineStats,
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    Token,
    TokenLogprobs,
    VideoMetadata,
)
from model.targets.base import Target
from model.targets.raw_prompt import checked_ids, token_names
from model.targets.registry import load_target, open_checkpoint


class Engine:
    """Serves one target and its draft on one device. Not thread-safe: one caller at a time."""

    def __init__(self, config: EngineConfig, target: Target | None = None, drafter: Drafter | None = None) -> None:
        """Load the target and drafter that `config` names, unless passed in. Raises ConfigError if it cannot serve
        them."""
        self._requested, self.config = config, config.resolved()
        config = self.config
        if config.device == "cpu":
            if config.threads:
                torch.set_num_threads(config.threads)
            library.use_threads(torch.get_num_threads())
            library.share_cores(config.share_cores)
        sizing = Sizing.read(config, target)
        if target is None:
            opened = open_checkpoint(config)
            sizing.check_before_loading(opened)
            target = load_target(config, registry.aux_layers(config), opened)
        self.target = target
        self.max_model_len = config.context(target.max_positions)
        margin = config.nodes + 1
        num_slots = sizing.num_slots(target)
        self.cache = (KVCache if target.group is None else target.group.cache)(
            layers=target.layers,
            num_slots=num_slots,
            capacity=self.max_model_len,
            margin=margin,
            rows=config.prefill_chunk + target.largest_block,
            dtype=target.dtype,
            device=target.device,
            states=None if target.states is None else target.states.allocate(num_slots, saving=config.prefix_cache),
        )
        if target.device.index is not None and target.device.type == "cuda":
            torch.cuda.set_device(target.device)  # Triton starts kernels on the current device only
        recorder = graphs.recorder(target.device) if config.graphs and target.recordable else None
        self.counters, self.load = Counters(), SpeculationController(num_slots, config.nodes)
        self.prefixes = PrefixCache(enabled=config.prefix_cache)
        self.round: Round
        if target.verifier is not None:
            self.round = NativeRound(target.verifier, self.cache, self.counters, self.load)
        else:
            self.round = TorchRound(target, self.cache, self.counters, self.load, recorder)
        self._room = Room(num_slots, self.max_model_len, margin, config.tree_width, recorder)
        self.use(drafter or registry.load_drafter(config, target, self._room))
        self._verified = 0  # draft nodes verified in the latest round
        self.vocabulary = Vocabulary(target.tokenizer)
        self.grammars = Grammars(
            target.tokenizer,
            target.vocab_size,
            target.eos_ids,
            num_cached=config.grammar_cache,
            max_symbols=config.max_grammar_symbols,
        )
        self.scheduler = Scheduler(config, self.load)
        features = EncoderCache(
            config.encoder_cache_bytes, f"{config.model} {transformers.__version__} {target.geometry}"
        )
        self.media = MediaEncoder(target, features, self.counters)
        self.info = describe(config, target, self.cache, self.drafter, self.max_model_len)

    def use(self, drafter: Drafter | None) -> None:
        """Draft with this drafter from the next step on; None: no drafting. No sequence may be running."""
        self.prefixes.clear()  # the warm-up overwrites them
        if drafter is not None and self.config.adaptive_drafting and self.load.nodes and not self.load.known:
            self._warm_up(drafter)
        self._draft_with(drafter)

    def _draft_with(self, drafter: Drafter | None) -> None:
        """Set the drafter of the next rounds."""
        self.drafter: Drafter | None = drafter
        self.round.use(drafter)
        self._native = self.round.native and (drafter is None or drafter.native)

    def _warm_up(self, drafter: Drafter) -> None:
        """Measure the cost of rounds: with drafting for a native FLASH draft, otherwise of verification only."""
        caches = [self.cache]
        if self.round.native and isinstance(drafter, FlashDrafter) and drafter.step is not None:
            self.round.use(drafter)
            caches.append(drafter.cache)
        else:
            self.round.use(Chains())
        with nullcontext() if self.round.native else self._torch():
            warm_up(self.round, self.load, caches)

    # --- swapping the draft

    def read_draft(self, folder: str) -> Incoming:
        """Read another draft and check that it can replace the present one, without changing anything. Any thread may
        call it at any time. Raises ConfigError if the draft does not fit."""
        return hot_swap.read(folder, self._requested, self.config, self.target, self._room)

    def pack_draft(self, draft: Incoming) -> Packed:
        """Prepare a draft for `swap`. Must be called between two steps; changes nothing yet."""
        with library.single_torch_thread() if self.target.native else nullcontext():
            return hot_swap.pack(draft, self.target, self._room)

    def swap(self, draft: Packed) -> None:
        """Draft with this draft from the next step on. Running sequences, whose context it lacks, finish without
        drafting."""
        for sequence in self.scheduler.running:
            sequence.speculates = False
        self.load.forget_draft()
        self.prefixes.forget_drafts()
        self.config = draft.config
        self._draft_with(draft.drafter)
        self.info = describe(self.config, self.target, self.cache, self.drafter, self.max_model_len)

    # --- requests

    def prepare(self, request: Request) -> Sequence:
        """Build a request's sequence and leave the engine unchanged. Any thread may call it, one at a time. Raises
        RequestError."""
        return intake.prepare(request, self.target, self.vocabulary, self.grammars, self.max_model_len)

    def tokenize(self, request: Request) -> list[int]:
        """Return the tokens of a request's prompt. Any thread may call it, one at a time. Raises RequestError."""
        return intake.tokenize(request, self.target).ids

    def token_names(self, ids: Seq[int]) -> list[str]:
        """Return the names of tokens in the vocabulary."""
        return token_names(self.target.tokenizer, ids)

    def detokenize(self, ids: Seq[int]) -> str:
        """Return the text of tokens, special ones included. Raises RequestError for tokens that do not exist."""
        known = checked_ids(ids, self.target.vocab_size, param="tokens")
        return str(self.target.tokenizer.decode(known, clean_up_tokenization_spaces=False))

    def sample_frames(self, source: VideoMetadata, num_frames: int | None, fps: float | None) -> list[int] | None:
        """Return the indices of the frames that the target wants of a video; None if it leaves the choice to the
        caller. Any thread may call it, one at a time. Raises RequestError."""
        return self.target.sample_frames(source, num_frames, fps)

    def add(self, request: Request | Sequence) -> None:
        """Add a request, prepared or not, to the waiting ones. Raises RequestError if it cannot be served."""
        sequence = request if isinstance(request, Sequence) else self.prepare(request)
        if self.scheduler.find(sequence.request.request_id):
            raise RequestError(f"request id {sequence.request.request_id!r} is already in use", param="request_id")
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request and free its slot. Returns its last output, or None if the request is unknown."""
        sequence = self.scheduler.find(request_id)
        return None if sequence is None else self._finish(sequence, "abort")

    @property
    def has_work(self) -> bool:
        """Return whether any request waits or runs."""
        return self.scheduler.has_work

    def pop_stats(self) -> EngineStats:
        """Return the present gauges, and the counts since the last call."""
        return self.counters.pop(
            running=len(self.scheduler.running), waiting=len(self.scheduler.waiting), kv_cache_usage=self.cache.usage
        )

    # --- the step

    def step(self) -> list[RequestOutput]:
        """Run one pass of the target, over a prompt chunk or all decoding sequences. Returns one output per request at
        most."""
        begun = self.counters.now()
        match work := self.scheduler.schedule(self.cache.num_free):
            case Chunk():
                with self._torch():
                    if work.sequence.slot is None:
                        work = work.moved(self._begin(work.sequence))
                    outputs = self._prefill(work)
            case Decoding() if self._native:  # torch is used for sampling only
                outputs = self._decode(work)
            case Decoding():
                with self._torch():
                    self._compact()
                    outputs = self._decode(work)
            case None:
                return []
        seconds = self.counters.now() - begun
        self.counters.end_step()
        self.scheduler.took(work, seconds)
        if isinstance(work, Decoding):
            drafting = len(work.nodes) - work.nodes.count(0)
            guided = any(sequence.guide for sequence in work.sequences)
            if guided:
                self.load.took_guided(drafting > 0, seconds)
            if not (guided and drafting):  # those cost more than others
                self.load.took(len(work.nodes), drafting, self._verified, seconds)
        return outputs

    @contextmanager
    def _torch(self) -> Iterator[None]:
        """Set up inference mode and threads for code that computes with torch."""
        with torch.inference_mode(), library.single_torch_thread() if self.target.native else nullcontext():
            yield

    def _prefill(self, chunk: Chunk) -> list[RequestOutput]:
        """Compute one chunk of a prompt. The last chunk also yields the first token."""
        sequence, target = chunk.sequence, self.target
        slot, count = sequence.slot, chunk.end - chunk.start
        assert slot is not None
        assert sequence.positions is not None
        try:
            self.media.encode(sequence, chunk.end)
        except Exception as error:  # any error of a processor or tower; other requests must go on
            reason = f"the request's media could not be encoded: {type(error).__name__}"
            return [self._finish(sequence, "error", reason)]
        with self.counters.timed("prefill"):
            prompt = sequence.prompt
            rows = prompt_rows(self.cache, slot, chunk.start, count, prompt.block_numbers(chunk.start, chunk.end))
            ids = torch.tensor([prompt.ids[chunk.start : chunk.end]], device=target.device)
            positions = np.ascontiguousarray(sequence.positions[:, None, chunk.start : chunk.end])
            features = self.media.between(sequence, chunk.start, chunk.end)
            hidden, aux_hidden_states, embeds = target.forward(ids, positions, rows, features)
            self.cache.keep([slot], [range(count)])
            if self.drafter and sequence.speculates:
                begun = self.counters.now()
                self.drafter.prefill(slot, chunk.start, aux_hidden_states[0], embeds[0])
                self.load.read(count, self.counters.now() - begun)
        sequence.computed = chunk.end
        self.prefixes.hold(slot, sequence.contents, chunk.end, drafted=sequence.speculates)
        self.counters.prompt_tokens += count
        if sequence.prefilling:
            return []
        sequence.features, sequence.positions = [], None
        logits = target.logits(hidden[:, -1:])
        process = choice.processing([sequence], lambda _: [[]], self.target.eos_ids)
        first = [int(sampling.choose(logits, [sequence.request.params], lambda _: [0], process=process)[0, 0])]
        if sequence.guide is not None:
            sequence.guide.follow(first)
        return [self._emit(sequence, first, 0, choice.token_logprobs(self.vocabulary, sequence, logits[0], first))]

    def _begin(self, sequence: Sequence) -> int:
        """Allocate a slot and reuse any cached prefix. Returns the number of cached prompt tokens."""
        prompt, target = sequence.prompt, self.target
        sequence.started = self.counters.now()
        sequence.cached = sequence.computed = cached = self._take_slot(sequence)
        spared = sum(end <= cached for _, end in prompt.spans)  # media that need no lookup in the encoder cache
        self.counters.encoder_cache_queries += spared
        self.counters.encoder_cache_hits += spared
        self.counters.prefix_cache_queries += len(prompt.ids)
        self.counters.prefix_cache_hits += cached
        self.counters.prompt_tokens += cached
        sequence.features = [[] for _ in prompt.media]
        sequence.positions = target.positions(prompt)
        sequence.next_position = int(sequence.positions[0, -1]) + 1
        return cached

    def _take_slot(self, sequence: Sequence) -> int:
        """Allocate a slot and copy any cached prefix into it. Returns the number of cached prompt tokens."""
        prompt, drafter = sequence.prompt, self.drafter if sequence.request.speculation else None
        contents, most = sequence.contents, len(prompt.ids) - 1  # the logits of the last one are needed

        def usable(slot: int, length: int) -> int:
            """Return how many of the first `length` positions of a slot can be shared."""
            return self.cache.shareable(slot, prompt.cut_before(length))

        source, shared = self.prefixes.best(contents, most, drafted=drafter is not None, usable=usable)
        if drafter and self.load.begins(len(self.scheduler.running), len(prompt.ids) - shared):
            sequence.speculates = True
        elif drafter:
            source, shared = self.prefixes.best(contents, most, drafted=False, usable=usable)
        cache = self.cache
        slot, lowest = self.prefixes.choose(cache.free_slots, source, shared), cache.free_slots[0]
        if slot != lowest and not self._native:
            # Torch computes every slot below the highest in use, so take the lowest one and move the contents there.
            self._exchange(lowest, slot)
            source = {slot: lowest, lowest: slot}.get(source, source)
            slot = lowest
        sequence.slot = cache.take(slot, parting_positions(prompt))
        if drafter and sequence.speculates:
            drafter.start(slot, prompt)
            shared = shared if shared and drafter.share(source, slot, shared) else 0
        if shared:
            cache.share(source, slot, shared)
        self.prefixes.forget(slot)
        return shared

    def _decode(self, decoding: Decoding) -> list[RequestOutput]:
        """Run one round of draft and verify over slots 0 to the highest decoding one."""
        now, load = self.round, self.load
        batch = 1 + max(s.slot for s in decoding.sequences if s.slot is not None)
        now.budgets[:batch] = IDLE
        by_slot: list[Sequence | None] = [None] * batch
        guided: dict[int, Guided] = {}
        undrafted: set[int] = set()  # slots whose trees need no draft
        for sequence, nodes in zip(decoding.sequences, decoding.nodes, strict=True):
            slot = sequence.slot
            assert slot is not None
            by_slot[slot] = sequence
            now.newest[slot], now.budgets[slot] = sequence.tokens[-1], nodes if sequence.speculates else PLAIN
            now.roots[slot] = sequence.next_position + len(sequence.tokens) - 1
            if (guide := sequence.guide) is not None:
                most = max(nodes, self._num_forced(sequence, guide, decoding.most))
                if most:
                    guided[slot] = Guided(guide, most)
                    undrafted |= set() if guided[slot].needs_draft else {slot}
        active, most = len(decoding.sequences), max(decoding.nodes)
        self.counters.batch_sizes.append(active)
        trees, likeliest, logits = now.draft_and_verify(batch, most, guided)
        chosen = likeliest
        if chosen is None or not all(s is None or s.takes_likeliest for s in by_slot):
            with self._torch():
                chosen = choice.choose_at_nodes(by_slot, trees, likeliest, logits, self.target.eos_ids)
        for slot, owner in enumerate(by_slot):
            if owner is not None and owner.guide is not None and owner.takes_likeliest:
                choice.follow(owner.guide, trees, slot, chosen, now.likeliest)
        sizes = trees.sizes.tolist()
        accepted = now.commit(chosen)
        self._verified = sum(sizes) - batch
        outputs = []
        for sequence, nodes in zip(decoding.sequences, decoding.nodes, strict=True):
            assert sequence.slot is not None
            tokens, size = accepted[sequence.slot], sizes[sequence.slot]
            sequence.computed += len(tokens)
            if sequence.guide is not None and not sequence.takes_likeliest:
                sequence.guide.follow(tokens)
            if nodes and sequence.slot not in undrafted:
                load.drafted(sequence, len(tokens) - 1)
            token_logprobs = None
            if sequence.request.params.logprobs is not None:
                path = verify.walk(trees, sequence.slot, chosen[sequence.slot]).path
                with self._torch():
                    rows = logits[sequence.slot, path]
                    token_logprobs = choice.token_logprobs(self.vocabulary, sequence, rows, tokens)
            outputs.append(self._emit(sequence, tokens, size - 1, token_logprobs))
        return outputs

    def _num_forced(self, sequence: Sequence, guide: Guide, most: int) -> int:
        """Return how many nodes of text that the grammar forces to verify: it costs no draft, so it is proposed even
        where drafting does not pay. most: room for nodes."""
        if self.drafter is None or not sequence.request.speculation:
            return 0
        return min(len(guide.forced()), sequence.remaining - 1, most)

    # --- outputs

    def _emit(
        self,
        sequence: Sequence,
        tokens: list[int],
        proposed: int,
        token_logprobs: list[TokenLogprobs] | None = None,
    ) -> RequestOutput:
        """Append a step's tokens to the answer, up to its end, and build the output.

        tokens: accepted draft tokens, then the bonus token; proposed: draft tokens verified. The last emitted token
        counts as the target's, also if the answer ends before the bonus token.
        """
        params, guide = sequence.request.params, sequence.guide
        ends = params.ends(self.target.eos_ids)
        sequence.last_token = self.counters.now()
        sequence.first_token = sequence.first_token or sequence.last_token
        decode, stops = sequence.detokenizer.decode, sequence.stops
        emitted: list[Token] = []
        text = ""
        finish: FinishReason | None = None
        for index, token in enumerate(tokens[: sequence.remaining]):
            piece = decode(token)
            emitted.append(Token(token, piece, "draft"))
            searched = params.stop and len(sequence.tokens) + index >= params.min_tokens
            text += stops.decode(piece) if searched else piece
            if stops.stopped or token in ends:
                finish = "stop"
                break
        emitted[-1].source = "target"
        sequence.tokens += tokens[: len(emitted)]
        if guide is not None and (failure := guide.failure(len(sequence.tokens))):
            return self._finish(sequence, "error", f"the grammar cannot be followed: {failure}")
        if finish is None and sequence.remaining == 0:
            finish = "length"
        self.counters.generation_tokens += len(emitted)
        if proposed:
            self.counters.drafted(proposed, len(emitted))
            sequence.drafts += 1
            sequence.draft_tokens += proposed
            sequence.accepted_tokens += len(emitted) - 1
        output = RequestOutput(sequence.request.request_id, text, tuple(emitted))
        if token_logprobs is not None:
            output.logprobs = tuple(token_logprobs[: len(emitted)])
        if finish:
            return self._finish(sequence, finish, so_far=output)
        if sequence.request.running_stats:
            output.stats = sequence.stats()
        return output

    def _finish(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, so_far: RequestOutput | None = None
    ) -> RequestOutput:
        """End a sequence in any state and free its slot. so_far: the output of the step that ended it."""
        self.scheduler.remove(sequence)
        sequence.finish_reason = reason
        if reason in ("stop", "length"):
            self.load.finished(len(sequence.tokens))
        sequence.features, sequence.positions = [], None
        if sequence.slot is not None:
            if self.cache.free(sequence.slot) and reason != "error":
                contents = sequence.contents.followed_by(sequence.tokens)
                self.prefixes.hold(sequence.slot, contents, sequence.computed, drafted=sequence.speculates)
            else:
                self.prefixes.forget(sequence.slot)
            if self.drafter and sequence.speculates:
                self.drafter.free(sequence.slot)
            sequence.slot = None
        text, tokens, logprobs = (so_far.text, so_far.tokens, so_far.logprobs) if so_far else ("", (), None)
        if reason in ("stop", "length"):
            text += sequence.stops.decode(sequence.detokenizer.flush()) + sequence.stops.flush()
        output = RequestOutput(sequence.request.request_id, text, tokens, reason, sequence.stats(), error, logprobs)
        output.stop_reason = sequence.stops.found
        return output

    def _compact(self) -> None:
        """Move sequences from high slots into free low ones, so that a batch spans no more slots than needed.

        Only for torch, which computes idle slots too; skipped while requests wait for the free slots.
        """
        running = self.scheduler.running
        if self.scheduler.waiting:
            return
        for sequence in sorted(running, key=lambda s: -(s.slot or 0)):
            lowest = self.cache.lowest_free()
            if lowest is None or sequence.slot is None or sequence.slot < len(running) or lowest >= sequence.slot:
                break
            self._exchange(sequence.slot, lowest)
            sequence.slot = lowest

    def _exchange(self, one: int, other: int) -> None:
        """Exchange the contents of two slots in all caches."""
        self.cache.exchange(one, other)
        self.prefixes.exchange(one, other)
        if self.drafter:
            self.drafter.exchange(one, other)

    def check_integrity(self) -> None:
        """Assert that slots, lengths and sequences agree. For tests and debugging."""
        self.cache.check_integrity()
        by_slot = {s.slot: s.computed for s in self.scheduler.running if s.slot is not None}
        assert len(by_slot) + self.cache.num_free == self.cache.num_slots, "a slot leaked"
        assert all(self.cache.lengths[slot] == computed for slot, computed in by_slot.items()), "a slot's length is off"
        if self.drafter:
            knows = {s.slot for s in self.scheduler.running if s.speculates}
            self.drafter.check_integrity({slot: computed for slot, computed in by_slot.items() if slot in knows})
