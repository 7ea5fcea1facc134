"""The kernel's attention merged with own keys, against the same written out."""

from __future__ import annotations

import pytest
import torch

from beagle.training import own_keys
from beagle.training.own_keys import attend_by_scores, attend_with_own
from beagle.training.windows import up_to


def problem(dtype: torch.dtype, steps: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    batch, heads, windows, n, width = 3, 4, 10, 48, 16
    shapes = [(batch, heads, windows, width)] + 2 * [(batch, heads, n, width)]
    shapes += 2 * steps * [(batch, heads, windows, width)]
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors, up_to(torch.randint(0, n, (batch, windows)), tensors[1])


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_gives_what_is_written_out(dtype, most, steps):
    """``most`` is of the norm; the kernel rounds bf16 less often. The written-out softmax is float32 in any case."""
    tensors, mask = problem(dtype, steps)
    q, k, v, *own = tensors
    arguments = q, k, v, mask, tuple(own[:steps]), tuple(own[steps:])
    assert own_keys.fused(q, k)
    ours, written = attend_with_own(*arguments), attend_by_scores(*arguments)
    assert ours.dtype == written.dtype
    gradient = torch.randn_like(ours)
    of = zip(torch.autograd.grad(ours, tensors, gradient), torch.autograd.grad(written, tensors, gradient), strict=True)
    for found, expected in [(ours, written), *of]:
        assert (found - expected).double().norm() <= most * expected.double().norm()


def test_no_scores_are_kept_for_the_backward_pass():
    tensors, mask = problem(torch.float32, 2)
    q, k, v, *own = tensors
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        attend_with_own(q, k, v, mask, own[:2], own[2:])
    assert torch.Size((3, 4, 10, 48)) not in kept
    assert len(kept) == 3 + 1 + 4 + 3  # q, k, v; mask; own keys and values; output, normaliser, shares of own keys
