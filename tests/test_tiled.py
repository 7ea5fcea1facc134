"""Our CPU kernel for products and attention of few vectors."""

import math
import shutil

import pytest
import torch
from torch import nn

from beagle.targets import compiled
from beagle.targets.cache import KVCache, LayerShape
from beagle.targets.linears import tiled
from beagle.targets.linears.packed import packed
from beagle.targets.linears.product import Int8Product, Near, Product
from beagle.targets.linears.quantized import VectorQuantizer, dequantized, int8_weight, quantized
from beagle.targets.lm_head import LMHead
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++")), reason="there is no C++ compiler"),
    pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX-512 BF16"),
]


@pytest.fixture
def kernel(kernel_folder):
    assert tiled.load(kernel_folder)
    return kernel_folder


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 64), (576, 1536)])
@pytest.mark.parametrize("vectors", [1, 2, 8, 9, 16, 17, 32, 33, 65])
def test_its_products_are_right(kernel, outputs, inputs, vectors):
    weight, bias, x = drawn(outputs, inputs), drawn(outputs), drawn(vectors, inputs)
    ours = packed(weight, bias)(x)
    right = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(ours.double(), right, rtol=2**-8, atol=1e-3 * inputs**0.5)


@pytest.mark.parametrize("outputs", [16, 48, 576])
@pytest.mark.parametrize("vectors", [1, 2, 8, 9, 16, 17, 33, 65])
def test_its_int8_products_are_those_of_whole_numbers(kernel, outputs, vectors, monkeypatch):
    weight, bias, x = drawn(outputs, 192), drawn(outputs), drawn(vectors, 192)
    ours = quantized(weight, bias, "int8", VectorQuantizer())(x)
    monkeypatch.setattr(tiled, "_kernel", None)
    pytorchs = quantized(weight, bias, "int8", VectorQuantizer())(x)
    assert torch.allclose(ours, pytorchs, rtol=2**-7, atol=1e-3)
    assert (ours == pytorchs).float().mean() > 0.99  # but for the rounding of products with a fused sum


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (32, 32), (80, 96), (576, 1536)])
@pytest.mark.parametrize("rare", [0.0, 0.01, 1.0])
def test_twelve_bits_hold_every_weight(kernel, outputs, inputs, rare):
    random = torch.Generator().manual_seed(0)
    weight = drawn(outputs, inputs)
    others = torch.randint(-(2**15), 2**15, weight.shape, generator=random).to(torch.int16).view(torch.bfloat16)
    others = torch.where(others.isfinite(), others, 0)
    small = torch.finfo(torch.bfloat16).smallest_normal  # the processor takes less for nothing
    others = torch.where(others.abs() < small, 0, others)
    weight = torch.where(torch.rand(weight.shape, generator=random) < rare, others, weight)
    packed, one = tiled.half(weight), torch.eye(inputs).bfloat16()
    assert torch.equal(Product(weight, None)(one), weight.T)
    if rare == 0:
        assert packed.nbytes < weight.numel() * 1.5 + 16 + 2 * outputs + 64


def test_a_vectors_product_does_not_depend_on_the_others(kernel):
    weight, x = drawn(96, 576), drawn(40, 576)
    apply = Product(weight, None)
    assert torch.equal(apply(x), torch.cat([apply(x[i : i + 1]) for i in range(40)]))


HIDDEN = torch.finfo(torch.bfloat16).min


def attention(batch: int, heads: int, rows: int, keys: int, inputs: int, outputs: int, seed: int = 0):
    """Queries, keys and values in a larger cache as decoding has them, and a mask that hides some."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, heads, n, of, generator=random).bfloat16()
        for n, of in ((rows, inputs), (keys + 9, inputs), (keys + 9, outputs))
    )
    mask = torch.where(torch.rand(batch, 1, rows, keys, generator=random) < 0.3, HIDDEN, 0.0).bfloat16()
    mask[..., 0] = 0  # each row sees something
    return q, k[:, :, :keys], v[:, :, :keys], mask


def right(q, k, v, mask, scale):
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), mask.double(), scale=scale
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 7, 16, 37])
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 200])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (64, 64), (128, 128), (96, 80)])
def test_its_attention_is_right(kernel, threads, rows, keys, inputs, outputs):
    given = attention(2, 3, rows, keys, inputs, outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = tiled.attend(*given, 0.2)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(ours.double(), right(*given, 0.2), rtol=2**-7, atol=0.02)


def test_one_mask_may_stand_for_all(kernel):
    q, k, v, mask = attention(1, 2, 5, 70, 64, 64)
    shared = mask[:, :, :1]
    assert torch.allclose(
        tiled.attend(q, k, v, shared, 0.1).double(), right(q, k, v, shared, 0.1), rtol=2**-7, atol=0.02
    )
    biases = torch.randn(1, 2, 5, 70, generator=torch.Generator().manual_seed(1)).bfloat16()  # of each head
    assert torch.allclose(
        tiled.attend(q, k, v, biases, 0.1).double(), right(q, k, v, biases, 0.1), rtol=2**-7, atol=0.02
    )


def test_a_querys_attention_does_not_depend_on_the_others(kernel):
    q, k, v, mask = attention(1, 2, 40, 100, 64, 64)
    alone = [tiled.attend(q[:, :, i : i + 1], k, v, mask[:, :, i : i + 1], 0.1) for i in range(40)]
    assert torch.equal(tiled.attend(q, k, v, mask, 0.1), torch.cat(alone, 2))


def test_attention_does_not_depend_on_threads_nor_on_keys_that_nobody_sees(kernel):
    q, k, v, mask = attention(1, 3, 9, 300, 64, 64)
    mask[..., 160:] = HIDDEN
    found = []
    before = torch.get_num_threads()
    try:
        for threads, keys in ((1, 300), (2, 300), (5, 300), (2, 160), (1, 192), (2, 288)):
            torch.set_num_threads(threads)
            found.append(tiled.attend(q, k[:, :, :keys], v[:, :, :keys], mask[..., :keys], 0.1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_no_number_is_hidden_by_its_attention(kernel):
    for where in range(3):
        given = attention(1, 1, 2, 40, 32, 32)
        given[where][0, 0, 1] = torch.nan
        given[3][...] = 0
        assert tiled.attend(*given, 0.1).isnan().any()


def test_other_attention_is_left_to_pytorch(kernel):
    q, k, v, _ = attention(1, 2, 3, 40, 64, 64)
    assert tiled.attends(q, k, v)
    assert not tiled.attends(q.float(), k, v)
    assert not tiled.attends(q[..., :48], k[..., :48], v)  # its rows are not in one piece
    assert not tiled.attends(q[..., :48], k[..., :48].contiguous(), v)
    assert not tiled.attends(q, k.transpose(1, 2).contiguous().transpose(1, 2), v)


@pytest.mark.parametrize("n", [5, 16, 49152, 49153])
def test_the_largest_of_a_row_is_the_first_of_its_kind(kernel, n):
    x = drawn(7, n)
    x[1] = -torch.inf
    x[2, n // 2] = torch.inf
    x[3, 1:4] = 30.0
    values, places = tiled.largest(x)
    assert torch.equal(values, x.amax(-1))
    assert torch.equal(places, (x == values[:, None]).int().argmax(-1))
    x[4, n - 1] = torch.nan
    assert tiled.largest(x)[0].isnan().tolist() == [False] * 4 + [True] + [False] * 2


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_what_is_no_number_stays_none_in_a_product(kernel, kind):
    weight, x = drawn(48, 128), drawn(3, 128)
    x[1, 70] = torch.nan
    product = quantized(weight, None, kind, VectorQuantizer()) if kind else Product(weight, None)
    assert product(x).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_the_largest_of_a_product_is_that_of_its_rows(kernel, kind, rows):
    weight, x = drawn(16 * 131, 64), drawn(rows, 64)
    weight[700:703] = weight[1900:1903]  # the first of equal ones
    bias = torch.zeros(len(weight)).bfloat16()
    bias[[701, 1901]] = 400.0
    product = Product(weight, bias)
    if kind:
        scales, whole = int8_weight(weight)
        product = Int8Product(whole, scales, bias)
    values, places = product.largest(x)
    assert (values, places) == lists(tiled.largest(product(x)))
    assert places == [701] * rows
    assert product.largest(drawn(rows, 100)[:, 36:]) == lists(tiled.largest(product(drawn(rows, 100)[:, 36:])))
    x[0, 3] = torch.nan
    assert [math.isnan(value) for value in product.largest(x)[0]] == [True] + [False] * (rows - 1)


def lists(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[list[float], list[int]]:
    return pair[0].tolist(), pair[1].tolist()


@pytest.mark.parametrize("alike", [0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("huge", [1.0, 300.0])
@pytest.mark.parametrize("rows", [1, 9, 32, 33])
def test_a_shortlist_leaves_the_largest_in(kernel, rows, huge, alike):
    """Outputs may be closer to each other than int8 tells them apart, or equal once they are rounded."""
    outputs, inputs = 16 * 131, 192
    weight = (alike * drawn(1, inputs).float() + (1 - alike) * drawn(outputs, inputs).float()).bfloat16()
    x = drawn(rows, inputs)
    x[:, 5] *= huge  # as states of models have it
    for bias in (None, drawn(outputs)):
        whole, listed = Product(weight, bias), Product(weight, bias)
        listed.near = Near.of(weight)
        assert listed.largest(x) == whole.largest(x) == lists(tiled.largest(whole(x)))


def test_a_shortlist_has_what_its_bound_does_not_leave_out(kernel):
    """An output that int8 puts below others is the largest: a small weight beside a huge one that the vector doesn't see."""
    weight, x = torch.zeros(16 * 131, 128).bfloat16(), torch.zeros(1, 128).bfloat16()
    x[0, :64] = 1.0
    weight[:, 100] = 1000.0  # a step of int8 is 8
    weight[1500, :64] = 3.5
    weight[10, 0] = 4.0
    assert int8_weight(weight)[1][[10, 1500], :64].sum(1).tolist() == [1, 0]
    product = Product(weight, None)
    product.near = Near.of(weight)
    assert product.largest(x) == ([224.0], [1500])


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (80, 192)])
def test_a_shortlist_s_weight_is_the_int8_one(kernel, outputs, inputs):
    weight = drawn(outputs, inputs)
    weight[3] = 0.0
    ordered, scales, sums, left = tiled.near(weight)
    own, whole = int8_weight(weight)
    assert torch.equal(ordered, tiled.tiled(whole))
    assert torch.equal(scales, own)
    assert sums.tolist() == whole.sum(1).tolist()
    rest = (weight.float() - whole * own[:, None]).norm(dim=1)
    assert ((rest <= left) & (left <= 1.02 * rest + 1e-3 * weight.float().norm(dim=1))).all()


def test_a_shortlist_counts_all_that_int8_leaves(kernel):
    """The vector points where an output's weights are off, and another output is just above what int8 says of it."""
    weight = torch.zeros(16 * 131, 128).bfloat16()
    weight[1500] = drawn(128)
    scales, whole = int8_weight(weight[1500:1501])
    said = (whole * scales[:, None])[0]
    rest = weight[1500].float() - said
    x = (64 * rest / rest.norm()).bfloat16()
    at = x.abs().argmax()
    weight[10, at] = (said @ x.float() + 0.6 * 64 * rest.norm()) / x[at]
    bias = torch.full((len(weight),), -1000.0).bfloat16()
    bias[[10, 1500]] = 0.0
    product = Product(weight, bias)
    assert product.largest(x[None])[1] == [1500]
    product.near = Near.of(weight)
    assert product.largest(x[None])[1] == [1500]


def test_a_shortlist_keeps_ties_that_rounding_makes(kernel):
    """Outputs of 257.25 and 258.77 are both 258 in bf16, but int8 says 256 of the first and 260 of the second."""
    weight, x = torch.zeros(16 * 131, 128).bfloat16(), torch.zeros(1, 128).bfloat16()
    x[0, :4] = torch.tensor([256.0, 1.0, 256.0, 3.015625])
    weight[10, :3] = torch.tensor([1.0, 1.0, 2.0**-10])
    weight[1500, :4] = torch.tensor([1.0, 0.0, -(2.0**-10), 1.0])
    weight[[10, 1500], 4] = 127 / 64  # a step of int8 is 1 / 64, and the vector doesn't see it
    product = Product(weight, None)
    assert product(x)[0, [10, 1500]].tolist() == [258.0, 258.0]
    near = Near.of(weight)
    assert Int8Product(int8_weight(weight)[1], near.scales, None)(x)[0, [10, 1500]].tolist() == [256.0, 260.0]
    product.near = near
    assert product.largest(x) == ([258.0], [10])


@pytest.mark.parametrize(("scale", "shortened"), [(1.0, True), (0.5, False)])
def test_a_head_whose_logits_are_scaled_has_no_shortlist(kernel, scale, shortened):
    own = tiny_model("llama", hidden_size=64).bfloat16()
    own.config.logit_scale = scale
    head = LMHead(own.lm_head, own.config, "tiny", pack=True)
    assert head.shorten() == shortened
    x = drawn(5, 64)
    assert head.likeliest(x) == lists(tiled.largest(head(x)))


@pytest.mark.parametrize("what", ["vector", "weight", "infinite vector", "infinite weight"])
def test_a_shortlist_hides_no_nan(kernel, what):
    weight, x = drawn(16 * 131, 128), drawn(3, 128)
    of = x[1] if "vector" in what else weight[2000]
    of[70] = torch.inf if "infinite" in what else torch.nan
    whole, listed = Product(weight, None), Product(weight, None)
    listed.near = Near.of(weight)
    (values, places), expected = listed.largest(x), whole.largest(x)
    assert torch.equal(torch.tensor(values).nan_to_num(-1.0), torch.tensor(expected[0]).nan_to_num(-1.0))
    assert [p for p, v in zip(places, values, strict=True) if v == v] == [
        p for p, v in zip(*reversed(expected), strict=True) if v == v
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accepted_slots_are_moved_as_pytorch_moves_them(kernel, monkeypatch, dtype):
    def filled(batch):
        cache = KVCache([LayerShape(2, 8, 16)] * 3, batch=batch, capacity=32, dtype=dtype, device=torch.device("cpu"))
        for tensor in cache.tensors:
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) % 251)
        return cache

    ours, part, theirs = filled(1), filled(2), filled(1)
    several = filled(2)
    view = part.sequence(1)  # its slots lie apart
    for cache in (ours, view):
        cache.lengths = [5]
        cache.compact([0, 2, 3, 7])
    monkeypatch.setattr(tiled, "_kernel", None)
    theirs.lengths, several.lengths = [5], [0, 5]
    theirs.compact([0, 2, 3, 7])
    several.compact_sequences([[], [0, 2, 3, 7]])
    for mine, right in ((ours, theirs), (part, several)):
        assert all(torch.equal(a, b) for a, b in zip(mine.tensors, right.tensors, strict=True))
    assert ours.lengths == view.lengths == [9]


def test_weights_that_are_no_whole_tiles_are_left_to_pytorch(kernel):
    assert tiled.fits(drawn(32, 64))
    assert not any(tiled.fits(weight) for weight in (drawn(24, 64), drawn(32, 48), drawn(32, 64).float()))


def test_a_compiled_pass_uses_it_and_gives_the_eager_states(kernel, monkeypatch):
    def model():
        return tiny_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1).bfloat16()

    compiled.build(kernel, model(), "tiny")
    found = compiled.find(kernel, model(), None)
    target, eager = (Target(model(), tiny_tokenizer(), "tiny") for _ in range(2))
    target.use(found)  # compares
    of_head = target.model.lm_head.weight.numel()
    assert target.pass_bytes == (target.pass_weights - of_head) * 3 // 2 + of_head
    assert eager.pass_bytes == eager.pass_weights * 2
    monkeypatch.setattr(target, "eager", None)
    states = []
    for each in (target, eager):
        cache = each.new_cache(1, 20)
        cache.lengths = [5]
        states.append(each.verify(cache, torch.arange(5, 9), TreeShape([-1, 0, 0, 1])))
    assert torch.allclose(*states, atol=0.05)


@torch.no_grad()
def test_layers_that_read_the_same_tensor_are_one_product():
    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    base = model.model
    layers = compiled.probe.learn(model, "tiny")
    compiled.join(base, layers, base.embed_tokens.weight)
    attention = base.layers[0].self_attn
    assert attention.q_proj.joined is attention.v_proj.joined
    assert base.layers[0].mlp.gate_proj.joined is base.layers[0].mlp.up_proj.joined
    assert type(attention.o_proj) is nn.Linear


def test_without_a_compiler_there_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in tiled.build(tmp_path)
    assert not tiled.loaded()


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Vectors in groups of 32 inputs as int8, and back."""
    groups = x.float().unflatten(-1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups * (1 / scales)).round() * scales).flatten(-2)


@pytest.mark.parametrize("outputs", [16, 48, 576])
@pytest.mark.parametrize("vectors", [*range(1, 14), 24, 25, 65])
def test_its_int4_products_are_those_of_the_dequantised_weights(kernel, outputs, vectors):
    weight, bias, x = drawn(outputs, 192), drawn(outputs), drawn(vectors, 192)
    x[:, :32] *= 50  # each group has a scale of its own
    ours = quantized(weight, bias, "int4", VectorQuantizer())(x)
    right = rounded(x).double() @ dequantized(weight, "int4").double().T + bias.double()
    assert torch.allclose(ours.double(), right, rtol=2**-8, atol=1e-4 * 192**0.5)


def test_its_int4_products_are_pytorchs_within_rounding(kernel, monkeypatch):
    weight, x = drawn(96, 320), (drawn(7, 320) * 20).round()
    x[:, ::32] = 127  # such inputs are int8 already
    ours = quantized(weight, None, "int4", VectorQuantizer())(x)
    monkeypatch.setattr(tiled, "_kernel", None)
    pytorchs = quantized(weight, None, "int4", VectorQuantizer())(x)
    assert torch.allclose(ours, pytorchs, rtol=2**-7, atol=1e-3 * 320**0.5 * 127)
    assert (ours == pytorchs).float().mean() > 0.95


def test_a_vectors_int4_product_does_not_depend_on_the_others(kernel):
    weight, x = drawn(96, 576), drawn(70, 576)
    apply = quantized(weight, None, "int4", VectorQuantizer())
    assert torch.equal(apply(x), torch.cat([apply(x[i : i + 1]) for i in range(70)]))


def test_int4_weights_that_are_no_whole_tiles_are_left_to_pytorch(kernel):
    weight, x = drawn(48, 96), drawn(3, 96)
    ours = quantized(weight, None, "int4", VectorQuantizer())(x)
    assert torch.allclose(ours.float(), x.float() @ dequantized(weight, "int4").T, rtol=0.02, atol=0.1)


def test_a_compiled_int4_pass_uses_it_and_gives_the_eager_states(kernel, monkeypatch):
    def model():
        return tiny_model("llama", hidden_size=64, intermediate_size=128).bfloat16()

    compiled.build(kernel, model(), "tiny", "int4")
    found = compiled.find(kernel, model(), "int4")
    target, eager = (Target(model(), tiny_tokenizer(), "tiny", "int4") for _ in range(2))
    target.use(found)  # compares
    monkeypatch.setattr(target, "eager", None)
    states = []
    for each in (target, eager):
        cache = each.new_cache(1, 20)
        cache.lengths = [5]
        states.append(each.verify(cache, torch.arange(5, 9), TreeShape([-1, 0, 0, 1])))
    assert torch.allclose(*states, atol=0.1)  # int8 vectors round otherwise where their inputs do


def test_it_is_kept_only_where_none_of_its_products_is_slower(kernel, monkeypatch):
    answers = iter([True, False])
    monkeypatch.setattr(tiled, "_keeps_up", lambda ours, theirs: next(answers))
    assert not tiled._is_kept()
    answers = iter([True, True])
    assert tiled._is_kept()


@torch.no_grad()
def test_a_chains_states_are_those_of_single_tokens(kernel, monkeypatch):
    """By this kernel's products, and by attention over whole blocks of keys."""
    monkeypatch.setattr("beagle.targets.linears.packed._reordered", Product)
    model = tiny_model("llama", hidden_size=64, intermediate_size=96).bfloat16()
    target = Target(model, tiny_tokenizer(), "tiny")
    ids = torch.randint(1, target.vocab_size, (60,), generator=torch.Generator().manual_seed(0))
    whole, single = target.new_cache(1, 60), target.new_cache(1, 60)
    for cache in (whole, single):
        target.prefill(ids[None, :44], cache)
    together = target.verify(whole, ids[44:], TreeShape.chain(16))
    for i in range(16):
        alone = target.verify(single, ids[44 + i : 45 + i], TreeShape([-1]))
        assert torch.equal(together[i : i + 1], alone)
        single.compact([0])
