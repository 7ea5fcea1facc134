"""The mixture of MLPs: each position is its two preferred experts' work, and nobody else's."""

from __future__ import annotations

import torch

from beagle.drafters.checkpoint import load_head, save_head
from conftest import tiny_head, tiny_target


def test_a_position_takes_the_two_its_router_prefers():
    target = tiny_target()
    experts = tiny_head(target, scale=8.0, architecture="beagle-ablated", experts=4).experts
    x = torch.randn(3, 5, target.hidden_size, generator=torch.Generator().manual_seed(0))
    got = experts(x, lambda middle: middle)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        one = x[tuple(place)]
        likes = experts.router(one)
        first, second = likes.argsort(descending=True)[:2].tolist()
        shares = torch.softmax(torch.stack([likes[first], likes[second]]), 0)
        wanted = torch.zeros_like(one)
        for share, i in zip(shares, (first, second), strict=True):
            middle = experts.activation(experts.gate_proj[i](one)) * experts.up_proj[i](one)
            wanted = wanted + share * experts.down_proj[i](middle)
        torch.testing.assert_close(got[tuple(place)], wanted)
    assert len({tuple(row.topk(2).indices.tolist()) for row in experts.router(x).flatten(0, 1)}) > 1


def test_it_is_stored_with_its_head(tmp_path):
    target = tiny_target()
    head = tiny_head(target, architecture="beagle-ablated", experts=3)
    save_head(head, tmp_path, target="tiny", dtype=torch.float32, meta={})
    again = load_head(tmp_path, target)
    assert again.config == head.config
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_the_router_learns():
    target = tiny_target()
    experts = tiny_head(target, architecture="beagle-ablated", experts=4).experts.requires_grad_(True)
    x = torch.randn(7, target.hidden_size, generator=torch.Generator().manual_seed(0))
    experts(x, lambda middle: middle).square().sum().backward()
    assert experts.router.weight.grad.abs().sum() > 0
