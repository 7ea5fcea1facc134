"""Stored samples as padded batches, in an order that depends on the seed and epoch alone."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from beagle.errors import BeagleError
from beagle.targets.target import Target
from beagle.training.answers import Sample
from beagle.training.states import StateStore, key_of, read_shard, shard_ids
from beagle.training.windows import ROUND, Batch, round_up

SHARDS_TOGETHER = 8  # samples are shuffled across this many shards at a time


def is_validation(sample_id: str) -> bool:
    """A fixed 1 in 40 of the prompts, all turns of each, in every store that holds them."""
    return zlib.crc32(key_of(sample_id).encode()) % 40 == 0


def samples(shards: list[Path], *, validation: bool, with_states: bool = True) -> list[Sample]:
    """Samples of some shards that are long enough to bear a loss; ``with_states`` as of ``read_shard``.

    Their tensors are views into their shard, and an id is the shard's name and the sample's number there.
    """
    out: list[Sample] = []
    for path in shards:
        content = read_shard(path, with_states=with_states)
        offsets = content["offsets"].tolist()
        for i, (name, first) in enumerate(zip(shard_ids(path), content["answer_from"].tolist(), strict=True)):
            a, b = offsets[i], offsets[i + 1]
            if b - a - 2 >= first and is_validation(name) == validation:
                tokens = content["tokens"][a:b].long()
                states = content["states"][a:b] if "states" in content else None
                out.append(Sample(f"{path.name}/{i}", tokens, states, first))
    return out


def nothing_to_train_on(store: StateStore) -> str:
    """Why a store without training samples has none, and what helps."""
    held = len(samples(store.shards(), validation=True, with_states=False))
    if held:
        return f"holds {held} answers, all of them held out for validation; give more prompts"
    return "holds no answer of two tokens or more; give other prompts"


def batches(
    store: StateStore, *, tokens: int, seed: int, epoch: int, with_states: bool = True
) -> Iterator[list[Sample]]:
    """One epoch of training batches of about ``tokens`` tokens each, padding kept small.

    Args:
        seed: of the order.
        epoch: its number, from 0.
        with_states: False is for those who count batches; states that are stored are not read then.
    """
    shuffle = random.Random(f"{seed}/{epoch}")
    shards = store.shards()
    shuffle.shuffle(shards)
    for at in range(0, len(shards), SHARDS_TOGETHER):
        pool = samples(shards[at : at + SHARDS_TOGETHER], validation=False, with_states=with_states)
        shuffle.shuffle(pool)
        pool.sort(key=lambda s: len(s.tokens) // 24)  # stable: shuffled inside a length class
        group: list[Sample] = []
        groups: list[list[Sample]] = []
        for sample in pool:
            if group and (len(group) + 1) * max(len(s.tokens) for s in (sample, *group)) > tokens:
                groups.append(group)
                group = []
            group.append(sample)
        groups.append(group)
        shuffle.shuffle(groups)
        yield from (g for g in groups if g)


def padded_tokens(group: Sequence[Sample], target: Target) -> int:
    """Tokens that each sample of a batch is padded to."""
    return min(round_up(max(len(s.tokens) for s in group), ROUND), target.context_limit)


def padded(group: Sequence[Sample], n: int, device: torch.device) -> Tensor:
    """Tokens of samples, with zeros behind them, ``[samples, n]``."""
    tokens = torch.zeros(len(group), n, dtype=torch.long)
    for row, sample in zip(tokens, group, strict=True):
        row[: len(sample.tokens)] = sample.tokens
    return tokens.to(device)


def collate(group: Sequence[Sample], target: Target, columns: Tensor | None = None, n: int | None = None) -> Batch:
    """Pad a group and look its embeddings up, in fp32; run the target where no states are stored.

    Args:
        columns: what the head reads of a state, as of ``Target.columns``.
        n: tokens that each sample is padded to; None: see ``padded_tokens``.
    """
    n = n or padded_tokens(group, target)
    tokens = padded(group, n, target.device)
    stored = [s.states for s in group if s.states is not None]
    if len(stored) < len(group):
        states = target.prefill(tokens, target.new_cache(len(group), n)).float()
        lengths = torch.tensor([len(s.tokens) for s in group], device=target.device)
        padding = torch.arange(n, device=target.device) >= lengths[:, None]
        if not (states.isfinite().all(-1) | padding).all():  # one question: a GPU waits for each
            raise BeagleError(f"the hidden states of {target.name} are NaN or infinite; load it with dtype float32")
    else:
        states = torch.zeros(len(group), n, target.state_size)
        for i, own in enumerate(stored):
            states[i, : len(own)] = own
    first = torch.tensor([s.answer_from for s in group], device=target.device)
    last = torch.tensor([len(s.tokens) - 2 for s in group], device=target.device)
    with torch.no_grad():
        embeddings = target.embed(tokens).float()
    states = states.to(target.device)
    return Batch(embeddings, states if columns is None else states[..., columns], first, last)


def frequent_tokens(store: StateStore, size: int, vocab_size: int, always: Iterable[int] = ()) -> Tensor:
    """The ``size`` most frequent tokens of the answers, ascending ids ``[size]`` (paper: whole vocabulary).

    Args:
        always: tokens that are among them in any case: those that end an answer, which stored answers lack.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sample in samples(store.shards(), validation=False, with_states=False):
        counts += torch.bincount(sample.tokens[sample.answer_from + 1 :], minlength=vocab_size)
    if not counts.any():
        raise BeagleError(f"'{store.folder}' {nothing_to_train_on(store)}")
    counts[[token for token in always if token < vocab_size]] = counts.max() + 1
    return counts.topk(min(size, vocab_size)).indices.sort().values
