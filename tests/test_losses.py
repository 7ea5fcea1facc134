"""The chunked losses against what autograd makes of their plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beagle.training import losses
from beagle.training.losses import regression, slot_losses, total


def soft_cross_entropy(*args):
    return total(slot_losses(*args)[0])


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_soft_cross_entropy_and_its_gradient(monkeypatch, rows, chunk):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    random = torch.Generator().manual_seed(rows)
    predicted = torch.randn(rows, 8, generator=random).requires_grad_()
    true = torch.randn(rows, 8, generator=random)
    head = torch.randn(21, 8, generator=random)
    weights = torch.rand(rows, generator=random)

    naive_input = predicted.detach().clone().requires_grad_()
    p = F.softmax(true @ head.T, dim=-1)
    naive = -(weights[:, None] * p * F.log_softmax(naive_input @ head.T, dim=-1)).sum()
    (3 * naive).backward()

    value = soft_cross_entropy(predicted, true, head, weights)
    (3 * value).backward()
    torch.testing.assert_close(value, naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predicted.grad, naive_input.grad, atol=1e-5, rtol=1e-5)
    assert not true.requires_grad


def test_products_have_few_shapes(monkeypatch):
    """Some kernels keep what they made for every shape: hundreds of row counts would be gigabytes."""
    shapes: set[int] = set()
    ordinary = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: (shapes.add(len(x)), ordinary(x, *rest))[1])
    head = torch.randn(5, 8)
    for rows in range(1, 1200, 7):
        soft_cross_entropy(torch.randn(rows, 8), torch.randn(rows, 8), head, torch.ones(rows))
    assert len(shapes) <= losses.CHUNK // losses.ROUND


def test_cross_entropy_is_least_at_the_true_state():
    random = torch.Generator().manual_seed(0)
    true, head, weights = torch.randn(4, 8, generator=random), torch.randn(21, 8, generator=random), torch.ones(4)
    predicted = true.clone().requires_grad_()
    soft_cross_entropy(predicted, true, head, weights).backward()
    assert predicted.grad.abs().max() < 1e-5


def test_regression_is_smooth_l1_by_row():
    predicted = torch.tensor([[0.0, 3.0], [0.5, 0.0]], requires_grad=True)
    weights = torch.tensor([2.0, 4.0])
    value = regression(predicted, torch.zeros(2, 2), weights)
    assert value.item() == pytest.approx(2 * (0 + 2.5) / 2 + 4 * (0.125 + 0) / 2)
    value.backward()
    torch.testing.assert_close(predicted.grad, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
