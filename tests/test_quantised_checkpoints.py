"""Checkpoints that are quantised already: their layers stay what their library made of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets import loading
from beagle.targets.family import weights_digest
from beagle.targets.linears.joined import join_linears
from beagle.targets.linears.packed import PackedLinear, is_plain
from beagle.targets.loading import load_target, missing_package
from beagle.targets.target import Target
from conftest import own_greedy, tiny_model, tiny_tokenizer

PROMPT = [11 + (7 * i * i + i) % 50 for i in range(20)]


def quantised(model: nn.Module) -> nn.Module:
    """As compressed-tensors leaves it: the forward of some linear layers is one of their own, which bounds its inputs."""
    for layer in model.model.layers:
        linear = layer.mlp.down_proj
        linear.forward = lambda x, linear=linear: nn.functional.linear(x.clamp(-1, 1), linear.weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_a_forward_of_their_own_keep_it(dtype):
    model, other = (quantised(tiny_model().to(dtype)) for _ in range(2))
    target = Target(other, tiny_tokenizer(), "x")
    assert type(target.base.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(target.base.layers[0].mlp.up_proj, PackedLinear) or dtype == torch.float32
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0]
    found = target.logits(target.prefill(ids, target.new_cache(1, 32))[0])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_such_layers_are_neither_joined_nor_quantised():
    model = quantised(tiny_model())
    target = Target(model, tiny_tokenizer(), "x", quantize="int8")
    assert type(target.base.layers[0].mlp.down_proj) is nn.Linear
    plain = tiny_model().model.layers[0].mlp
    plain.up_proj.forward = lambda x: x
    join_linears(plain, lambda: plain.gate_proj(torch.ones(1, 32)))
    assert type(plain.up_proj) is nn.Linear


class Halves(torch.Tensor):
    """A weight that is made of two tensors, as torchao's are."""

    def __tensor_flatten__(self):
        return ["low", "high"], None

    @property
    def low(self):
        return torch.ones(4)

    @property
    def high(self):
        return torch.full((4,), self.kept)

    def detach(self):
        return self

    def flatten(self):
        raise NotImplementedError


def test_weights_of_several_tensors_have_a_digest():
    def model(kept: float) -> nn.Module:
        linear = nn.Linear(2, 2)
        weight = torch.zeros(2, 2).as_subclass(Halves)
        weight.kept = kept
        linear._parameters["weight"] = weight
        nn.init.zeros_(linear.bias)
        assert not is_plain(linear)
        return linear

    assert weights_digest(model(1.0)) == weights_digest(model(1.0)) != weights_digest(model(2.0))


@pytest.fixture
def compressed(monkeypatch, folders):
    """transformers gives a model whose weights come in its first pass, as of compressed-tensors."""

    class Auto:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            model = tiny_model()
            model.config.quantization_config = {"quant_method": "compressed-tensors"}
            linear = model.model.layers[0].mlp.down_proj
            weight = linear._parameters.pop("weight")

            def decompress(module, inputs):
                linear.register_parameter("weight", weight)
                hook.remove()

            hook = model.register_forward_pre_hook(decompress)
            return model, {"missing_keys": set()}

    monkeypatch.setattr(loading, "auto_class", lambda config: Auto)
    return str(folders.target)


def test_weights_that_come_in_the_first_pass(compressed):
    target = load_target(compressed, dtype="float32", device="cpu")
    expected = own_greedy(tiny_model(), PROMPT, 8)
    assert Model(target).generate(PROMPT, max_new_tokens=8).token_ids == expected


def test_they_are_not_quantised_again(compressed):
    with pytest.raises(BeagleError, match="is quantised already; leave out quantize"):
        load_target(compressed, dtype="float32", device="cpu", quantize="int8")


def test_a_package_of_what_sees_is_named_with_its_command():
    error = ImportError("\nTimmWrapperModel requires the timm library but it was not found in your environment. You can "
                        "install it with pip:\n`pip install timm`. Please note that you may need to restart.\n")  # fmt: skip
    line = missing_package(error, None)
    assert line.endswith("with pip; pip install timm")
    assert "\n" not in line
