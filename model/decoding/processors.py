"""Applies a request's logits processors before a token is chosen: bias, penalties, a minimum length.

A row of a draft tree is processed as it would be without a draft: the tokens counted are the answer so far and the
tokens on the row's own path. Knows tokens and logits only.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from model.request import SamplingParams
from model.transfer import upload


def process(
    logits: Tensor,
    params: SamplingParams,
    *,
    prompt: Seq[int],
    answer: Seq[int],
    paths: Seq[Seq[int]],
    ends: Collection[int],
    allowed: Tensor | None = None,
) -> Tensor:
    """Apply all processors of `params`: (rows, vocab) any float -> a new (rows, vocab) float64.

    paths[r]: the draft tokens between the answer so far and row r; ends: end-of-sequence tokens; allowed: (rows,
    vocab) bool, the tokens that a grammar allows, None for all. The order is: tokens that are not allowed get -inf;
    logit_bias is added; the logits of tokens in prompt or answer are divided (positive) or multiplied (negative) by
    repetition_penalty (Keskar et al., arXiv 1909.05858, as transformers has it); frequency_penalty, times the count of
    a token in the answer, and presence_penalty, once, are subtracted, as OpenAI has them; before min_tokens,
    tokens that end the answer get -inf, where the grammar allows any other.
    """
    logits = logits.to(torch.float64, copy=True)
    if allowed is not None:
        logits.masked_fill_(~allowed, -torch.inf)
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        logits[:, upload(np.array(ids), logits.device)] += upload(np.array(bias, np.float64), logits.device)
    if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
        _penalise(logits, params, prompt, answer, paths)
    if ends := params.ends(frozenset(ends)):
        early = [row for row, path in enumerate(paths) if len(answer) + len(path) < params.min_tokens]
        if early:
            rows, columns = (upload(np.array(each), logits.device) for each in (early, list(ends)))
            longer = logits[rows].index_fill(1, columns, -torch.inf)
            goes_on = longer.isfinite().any(-1, keepdim=True)
            logits[rows] = torch.where(goes_on, longer, logits[rows])
    return logits


def _penalise(logits: Tensor, params: SamplingParams, prompt: Seq[int], answer: Seq[int], paths: Seq[Seq[int]]) -> None:
    """Apply the three penalties in place, to the logits of tokens that occurred."""
    read = prompt if params.repetition_penalty != 1.0 else ()
    ids = np.unique(np.fromiter((*read, *answer, *(token for path in paths for token in path)), np.int64))
    if not len(ids):
        return
    place = {token: at for at, token in enumerate(ids.tolist())}
    counts = np.zeros((len(paths), len(ids)))
    for token in answer:
        counts[:, place[token]] += 1
    for row, path in enumerate(paths):
        for token in path:
            counts[row, place[token]] += 1
    seen = counts > 0
    seen[:, [place[token] for token in read]] = True
    where = upload(ids, logits.device)
    repeats, penalised = upload(counts, logits.device), upload(seen, logits.device)
    values = logits[:, where]
    factor = params.repetition_penalty
    values = torch.where(penalised, torch.where(values > 0, values / factor, values * factor), values)
    logits[:, where] = values - params.frequency_penalty * repeats - params.presence_penalty * (repeats > 0).double()
