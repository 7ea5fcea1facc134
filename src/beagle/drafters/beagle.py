"""Drafting with the Beagle head: cached keys of true states, lazily added keys of predicted ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle.drafters.base import STATIC_PATHS, Draft, TreePlan
from beagle.drafters.head import BeagleHead
from beagle.targets.target import Target
from beagle.training.windows import additive


class BeagleDrafter:
    """Implements ``Drafter``. The key cache holds true states only, between drafts (paper §4.1)."""

    def __init__(self, target: Target, head: BeagleHead) -> None:
        self.head = head
        self.embed = target.embed
        self.device = target.device
        trimmed = head.config.draft_vocab_size is not None
        self.lm_head, self.bias = target.head_rows(head.draft_vocab if trimmed else None)
        self.length = 0
        self._cache = torch.zeros(0)
        self._reserve(512)

    def _reserve(self, capacity: int) -> None:
        c = self.head.config
        fresh = torch.zeros(2, c.num_kv_heads, capacity, c.head_dim, dtype=self.lm_head.dtype, device=self.device)
        if self.length:
            fresh[:, :, : self.length] = self._cache[:, :, : self.length]
        self._cache = fresh

    def begin(self, tokens: list[int], states: Tensor) -> None:
        self.length = 0
        self.extend(tokens, states)

    @torch.no_grad()
    def extend(self, tokens: list[int], states: Tensor) -> None:
        end = self.length + len(tokens)
        if end > self._cache.shape[2]:
            self._reserve(2 * end)
        self._write(states, torch.arange(self.length, end, device=self.device), self.length)
        self.length = end
        self.newest = states[-1:]

    def _write(self, states: Tensor, positions: Tensor, at: int) -> None:
        k, v = self.head.keys_values(states, positions)
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
        seen = torch.zeros(1, 0, dtype=torch.bool, device=self.device)  # beam x expanded nodes
        total = 0
        for level in range(1, plan.depth + 1):
            states = self._expand(beam_tokens, newest, seen, n - 2 + level)
            log_q = F.log_softmax(F.linear(states, self.lm_head, self.bias).float(), dim=-1)
            best, index = log_q.topk(min(width, log_q.shape[-1]), dim=-1)  # [beam, width]
            level_scores = (beam_scores[:, None] + best).flatten()
            level_tokens = self.head.draft_vocab[index].flatten()
            level_parents = beam_ids.repeat_interleave(best.shape[1])
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
                row = keep // best.shape[1]
            else:
                row = torch.arange(len(level_scores), device=self.device) // best.shape[1]
            tokens.append(level_tokens)
            scores.append(level_scores)
            parents.append(level_parents)
            if level == plan.depth:
                break
            if plan.kind == "dynamic":
                beam_scores, chosen = level_scores.topk(min(width, len(level_scores)))
            else:
                beam_scores, chosen = level_scores, torch.arange(len(level_scores), device=self.device)
            if min_gain > 0 and float(beam_scores.exp().sum()) < min_gain:
                break
            # the next level's keys: what this level's beam predicted, seen by its descendants only
            if self.head.config.concat:
                expanded = seen.shape[1]
                self._write(states, torch.full((len(states),), n - 1 + level, device=self.device), n + expanded)
                own = F.one_hot(row[chosen], len(states)).bool()
                seen = torch.cat([seen[row[chosen]], own], dim=1)
            else:
                seen = seen[row[chosen]]
            newest = states[row[chosen]]
            beam_tokens = level_tokens[chosen]
            beam_ids = total + chosen
            total += len(level_tokens)
        return self._rank(torch.cat(tokens), torch.cat(parents), torch.cat(scores), plan)

    def _expand(self, tokens: Tensor, newest: Tensor, seen: Tensor, slot: int) -> Tensor:
        """Predicted states ``[beam, hidden]`` of one level; all its queries stand at one slot."""
        embeddings = self.embed(tokens)
        q = self.head.queries(embeddings, torch.full((len(tokens),), slot, device=self.device))
        end = self.length + seen.shape[1]
        mask = None
        if seen.shape[1]:
            context = torch.ones(len(tokens), self.length, dtype=torch.bool, device=self.device)
            mask = additive(torch.cat([context, seen], dim=1), q.dtype)[None, None]
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
