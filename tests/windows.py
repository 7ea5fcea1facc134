"""A small head in double precision and a batch, to compare the stages with their literal form."""

from __future__ import annotations

import torch

from beagle.drafters.head import BeagleHead
from beagle.research.ablations import AblatedHead
from beagle.training.windows import Batch


def make_head(**overrides) -> BeagleHead:
    """A head of the product, or one of the ablations where the overrides ask for one."""
    torch.manual_seed(1)
    kind = AblatedHead if {"concat", "newest_through_matrix", "experts"} & overrides.keys() else BeagleHead
    config = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "intermediate_size": 24}
    head = kind(kind.config_class(**{**config, "target_vocab_size": 32, **overrides})).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def rope(head: BeagleHead, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return head.rotation(positions, torch.float64)


def make_batch(seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    embeddings, states = (torch.randn(2, 14, 16, generator=random, dtype=torch.float64) for _ in range(2))
    return Batch(embeddings, states, torch.tensor([0, 3]), torch.tensor([9, 12]))
