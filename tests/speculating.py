"""One request of transformers' ``generate``, without drafts and with them."""

from __future__ import annotations

import torch

import beagle

PROMPT = torch.tensor([[3, 4, 5, 6, 3, 4]])
# no passes are timed: the tree's size is given
PLAN = beagle.TreePlan("dynamic", depth=4, top_k=4, nodes=8)


def plain(model, *arguments, **options):
    """``generate`` as transformers has it."""
    return type(model).generate(model, *arguments, **options)


def both(model, *arguments, seed=0, **options):
    """The answer without and with drafts, from the same seed."""
    answers = []
    for generate in (lambda *a, **o: plain(model, *a, **o), model.generate):
        torch.manual_seed(seed)
        answers.append(generate(*arguments, **options))
    return answers
