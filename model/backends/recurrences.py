"""Computes layers that carry a state from row to row, over a pass of many slots: prompt chunks, single rows and trees.

The state after a row depends on the state before the pass and on the row and its ancestors. So all rows of a tree are
computed at once, in closed form over their ancestors, and no path is computed twice:

    state after row r = decay(r) * state before + sum over r and its ancestors j of decay(j to r) * key_j delta_j^T

No state changes until `keep` says which rows stay. Then the state moves on by that sum, from the keys and deltas of the
pass; no row is computed again. Long prompt chunks go through the family's own function. Knows rows and slots; nothing
of models or requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model.backends.attention import AttentionMetadata, MaskKind
from model.transfer import upload

FEW = 64  # prompt chunks of more rows go through the family's own function, which computes in blocks of about as many
NORM_EPS = 1e-6  # of the delta rule's norm of queries and keys, in every family
Tensors = tuple[Tensor, ...]


@dataclass(eq=False)
class Rows:
    """The rows of a pass as recurrences see them; one object serves all layers."""

    first_slot: int
    batch: int
    num: int  # rows per slot
    causal: bool  # prompt chunks: rows follow each other
    ends: list[list[int]]  # of prompt chunks: after how many rows of each slot the state is wanted; the last is all
    parents: np.ndarray | None  # (batch, rows), -1 for a row without parent; None: each row's is the row before it
    visible: Tensor  # (batch or 1, 1, rows, rows) bool: each row's ancestors and itself
    _windows: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: AttentionMetadata, ends: list[list[int]], device: torch.device) -> Rows:
        """Describe the rows of a pass. ends: see the attribute."""
        assert rows.mask_kind is not MaskKind.FULL, "a state cannot depend on later rows"
        parents, before = rows.parents, np.arange(-1, rows.num - 1)
        if parents is not None and ((parents == before) | (before + 1 >= rows.counts[:, None])).all():
            parents = None
        visible = upload(np.tri(rows.num, dtype=bool)[None] if parents is None else rows.visible(), device)
        causal = rows.mask_kind is MaskKind.CAUSAL
        return cls(rows.first_slot, rows.batch, rows.num, causal, ends, parents, visible[:, None])

    @property
    def slots(self) -> slice:
        """Return the slots of the pass."""
        return slice(self.first_slot, self.first_slot + self.batch)

    def windows(self, width: int) -> Tensor:
        """Return where the last `width` inputs up to each row are: (batch, rows, width) int64, oldest first.

        Places count through the width - 1 inputs before the pass and then its rows.
        """
        if width not in self._windows:
            past, row = width - 1, np.arange(self.num)
            parents = row[None] - 1 if self.parents is None else self.parents
            before = np.concatenate((np.tile(np.arange(-1, past - 1), (len(parents), 1)), past + parents), 1)
            places = [np.tile(past + row, (len(parents), 1))]
            for _ in range(past):
                places.insert(0, np.take_along_axis(before, places[0], 1))
            windows = upload(np.stack(places, -1), self.visible.device)
            self._windows[width] = windows.expand(self.batch, -1, -1)
        return self._windows[width]


@dataclass(eq=False)
class Kept:
    """Which rows of a pass are kept: of its slot number `numbers[i]`, row `ends[i]` and its ancestors."""

    numbers: list[int]
    ends: list[int]
    at: slice | Tensor  # the same numbers
    last: Tensor  # the same ends

    @classmethod
    def of(cls, rows: Rows, numbers: list[int], ends: list[int]) -> Kept:
        """Prepare what is kept for all layers."""
        both = upload(np.array((numbers, ends)), rows.visible.device)
        return cls(numbers, ends, slice(None) if len(numbers) == rows.batch else both[0], both[1])


class State(ABC):
    """What one layer computes its state with.

    It is called in place of a function of transformers, with its arguments. While `rows` is None it computes what the
    function does. Else it computes these rows from `states`, and `keep` moves those on; without it nothing has changed.
    """

    like: Tensor  # the empty state of one slot, known after the first call

    def __init__(self, function: Callable[..., Any]) -> None:
        """Prepare to be called. function: the one that is replaced."""
        self.function = function
        self.rows: Rows | None = None
        self.states: Tensor | None = None  # (slots, ...), of the cache whose pass it is
        self.calls = 0  # in this pass

    def before(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the states of the slots of the pass, as a view. shape, dtype: of one slot's state, for the first
        call."""
        assert self.rows is not None
        self.calls += 1
        if self.states is None:
            self.like = like.new_zeros(shape, dtype=dtype)
            self.states = self.like[None]
        return self.states[self.rows.slots]

    @abstractmethod
    def keep(self, rows: Rows, kept: Kept) -> None:
        """Move the states on by the rows of the pass that are kept."""

    @abstractmethod
    def after(self, rows: Rows, number: int, count: int) -> Tensor:
        """Compute a copy of the state (1, ...) after the first `count` rows of a prompt chunk; count: one of
        Rows.ends."""

    @abstractmethod
    def drop(self) -> None:
        """Release what the pass left for `keep` and `after`."""


class Convolution(State):
    """A causal convolution of each channel. Its state is its last inputs: (channels, width - 1)."""

    _inputs: Tensor | None = None

    def __call__(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **options: Any
    ) -> Tensor:
        """Convolve inputs (batch, channels, rows) with weight (channels, width) over each row and its ancestors."""
        if self.rows is None:
            return self.function(inputs, weight, bias, activation=activation, **options)
        self._past = past = weight.shape[-1] - 1
        before = self.before((len(weight), past), inputs, inputs.dtype)
        self._inputs = every = torch.cat((before, inputs), -1)
        if self.rows.parents is None:
            out: Tensor = self.function(every, weight, bias, activation=activation)
            return out[..., past:]
        places = self.rows.windows(past + 1).flatten(1)[:, None].expand(-1, every.shape[1], -1)
        out = self.function(every.gather(2, places), weight, bias, activation=activation)
        return out[..., past :: past + 1]

    def keep(self, rows: Rows, kept: Kept) -> None:
        assert self._inputs is not None
        assert self.states is not None
        inputs, windows = self._inputs[kept.at], rows.windows(self._past + 1)[kept.at]
        places = windows[torch.arange(len(windows), device=windows.device), kept.last, 1:]
        self.states[rows.slots][kept.at] = inputs.gather(2, places[:, None].expand(-1, inputs.shape[1], -1))

    def after(self, rows: Rows, number: int, count: int) -> Tensor:  # noqa: ARG002
        assert self._inputs is not None
        return self._inputs[number : number + 1, :, count : count + self._past].clone()

    def drop(self) -> None:
        self._inputs = None


@dataclass(frozen=True, eq=False)
class Change:
    """What the rows of a pass add to the states.

    decays: (batch, heads, rows), logarithm of the decay from the state before the pass to each row; keys: (batch,
    heads, rows, key width); deltas: (batch, heads, rows, value width); visible: see Rows.
    """

    decays: Tensor
    keys: Tensor
    deltas: Tensor
    visible: Tensor

    def apply(self, states: Tensor, at: slice | Tensor, last: Tensor) -> Tensor:
        """Move states (slots, heads, key width, value width) on, in place. at, last: see Kept."""
        numbers = torch.arange(len(states), device=states.device)
        decays = self.decays[at]
        total = decays[numbers, :, last, None]  # (slots, heads, 1)
        path = self.visible.expand(len(self.decays), -1, -1, -1)[at][numbers, :, last]  # (slots, 1, rows)
        shares = (total - decays).masked_fill_(~path, float("-inf")).exp_()
        keys = self.keys[at] * shares[..., None]
        states.mul_(total[..., None].exp())
        states.flatten(0, 1).baddbmm_(keys.flatten(0, 1).mT, self.deltas[at].flatten(0, 1))
        return states


def decays_among(decays: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the logarithms of the rows' own decays (batch, heads, rows) along their ancestors.

    Returns the logarithm of the decay from the state before the pass to each row, and the decay to each row from each
    of its ancestors and itself: (batch, heads, rows, rows), 0 elsewhere.
    """
    total = (visible.to(decays.dtype) @ decays[..., None])[..., 0]
    among = total[..., :, None] - total[..., None, :]
    return total, among.masked_fill_(~visible, float("-inf")).exp_()


class Recurrence(State):
    """A linear recurrence with decay. Its state is a matrix (key width, value width) per head, in float32."""

    _change: Change | None = None
    _ends: list[dict[int, Tensor]] | None = None  # of long prompt chunks: the states of each slot by row count

    def compute(self, before: Tensor, inputs: Tensors, out: Tensor) -> Tensor:
        """Compute all rows from the states before the pass. inputs: (batch, rows, ...) each; out: noughts in the shape
        and dtype of the result."""
        rows = self.rows
        assert rows is not None
        if not rows.causal or rows.num <= FEW:
            out, self._change = self.closed(before, inputs, rows.visible)
            return out
        self._ends = []
        for number, ends in enumerate(rows.ends):
            state, start, states = before[number : number + 1], 0, {}
            for end in ends:
                part = tuple(tensor[number : number + 1, start:end] for tensor in inputs)
                if (count := end - start) > FEW:
                    out[number, start:end], state = self.family(state, part)
                else:
                    out[number, start:end], change = self.closed(state, part, rows.visible[:1, :, :count, :count])
                    state = change.apply(state.clone(), slice(None), torch.tensor([count - 1], device=out.device))
                states[end], start = state, end
            self._ends.append(states)
        return out

    @abstractmethod
    def closed(self, before: Tensor, inputs: Tensors, visible: Tensor) -> tuple[Tensor, Change]:
        """Compute rows in closed form: their outputs, and what they add to the states."""

    @abstractmethod
    def family(self, before: Tensor, inputs: Tensors) -> tuple[Tensor, Tensor]:
        """Compute rows that follow each other by the family's own function: their outputs, and the states after
        them."""

    def keep(self, rows: Rows, kept: Kept) -> None:
        assert self.states is not None
        states = self.states[rows.slots]
        if self._ends is not None:
            for number, end in zip(kept.numbers, kept.ends, strict=True):
                states[number] = self._ends[number][end + 1][0]
            return
        assert self._change is not None
        moved = self._change.apply(states[kept.at], kept.at, kept.last)
        if not isinstance(kept.at, slice):
            states[kept.at] = moved

    def after(self, rows: Rows, number: int, count: int) -> Tensor:
        if self._ends is not None:
            return self._ends[number][count]
        assert self._change is not None
        assert self.states is not None
        which, last = torch.tensor([[number], [count - 1]], device=self.states.device)
        return self._change.apply(self.states[rows.slots][which], which, last)

    def drop(self) -> None:
        self._change = self._ends = None


class DeltaRule(Recurrence):
    """The gated delta rule (Qwen3.5, Qwen3-Next): a row corrects what the state says about its key."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute outputs like value (batch, rows, heads, value width); no final states.

        query, key: (batch, rows, key heads, key width); g: (batch, rows, heads), logarithm of each row's decay; beta:
        the same shape, share of the difference that is corrected.
        """
        self._normed = use_qk_l2norm_in_kernel
        if self.rows is None:
            options |= {"g": g, "beta": beta, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
            return self.function(query, key, value, **options)
        heads, value_width = value.shape[2:]
        before = self.before((heads, key.shape[-1], value_width), value, torch.float32)
        return self.compute(before, (query, key, value, g, beta), torch.zeros_like(value)), None

    def closed(self, before: Tensor, inputs: Tensors, visible: Tensor) -> tuple[Tensor, Change]:
        query, key, value, decay, beta = (tensor.transpose(1, 2).float() for tensor in inputs)
        heads, count = value.shape[1:3]
        both = torch.stack((query, key), 2)  # (batch, key heads, 2, rows, key width)
        if self._normed:
            both = both * torch.rsqrt(both.square().sum(-1, keepdim=True) + NORM_EPS)
        both = both.repeat_interleave(heads // both.shape[1], 1)
        key = both[:, :, 1]
        total, among = decays_among(decay, visible)
        from_state = both.flatten(2, 3) @ before * total.exp().repeat(1, 1, 2)[..., None]
        from_queries, from_keys = from_state.split(count, 2)
        deltas = (value - from_keys) * beta[..., None]
        similar = (both.flatten(2, 3) @ key.mT).unflatten(2, (2, count)) * among[:, :, None]
        if count > 1:  # a row's correction depends on those of its ancestors
            system = similar[:, :, 1] * beta[..., None]
            deltas = torch.linalg.solve_triangular(system, deltas, upper=False, unitriangular=True)
        out = (from_queries + similar[:, :, 0] @ deltas) * key.shape[-1] ** -0.5
        return out.transpose(1, 2).to(inputs[2].dtype), Change(total, key, deltas, visible)

    def family(self, before: Tensor, inputs: Tensors) -> tuple[Tensor, Tensor]:
        query, key, value, decay, beta = inputs
        out, after = self.function(
            query,
            key,
            value,
            g=decay,
            beta=beta,
            initial_state=before,
            output_final_state=True,
            use_qk_l2norm_in_kernel=self._normed,
        )
        return out, after


class SelectiveScan(Recurrence):
    """Mamba2's scan (Nemotron-H): the state is a matrix (state size, head width) per head."""

    def __call__(self, inputs: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:  # noqa: N803
        """Compute outputs like inputs (batch, rows, heads, head width), in float32.

        dt: (batch, rows, heads); A: (heads,); B, C: (batch, rows, groups, state size).
        """
        if self.rows is None:
            return self.function(inputs, dt, A, B, C, **options)
        if options.get("z") is not None:
            raise NotImplementedError("a scan with its own gate")
        self._a, self._options = A, options
        before = self.before((*inputs.shape[2:3], B.shape[-1], inputs.shape[-1]), inputs, torch.float32)
        return self.compute(before, (inputs, dt, B, C), torch.zeros_like(inputs, dtype=torch.float32))

    def closed(self, before: Tensor, inputs: Tensors, visible: Tensor) -> tuple[Tensor, Change]:
        options, dt = self._options, inputs[1]
        if (bias := options.get("dt_bias")) is not None:
            dt = dt + bias.to(dt.dtype)
        if options.get("dt_softplus"):
            dt = F.softplus(dt)
        dt = dt.clamp(*options.get("dt_limit", (0.0, None))).transpose(1, 2).float()  # (batch, heads, rows)
        x, keys, queries = (inputs[i].transpose(1, 2).float() for i in (0, 2, 3))
        heads = x.shape[1]
        keys, queries = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (keys, queries))
        total, among = decays_among(dt * self._a.float()[:, None], visible)
        deltas = x * dt[..., None]
        out = queries @ before * total.exp()[..., None] + (queries @ keys.mT * among) @ deltas
        if (skip := options.get("D")) is not None:
            out = out + x * skip[:, None, None]
        return out.transpose(1, 2), Change(total, keys, deltas, visible)

    def family(self, before: Tensor, inputs: Tensors) -> tuple[Tensor, Tensor]:
        x, dt, keys, queries = inputs
        options = self._options | {"initial_states": before.mT, "return_final_states": True}
        out, after = self.function(x, dt, self._a, keys, queries, **options)
        return out, after.mT.contiguous()
