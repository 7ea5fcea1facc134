"""Packed linear layers: the plain product, in half precision on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beagle.targets.linears import packed as packing
from beagle.targets.linears.packed import PackedLinear, pack_linears, packed
from conftest import tiny_target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (5,), (17,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_product_is_the_plain_one(dtype, rows, bias):
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 80, generator=random).to(dtype)
    offset = torch.randn(48, generator=random).to(dtype) if bias else None
    x = torch.randn(*rows, 80, generator=random).to(dtype)
    expected = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    close = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(packed(weight, offset)(x).double(), expected, atol=close, rtol=0.02)


def test_large_weights_are_packed_too(monkeypatch):
    """Sums of large weights round by more than any fixed amount."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 products")
    weight = (100 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) + 300).bfloat16()
    apply = packed(weight)
    monkeypatch.setattr(packing.F, "linear", lambda *_: pytest.fail("not packed"))
    apply(torch.ones(3, 512, dtype=torch.bfloat16))


def test_kernels_that_compute_something_else_are_not_trusted(monkeypatch):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda x, *_: torch.zeros(len(x), 8, dtype=x.dtype), raising=False
    )
    assert torch.equal(packed(weight)(x), F.linear(x, weight))


def test_weights_of_one_shape_are_compared_once(monkeypatch):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 products")
    monkeypatch.setattr(packing, "_agreed", set())
    plain, compared = F.linear, []
    monkeypatch.setattr(packing.F, "linear", lambda *given: compared.append(given[1].shape) or plain(*given))
    for shape in ((8, 16), (8, 16), (16, 8), (8, 16)):
        packing._reordered(torch.ones(shape).bfloat16(), None)
    packing._reordered(torch.ones(8, 16).bfloat16(), torch.ones(8).bfloat16())
    assert compared == [(8, 16), (16, 8), (8, 16)]  # and once with a bias


def test_a_build_without_the_operators_decodes_plainly(monkeypatch):
    def missing(*_):
        raise NotImplementedError

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing, raising=False)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    assert torch.equal(packed(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, PackedLinear), (torch.float32, nn.Linear)])
def test_targets_are_packed_in_half_precision_only(dtype, kind):
    target = tiny_target(dtype=dtype)
    assert type(target.base.layers[0].mlp.up_proj) is kind
    assert type(target.head) is nn.Linear  # its rows are read, too


def test_subclasses_of_linear_are_left_alone():
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(4, 4), Own(4, 4)).bfloat16()
    pack_linears(module)
    assert [type(child) for child in module] == [PackedLinear, Own]
