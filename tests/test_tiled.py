"""Our CPU kernel for products of few vectors."""

import shutil

import pytest
import torch
from torch import nn

from beagle.targets import compiled
from beagle.targets.linears import tiled
from beagle.targets.linears.packed import packed
from beagle.targets.linears.quantized import VectorQuantizer, quantized
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++")), reason="there is no C++ compiler"),
    pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX-512 BF16"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "_kernel", None)
        patch.setattr(tiled, "_is_faster", lambda: True)
        assert tiled.build(folder) is None
    return folder


@pytest.fixture
def kernel(built):
    assert tiled.load(built)
    return built


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


def test_a_vectors_product_does_not_depend_on_the_others(kernel):
    weight, x = drawn(96, 576), drawn(40, 576)
    apply = tiled.apply(weight, None)
    assert torch.equal(apply(x), torch.cat([apply(x[i : i + 1]) for i in range(40)]))


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
