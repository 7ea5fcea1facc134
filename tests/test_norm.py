"""RMSNorm of draft heads: PyTorch's values and gradients, from less that is kept for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beagle.drafters.norm import RMSNorm, rms_norm

EPS = 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients_are_those_of_pytorch(dtype, weighted):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 48, dtype=dtype)).requires_grad_()
    weight = (1 + torch.randn(48, dtype=dtype)).requires_grad_() if weighted else None
    of = [x] if weight is None else [x, weight]
    ours, theirs = rms_norm(x, EPS, weight), F.rms_norm(x, (48,), weight, EPS)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(ours)
    for found, expected in zip(
        torch.autograd.grad(ours, of, gradient), torch.autograd.grad(theirs, of, gradient), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_an_input_that_is_not_trained_gets_no_gradient():
    norm = RMSNorm(16, EPS)
    x = torch.randn(3, 16)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    assert x.grad is None


def test_training_and_inference_give_the_same():
    torch.manual_seed(0)
    norm = RMSNorm(64, EPS)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 64)
    with torch.no_grad():
        expected = norm(x)
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)


def test_of_an_input_that_others_keep_hardly_anything_more_is_kept():
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    norm = RMSNorm(64, EPS)
    x = torch.randn(100, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = norm(x)
    others = sum(storage.nbytes() for at, storage in kept.items() if at != x.untyped_storage().data_ptr())
    assert out.requires_grad
    assert others <= 4 * (100 + 64)
