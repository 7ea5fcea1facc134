"""Growing a tree of candidates level by level: chain, static and dynamic (paper §3, EAGLE-2)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from beagle.drafters.base import STATIC_PATHS, Draft, TreePlan
from beagle.drafters.block import Block
from beagle.targets.packing import pack_linears, packed
from beagle.targets.quantize import RowQuantizer, quantize_linears, quantized
from beagle.targets.target import Target


class TreeDrafter(ABC):
    """Implements ``Drafter`` for heads of one block over cached keys; key i is that of slot i.

    Between drafts the cache holds keys of true states only (paper §4.1). While drafting, each node of
    the beam may append a key of its own behind them, which it and its descendants see; the next
    ``extend`` writes over those.

    A subclass says how a context is remembered and how one level is computed.
    """

    head: Block

    def __init__(self, target: Target, head: Block) -> None:
        rows = head.config.draft_vocab_size or target.vocab_size
        weights = sum(parameter.numel() for parameter in head.parameters())
        self.name = f"{head.architecture}, {weights} weights, {rows} tokens"  # what a draft's cost depends on
        if target.quantize:  # in int8 always: a draft is made of small passes, where it is the fastest
            quantize_linears(head, "int8")
        pack_linears(head)
        self.head = head
        self.embed = target.embed
        self.device = target.device
        trimmed = head.config.draft_vocab_size is not None
        self.lm_head, bias = target.head_rows(head.draft_vocab if trimmed else None)
        whole = quantized(self.lm_head, bias, "int8", RowQuantizer()) if target.quantize else None
        self.logits = whole or packed(self.lm_head, bias)
        self.length = 0  # tokens of the context
        self.keys = 0  # of true states, in the cache
        self.newest = torch.zeros(0, head.config.hidden_size, dtype=self.lm_head.dtype, device=self.device)
        self._cache = torch.zeros(0)
        self._reserve(512)

    @abstractmethod
    def _remember(self, tokens: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[kv_heads, m, head_dim]`` of the slots from ``self.keys`` on that can be
        written now that the target has run ``tokens`` too (``states [n, hidden]``, ``self.newest``
        is the state before them)."""

    @abstractmethod
    def _level(self, level: int, tokens: Tensor, newest: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One level of the tree, the root's being 1.

        Args:
            tokens: ``[beam]``, the nodes. newest: ``[beam, hidden]``, the state before each of them.
            mask: additive ``[beam, appended]``, which of the appended keys each node sees (no columns: there are none).
        Returns:
            Predicted states ``[beam, hidden]``, and the mask with what this level appended.
        """

    def fork(self) -> TreeDrafter:
        return copy.copy(self)

    def begin(self, tokens: list[int], states: Tensor) -> None:
        self.length = self.keys = 0
        self._reserve(max(512, 2 * len(tokens)))  # fresh: forks must not share it
        self.newest = states[:0]
        self.extend(tokens, states)

    @torch.no_grad()
    def extend(self, tokens: list[int], states: Tensor) -> None:
        end = self.length + len(tokens)
        if end > self._cache.shape[2]:
            self._reserve(2 * end)
        k, v = self._remember(tokens, states)
        self._write(k, v, self.keys)
        self.keys += k.shape[1]
        self.length = end
        self.newest = states[-1:]

    @torch.no_grad()
    def draft(self, root: int, plan: TreePlan, min_gain: float = 0.0) -> Draft:
        width = 1 if plan.kind == "chain" else plan.top_k
        room = self.length + 1 + plan.depth * max(width, len(STATIC_PATHS))
        if room > self._cache.shape[2]:
            self._reserve(2 * room)
        # candidates of all levels, flat: tokens, cumulative log-probabilities, parents
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        parents: list[Tensor] = []
        paths: list[tuple[int, ...]] = []  # rank paths, static trees only
        beam_tokens = torch.tensor([root], device=self.device)
        beam_scores = torch.zeros(1, device=self.device)
        beam_ids = torch.tensor([-1], device=self.device)  # candidate index of each beam node
        newest = self.newest
        mask = torch.zeros(1, 0, dtype=newest.dtype, device=self.device)
        total = 0
        for level in range(1, plan.depth + 1):
            states, mask = self._level(level, beam_tokens, newest, mask)
            logits = self.logits(states).float()
            best, index = logits.topk(min(width, logits.shape[-1]), dim=-1)  # [beam, width]
            # rounding may put the log of a chance near 1 above 0, and a child before its parent
            chances = (best - logits.logsumexp(-1, keepdim=True)).clamp(max=0.0)
            level_scores = (beam_scores[:, None] + chances).flatten()
            level_tokens = self.head.draft_vocab[index].flatten()
            level_parents = beam_ids.repeat_interleave(best.shape[1])
            keep: Tensor | None = None
            if plan.kind == "static":
                above = [() if i < 0 else paths[i] for i in level_parents.tolist()]
                ranked = [(*path, i % best.shape[1]) for i, path in enumerate(above)]
                keep = torch.tensor([i for i, path in enumerate(ranked) if path in STATIC_PATHS], device=self.device)
                if not len(keep):
                    break
                paths += [ranked[i] for i in keep.tolist()]
                level_scores, level_tokens, level_parents = (
                    x[keep] for x in (level_scores, level_tokens, level_parents)
                )
            tokens.append(level_tokens)
            scores.append(level_scores)
            parents.append(level_parents)
            if level == plan.depth:
                break
            if keep is None:
                beam_scores, chosen = level_scores.topk(min(width, len(level_scores)))
                row = chosen // best.shape[1]  # each beam node's parent in the level above
                beam_tokens = level_tokens[chosen]
            else:
                beam_scores, chosen = level_scores, torch.arange(len(level_scores), device=self.device)
                row = keep // best.shape[1]
                beam_tokens = level_tokens
            if min_gain > 0 and float(beam_scores.exp().sum()) < min_gain:
                break
            newest = states[row]
            mask = mask[row] if mask.shape[1] else mask
            beam_ids = total + chosen
            total += len(level_tokens)
        return self._rank(torch.cat(tokens), torch.cat(parents), torch.cat(scores), plan)

    def _slot(self, level: int) -> tuple[Tensor, Tensor]:
        """RoPE of the one slot at which all nodes of a level stand."""
        return self._rotation(self.length - 2 + level, self.length - 1 + level)

    def _append(self, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Write a key and value of each node of the beam, ``[kv_heads, beam, head_dim]``, that only
        it sees among the beam; returns the mask grown by them."""
        self._write(k, v, self.keys + mask.shape[1])
        beam = k.shape[1]
        own = torch.full((beam, beam), torch.finfo(mask.dtype).min, dtype=mask.dtype, device=self.device)
        own.fill_diagonal_(0.0)
        return torch.cat([mask, own], dim=1) if mask.shape[1] else own

    def _attend(self, q: Tensor, mask: Tensor) -> Tensor:
        """Attention of ``q [heads, beam, head_dim]`` over the context and what ``mask`` shows of the rest."""
        end = self.keys + mask.shape[1]
        whole = None
        if mask.shape[1]:
            whole = torch.cat([mask.new_zeros(len(mask), self.keys), mask], dim=1)[None, None]
        return self.head.attend(q[None], self._cache[0, None, :, :end], self._cache[1, None, :, :end], whole)[0]

    def _write(self, k: Tensor, v: Tensor, at: int) -> None:
        self._cache[0, :, at : at + k.shape[1]] = k
        self._cache[1, :, at : at + k.shape[1]] = v

    def _rotation(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self._cos[:, start:end], self._sin[:, start:end]

    def _reserve(self, capacity: int) -> None:
        c = self.head.config
        dtype = self.lm_head.dtype
        fresh = torch.zeros(2, c.num_kv_heads, capacity, c.head_dim, dtype=dtype, device=self.device)
        if self.keys:
            fresh[:, :, : self.keys] = self._cache[:, :, : self.keys]
        self._cache = fresh
        self._cos, self._sin = self.head.rotation(torch.arange(capacity, device=self.device), dtype)

    @staticmethod
    def _rank(tokens: Tensor, parents: Tensor, scores: Tensor, plan: TreePlan) -> Draft:
        """Best first; a stable sort keeps parents before children of equal score."""
        if plan.kind == "static":
            order = torch.arange(len(scores))
        else:
            most = min(plan.nodes or 64, len(scores))
            order = torch.sort(scores, descending=True, stable=True).indices[:most].cpu()
        place = {int(old): new for new, old in enumerate(order.tolist())}
        old_parents = parents.tolist()
        return Draft(
            tokens=tokens[order].tolist(),
            parents=[place[old_parents[i]] if old_parents[i] >= 0 else -1 for i in order.tolist()],
            scores=scores[order].tolist(),
        )
