"""Quantised targets: the right product, rows alone, lossless relative to themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beagle.decoding.costs import cached_costs
from beagle.decoding.decoder import Decoder, decode
from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.decoding.sequence import Sequence
from beagle.drafters.base import TreePlan
from beagle.drafters.lookup import LookupDrafter
from beagle.errors import BeagleError
from beagle.targets.linears.packed import PackedLinear
from beagle.targets.linears.quantized import (
    BITS,
    FINE,
    KINDS,
    VectorQuantizer,
    dequantized,
    quantize_linears,
    quantized,
)
from beagle.targets.target import Target
from beagle.training.states import Fingerprint, StateStore
from conftest import FAMILIES, tiny_drafter, tiny_model, tiny_tokenizer

CONTEXT = [5, 9, 33, 12, 60, 41, 7, 7, 28, 50, 19]
HALF, FULL = torch.bfloat16, torch.float32


def tiny(kind: str | None, dtype: torch.dtype = HALF, family: str = "llama") -> Target:
    # widths that int4 groups divide
    target = Target(tiny_model(family, intermediate_size=64).to(dtype), tiny_tokenizer(), f"tiny-{family}", kind)
    target.eos_ids = frozenset()
    return target


def answer(target, drafter, *, exact, n=40, **sampling):
    plan = TreePlan("dynamic", depth=4, top_k=6, nodes=14)
    decoder = Decoder(target, drafter=drafter, plan=plan, exact=exact)
    steps = decode(decoder, Sequence(CONTEXT, n, Sampler(SamplingParams(**sampling))))
    return [token for step in steps for token in step.tokens]


def weight_and_rows(dtype):
    random = torch.Generator().manual_seed(1)
    weight = (torch.randn(48, 96, generator=random) * torch.rand(48, 1, generator=random)).to(dtype)
    return weight, torch.randn(9, 96, generator=random).to(dtype)


@pytest.mark.parametrize("dtype", [FULL, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_that_of_the_dequantised_weights(dtype, kind, with_bias):
    weight, x = weight_and_rows(dtype)
    bias = torch.linspace(-3, 3, 48).to(dtype) if with_bias else None
    expected = F.linear(x.float(), dequantized(weight, kind), None if bias is None else bias.float())
    for shape in ((9, 96), (3, 3, 96), (1, 9, 96)):
        ours = quantized(weight, bias, kind, VectorQuantizer())(x.view(shape))
        assert ours.dtype == dtype
        assert ours.shape == (*shape[:-1], 48)
        close = 2e-3 if dtype == FULL else 0.02
        torch.testing.assert_close(ours.view(9, 48).float(), expected, rtol=0.01, atol=close)


@pytest.mark.parametrize(("kind", "step"), [("int8", 2 / 254), ("int4", 2 / 15)])
def test_dequantised_weights_are_off_by_half_a_step(kind, step):
    weight = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gap = (dequantized(weight, kind) - weight).abs().max()
    assert 0.3 * step < gap <= 0.51 * step


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_company(kind):
    weight, x = weight_and_rows(HALF)
    x[3] *= 1000  # a scale for all rows would drown the others
    apply = quantized(weight, None, kind, VectorQuantizer())
    whole = apply(x)
    for n in range(1, 9):
        assert torch.equal(apply(x[:n].clone()), whole[:n])


def test_rows_that_change_in_place_are_quantised_again():
    rows = VectorQuantizer()
    x = torch.ones(2, 4)
    before = rows(x)
    assert rows(x) is before
    x[0, 1:] = 0.0
    assert rows(x)[0].tolist() == [[127, 0, 0, 0], [127] * 4, [0] * 4, [0] * 4]


def test_rows_keep_15_bits():
    x = torch.randn(5, 400, generator=torch.Generator().manual_seed(2))
    x[1, 7] = 300.0  # a huge entry
    quants, scales = VectorQuantizer()(x)
    coarse, fine = quants.float().chunk(2)
    gap = ((coarse + fine / FINE) * scales - x).abs().amax(1) / x.abs().amax(1)
    assert (gap < 1.1 / 2 / 127 / FINE).all()


def test_rows_of_zeros():
    weight, x = weight_and_rows(HALF)
    assert not quantized(weight, None, "int8", VectorQuantizer())(torch.zeros_like(x)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_exact_drafted_answers_are_plain_ones(kind, dtype, temperature):
    target = tiny(kind, dtype)
    plain = answer(target, None, exact=True, temperature=temperature)
    for drafter in (tiny_drafter(target), LookupDrafter()):
        assert answer(target, drafter, exact=True, temperature=temperature) == plain


def test_int4_in_fp32_needs_no_exact_mode():
    target = tiny("int4", FULL)
    assert answer(target, tiny_drafter(target), exact=False) == answer(target, None, exact=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(kind, family):
    """A quantised pass stays near the plain one, whatever the family."""
    ids = torch.tensor([CONTEXT])
    plain, ours = tiny(None, FULL, family), tiny(kind, FULL, family)
    expected, found = (t.logits(t.prefill(ids, t.new_cache(1, 16))) for t in (plain, ours))
    assert not torch.equal(expected, found)
    assert F.cosine_similarity(expected, found, dim=-1).mean() > (0.95 if kind == "int8" else 0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_and_the_lm_head_run_quantised(kind, monkeypatch):
    target = tiny(kind)
    assert target.unquantized == []
    of_head = target.head.weight.numel()
    assert target.pass_bytes == (target.pass_weights - of_head) * BITS[kind] // 8 + of_head
    assert not [m for m in target.base.modules() if isinstance(m, nn.Linear)]
    assert isinstance(target.base.layers[0].mlp.up_proj, PackedLinear)
    states = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).to(HALF)
    of_int8 = quantized(target.head.weight, None, "int8", VectorQuantizer())  # beside int4, too
    assert torch.equal(target.logits(states), of_int8(states))
    assert not torch.equal(target.logits(states), F.linear(states, target.head.weight))
    assert torch.equal(target.head_rows()[0], target.head.weight)


def test_layers_of_other_shapes_stay_as_they_are():
    module = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 24), nn.Linear(24, 32))
    assert quantize_linears(module, "int4") == ["1", "2"]
    assert [type(child) for child in module] == [PackedLinear, nn.Linear, nn.Linear]


def test_unknown_kinds_are_refused():
    with pytest.raises(BeagleError, match="'int3' is unknown; use int8 or int4"):
        tiny("int3")


@pytest.mark.parametrize("broken", [NotImplementedError("not here"), "zeros"], ids=["missing", "wrong"])
@pytest.mark.parametrize(
    ("kind", "where", "name"), [("int8", torch, "_int_mm"), ("int4", torch.ops.aten, "_weight_int4pack_mm_for_cpu")]
)
def test_kernels_that_are_missing_or_wrong_are_refused(kind, where, name, broken, monkeypatch):
    def product(x, weight, *_):
        if isinstance(broken, Exception):
            raise broken
        return torch.zeros(len(x), 64, dtype=torch.int32 if kind == "int8" else x.dtype)

    monkeypatch.setattr(where, name, product, raising=False)
    reason = "not here" if isinstance(broken, Exception) else "products are wrong"
    with pytest.raises(BeagleError, match=f"quantize {kind}: .* no kernel for bfloat16 on cpu .*{reason}"):
        quantized(torch.ones(64, 64, dtype=HALF), None, kind, VectorQuantizer())


def test_costs_and_states_are_told_from_the_plain_target(tmp_path, monkeypatch):
    plain, ours = tiny(None, FULL), tiny("int8", FULL)
    assert plain.name == ours.name
    plan = TreePlan("chain", depth=1)
    measured = []
    monkeypatch.setattr(
        "beagle.decoding.costs.measure", lambda target, *_: measured.append(target.quantize) or _costs()
    )
    for target in (plain, ours, plain, ours):
        cached_costs(target, LookupDrafter(), plan)
    assert measured == [None, "int8"]
    StateStore(tmp_path, Fingerprint.of(plain, 8, 8))
    StateStore(tmp_path, Fingerprint.of(plain, 8, 8))
    with pytest.raises(BeagleError, match="quantize None, not 'int8'"):
        StateStore(tmp_path, Fingerprint.of(ours, 8, 8))


def _costs():
    from beagle.decoding.costs import Costs

    return Costs([1.0] * 3, 1.0, 1)
