"""Drafting with the Beagle head: cached keys of true states, lazily added keys of predicted ones."""

from __future__ import annotations

import torch
from torch import Tensor

from beagle.drafters.base import STATIC_PATHS, Draft, TreePlan
from beagle.drafters.head import BeagleHead
from beagle.targets.packing import pack_linears, packed
from beagle.targets.target import Target


class BeagleDrafter:
    """Implements ``Drafter``. The key cache holds true states only, between drafts (paper §4.1)."""

    def __init__(self, target: Target, head: BeagleHead) -> None:
        pack_linears(head)
        self.head = head
        self.embed = target.embed
        self.device = target.device
        trimmed = head.config.draft_vocab_size is not None
        self.lm_head, bias = target.head_rows(head.draft_vocab if trimmed else None)
        self.logits = packed(self.lm_head, bias)
        self.length = 0
        self._cache = torch.zeros(0)
        self._reserve(512)

    def _reserve(self, capacity: int) -> None:
        c = self.head.config
        dtype = self.lm_head.dtype
        fresh = torch.zeros(2, c.num_kv_heads, capacity, c.head_dim, dtype=dtype, device=self.device)
        if self.length:
            fresh[:, :, : self.length] = self._cache[:, :, : self.length]
        self._cache = fresh
        self._cos, self._sin = self.head.rotation(torch.arange(capacity, device=self.device), dtype)

    def _rotation(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self._cos[:, start:end], self._sin[:, start:end]

    def begin(self, tokens: list[int], states: Tensor) -> None:
        self.length = 0
        self._reserve(max(512, 2 * len(tokens)))  # fresh: copies of a drafter must not share it
        self.extend(tokens, states)

    @torch.no_grad()
    def extend(self, tokens: list[int], states: Tensor) -> None:
        end = self.length + len(tokens)
        if end > self._cache.shape[2]:
            self._reserve(2 * end)
        self._write(states, self._rotation(self.length, end), self.length)
        self.length = end
        self.newest = states[-1:]

    def _write(self, states: Tensor, rotation: tuple[Tensor, Tensor], at: int) -> None:
        k, v = self.head.keys_values(states, rotation)
        self._cache[0, :, at : at + len(states)] = k
        self._cache[1, :, at : at + len(states)] = v

    @torch.no_grad()
    def draft(self, root: int, plan: TreePlan, min_gain: float = 0.0) -> Draft:
        width = 1 if plan.kind == "chain" else plan.top_k
        n = self.length
        room = n + 1 + plan.depth * max(width, len(STATIC_PATHS))
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
        hidden = torch.zeros(1, 0, dtype=newest.dtype, device=self.device)  # additive mask: beam x expanded nodes
        total = 0
        for level in range(1, plan.depth + 1):
            states = self._expand(beam_tokens, newest, hidden, n - 2 + level)
            logits = self.logits(states).float()
            best, index = logits.topk(min(width, logits.shape[-1]), dim=-1)  # [beam, width]
            level_scores = (best + (beam_scores[:, None] - logits.logsumexp(-1, keepdim=True))).flatten()
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
            if self.head.config.concat:
                # the next level's keys: what this level predicted, seen by its descendants only
                self._write(states, self._rotation(n - 1 + level, n + level), n + hidden.shape[1])
                own = torch.full((len(states), len(states)), torch.finfo(hidden.dtype).min, device=self.device)
                hidden = torch.cat([hidden, own.fill_diagonal_(0.0).to(hidden.dtype)], dim=1)[row]
            newest = states[row]
            beam_ids = total + chosen
            total += len(level_tokens)
        return self._rank(torch.cat(tokens), torch.cat(parents), torch.cat(scores), plan)

    def _expand(self, tokens: Tensor, newest: Tensor, hidden: Tensor, slot: int) -> Tensor:
        """Predicted states ``[beam, hidden]`` of one level; all its queries stand at one slot."""
        embeddings = self.embed(tokens)
        q = self.head.queries(embeddings, self._rotation(slot, slot + 1))
        end = self.length + hidden.shape[1]
        mask = None
        if hidden.shape[1]:
            mask = torch.cat([hidden.new_zeros(len(tokens), self.length), hidden], dim=1)[None, None]
        attended = self.head.attend(q[None], self._cache[0, None, :, :end], self._cache[1, None, :, :end], mask)[0]
        return self.head.finish(attended, embeddings, newest)

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
