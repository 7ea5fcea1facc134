"""Joined layers compute what they did, in fewer products."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from beagle.targets.linears.joined import join_linears
from conftest import FAMILIES, tiny_model

IDS = torch.tensor([[1, 5, 9, 4, 7]])
JOINED_ALREADY = {"gpt_neox", "phi3"}


def products(module: nn.Module) -> int:
    return sum(type(layer) is nn.Linear for layer in module.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_states_stay_and_its_products_are_fewer(family):
    base = tiny_model(family).base_model
    before, count = base(input_ids=IDS)[0], products(base)
    join_linears(base, lambda: base(input_ids=IDS))
    for _ in range(2):
        torch.testing.assert_close(base(input_ids=IDS)[0], before, rtol=1e-4, atol=1e-4)
        base(input_ids=IDS.flip(1))  # leaves nothing behind
    if family == "phi":  # q, k and v are one
        assert products(base) * 6 == count * 4
    elif family not in JOINED_ALREADY:  # gate and up, too
        assert products(base) * 7 == count * 4
    else:
        assert products(base) == count


class Chain(nn.Module):
    """What must stay apart: other inputs, a layer called twice, one with a bias beside one without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.c, self.d = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.a(self.a(x) + self.b(x))
        return self.c(z) + self.d(z)


@torch.no_grad()
def test_what_cannot_be_joined_stays():
    chain, x = Chain(), torch.randn(2, 4)
    before = chain(x)
    join_linears(chain, lambda: chain(x))
    assert products(chain) == 4
    assert torch.equal(chain(x), before)


@torch.no_grad()
def test_parts_have_the_layers_outputs_and_biases():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 2)])
    x = torch.randn(2, 4)
    run = lambda: [layer(x) for layer in model]  # noqa: E731
    before = run()
    join_linears(model, run)
    assert products(model) == 1
    for one, other in zip(before, run(), strict=True):
        torch.testing.assert_close(one, other)
    assert [layer.out_features for layer in model] == [3, 5, 2]
    assert all(one.joined is other.joined for one, other in pairwise(model))
