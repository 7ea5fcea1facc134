"""A model that changes after ``beagle.speculate``: it answers as its own ``generate`` does at each call, or is refused."""

from __future__ import annotations

import ast
from pathlib import Path
from types import MethodType

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import beagle
from beagle.errors import BeagleError
from conftest import tiny_model
from speculating import PLAN, PROMPT, both

DTYPES = [torch.float32, torch.bfloat16]


def speculating(dtype=torch.float32, family="llama"):
    model = tiny_model(family).to(dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, beagle.speculate(model, "lookup", plan=PLAN)


def answers(model):
    """Without drafts, with drafts; short, since half precision may flip a near-tie."""
    return both(model, PROMPT, max_new_tokens=12, do_sample=False)


class Scaled(nn.Module):
    def forward(self, x):
        return 3 * x


class Wrapped(nn.Module):
    """A submodule of the caller's own, with a tensor that is neither parameter nor buffer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.direction = torch.linspace(-1, 1, 32)

    def forward(self, x):
        return self.inner(x) + self.direction.to(x.dtype)


def replaced_block(model):
    model.model.layers[1].mlp = Wrapped(model.model.layers[1].mlp)


def added_block(model):
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.LayerNorm(32, dtype=model.dtype))


def removed_layer(model):
    del model.model.layers[1]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)


def parametrized(model):
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.mlp.down_proj, "weight", Scaled())
    parametrize.register_parametrization(model.lm_head, "weight", nn.Softsign())


def setting_of_a_module(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 30


def resized(model):
    model.resize_token_embeddings(80, mean_resizing=False)
    model.lm_head.weight.data[64:] = 2 * model.lm_head.weight.data[3:19]


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


def tied(model):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.tie_weights()


def buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 7


def buffer_in_place(model):
    model.model.rotary_emb.inv_freq.mul_(7)


CHANGES = [replaced_block, added_block, removed_layer, parametrized, setting_of_a_module, resized, untied, tied, buffer,
           buffer_in_place]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_changed_after_speculate(change):
    model, _ = speculating()
    first = answers(model)[1]
    change(model)
    expected, answer = answers(model)
    assert torch.equal(answer, expected)
    assert not torch.equal(answer, first)


def test_settings_of_the_config_are_noticed():
    model, _ = speculating(family="gemma2")
    first = model.generate(PROMPT, max_new_tokens=3, return_dict_in_generate=True, output_logits=True).logits
    model.config.final_logit_softcapping = 0.01
    expected, answer = both(model, PROMPT, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(answer.logits, expected.logits)
    assert max(float(part.max()) for part in answer.logits) <= 0.01 < max(float(part.max()) for part in first)


def write_all(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.2)


def write_a_part(model):
    model.lm_head.weight.data[7] += 20


def write_one_value(model):
    model.model.norm.weight.data[3] = 90.0


def write_by_a_view(model):
    model.lm_head.weight.detach().view(torch.uint8).numpy()[:] ^= 128  # signs, and bits of no weight


def write_elsewhere(model):
    model.lm_head.weight.data = model.lm_head.weight.data.roll(5, 0)


def swap_rows(model):
    model.lm_head.weight.data.copy_(model.lm_head.weight.data.flip(0))


def logits_of(model):
    """Of two tokens, without drafts and with drafts: half precision rounds otherwise."""
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    return [torch.cat(out.logits).float() for out in both(model, PROMPT, **options)]


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "write", [write_all, write_a_part, write_one_value, write_by_a_view, write_elsewhere, swap_rows],
    ids=lambda write: write.__name__,
)  # fmt: skip
def test_weights_written_to_without_a_trace(write, dtype):
    model, _ = speculating(dtype)
    before = logits_of(model)[1]
    versions = [parameter._version for parameter in model.parameters()]
    write(model)
    assert [parameter._version for parameter in model.parameters()] == versions
    expected, answer = logits_of(model)
    assert gap(answer, expected) < (1e-5 if dtype == torch.float32 else 0.08)
    assert gap(before, expected) > 0.2


def test_weights_lie_in_memory_once():
    model, fast = speculating(torch.bfloat16)
    answers(model)
    ours = {p.data_ptr() for p in fast._wrapped[1].target.model.parameters()}
    assert ours == {p.data_ptr() for p in model.parameters()}


def test_other_dtypes():
    model, _ = speculating()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        expected, answer = answers(model.to(dtype))
        assert torch.equal(answer, expected)


def test_generation_config_is_read_at_each_call():
    model, _ = speculating()
    long = answers(model)[1]
    model.generation_config.eos_token_id = int(long[0, 9])
    expected, answer = answers(model)
    assert torch.equal(answer, expected)
    assert answer.shape[1] < long.shape[1]
    model.generation_config.suppress_tokens = [int(long[0, 7])]
    expected, answer = answers(model)
    assert torch.equal(answer, expected)
    assert int(long[0, 7]) not in answer[0, 6:]


def test_an_unchanged_model_is_wrapped_once():
    model, fast = speculating()
    answers(model)
    wrapped = fast._wrapped[1]
    model(PROMPT, output_hidden_states=True)  # transformers leaves hooks of its own
    answers(model)
    model.generation_config.max_new_tokens = 3
    settled = fast._wrapped[1]
    answers(model)
    assert fast._wrapped[1] is settled
    model.model.layers[0].mlp = Wrapped(model.model.layers[0].mlp)
    answers(model)
    assert fast._wrapped[1] not in (wrapped, settled)


def steer(module, inputs, output):
    return (output[0] + 5.0, *output[1:]) if isinstance(output, tuple) else output + 5.0


class Counter:
    def __call__(self, module, inputs, output):
        pass


def hook_on_a_layer(model):
    return model.model.layers[1].register_forward_hook(steer)


def hook_on_the_head(model):
    return model.lm_head.register_forward_hook(Counter())


def hook_on_a_linear(model):
    return model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *arguments: None)


def hook_with_kwargs(model):
    return model.model.layers[0].self_attn.register_forward_hook(
        lambda module, inputs, kwargs, output: None, with_kwargs=True
    )


def always_called(model):
    return model.model.norm.register_forward_hook(steer, always_call=True)


def pre_hook(model):
    return model.model.layers[2].register_forward_pre_hook(lambda module, inputs: inputs)


def pre_hook_on_the_model(model):
    return model.register_forward_pre_hook(lambda module, inputs, kwargs: None, with_kwargs=True)


def global_hook(model):
    return register_module_forward_hook(steer)


def global_pre_hook(model):
    return register_module_forward_pre_hook(lambda module, inputs: None)


class Undone:
    def __init__(self, remove):
        self.remove = remove


def replaced_forward(model):
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + 5
    return Undone(lambda: vars(mlp).pop("forward"))


def replaced_method(model):
    norm = model.model.norm
    norm.forward = MethodType(lambda self, x: x, norm)
    return Undone(lambda: vars(norm).pop("forward"))


def replaced_inputs(model):
    model.prepare_inputs_for_generation = lambda *arguments, **options: {}
    return Undone(lambda: vars(model).pop("prepare_inputs_for_generation"))


def accelerate_hook(model):
    mlp = model.model.layers[1].mlp
    add_hook_to_module(mlp, ModelHook())
    return Undone(lambda: remove_hook_from_module(mlp))


def offloading_hook(model):
    mlp = model.model.layers[1].mlp
    add_hook_to_module(mlp, AlignDevicesHook("cpu", offload=True, weights_map=mlp.state_dict()))
    return Undone(lambda: remove_hook_from_module(mlp))


def compiled_module(model):
    layer = model.model.layers[1]
    model.model.layers[1] = torch.compile(layer, backend="eager")
    return Undone(lambda: model.model.layers.__setitem__(1, layer))


def training_attention(model):
    model.model.layers[1].self_attn.attention_dropout = 0.1
    model.model.layers[1].self_attn.train()
    return Undone(model.eval)


def training_dropout(model):
    norm = model.model.norm
    model.model.norm = nn.Sequential(norm, nn.Dropout(0.2))
    return Undone(lambda: setattr(model.model, "norm", norm))


class Noise(nn.Module):
    def forward(self, x):
        return x + 5 if self.training else x


def differs_in_training(model):
    norm = model.model.norm
    model.model.norm = nn.Sequential(norm, Noise())
    return Undone(lambda: setattr(model.model, "norm", norm))


def training_model(model):
    model.train()
    return Undone(model.eval)


def own_attention(model):
    AttentionInterface.register("ablated", lambda *arguments, **options: sdpa_attention_forward(*arguments, **options))
    model.set_attn_implementation("ablated")
    return Undone(lambda: model.set_attn_implementation("sdpa"))


class LastOnly(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, :-1], 1.2 * x[:, -1:]], dim=1)  # little enough for the first test of a family


def looks_at_the_last_token_alone(model):
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = nn.Sequential(mlp, LastOnly())
    return Undone(lambda: setattr(model.model.layers[1], "mlp", mlp))


REFUSED = {
    hook_on_a_layer: r"the forward hook .* on model\.layers\.1\) can't be drafted for; take it out",
    hook_on_the_head: "the forward hook .* on lm_head",
    hook_on_a_linear: r"the forward hook .* on model\.layers\.1\.mlp\.up_proj",
    hook_with_kwargs: r"on model\.layers\.0\.self_attn",
    always_called: r"the forward hook .* on model\.norm",
    pre_hook: r"the forward pre-hook .* on model\.layers\.2",
    pre_hook_on_the_model: "the forward pre-hook .* on LlamaForCausalLM",
    global_hook: "the forward hook .* on all modules",
    global_pre_hook: "the forward pre-hook .* on all modules",
    replaced_forward: r"the replaced forward of model\.layers\.1\.mlp",
    replaced_method: r"the replaced forward of model\.norm",
    replaced_inputs: "the replaced prepare_inputs_for_generation of LlamaForCausalLM",
    accelerate_hook: r"the replaced forward of model\.layers\.1\.mlp",
    offloading_hook: r"the replaced forward of model\.layers\.1\.mlp",
    compiled_module: r"the replaced forward of model\.layers\.1",
    training_attention: r"model\.layers\.1\.self_attn in training mode can't be drafted for; call model\.eval\(\)",
    training_dropout: r"model\.norm\.1 in training mode can't be drafted for; call model\.eval\(\)",
    training_model: r"a model in training mode can't be drafted for; call model\.eval\(\)",
    differs_in_training: "other logits than the model itself",
    own_attention: "attention 'ablated'",
    looks_at_the_last_token_alone: "other hidden states here than in the model itself",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_code_put_into_a_model_is_refused_until_it_is_taken_out(change):
    model, _ = speculating()
    first = answers(model)[1]
    handle = change(model)
    try:
        with pytest.raises(BeagleError, match=REFUSED[change]) as refused:
            model.generate(PROMPT, max_new_tokens=12)
        assert "\n" not in str(refused.value)
        with pytest.raises(BeagleError, match=REFUSED[change]):
            beagle.speculate(model, "lookup", plan=PLAN)
    finally:
        handle.remove()
    expected, answer = answers(model)
    assert torch.equal(answer, expected)
    assert torch.equal(answer, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hooks_that_were_there_before_are_refused(dtype):
    model = tiny_model().to(dtype)
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(steer)
    with pytest.raises(BeagleError, match="the forward hook steer"):
        beagle.speculate(model, "lookup", plan=PLAN)
    hook.remove()
    beagle.speculate(model, "lookup", plan=PLAN)
    expected, answer = logits_of(model)
    assert gap(answer, expected) < 0.03


def test_a_generate_of_the_models_own_is_refused():
    model = tiny_model()
    model.generate = lambda *arguments, **options: None
    with pytest.raises(BeagleError, match="the replaced generate of LlamaForCausalLM"):
        beagle.speculate(model, "lookup", plan=PLAN)


@pytest.mark.slow
def test_what_changes_no_answer_is_taken():
    """Hooks of transformers' own, accelerate's that move inputs, compiled forwards."""
    model, _ = speculating()
    first = answers(model)[1]
    model.enable_input_require_grads()
    add_hook_to_module(model.model.layers[0], AlignDevicesHook("cpu"))
    add_hook_to_module(model.model.layers[1], ModelHook())
    remove_hook_from_module(model.model.layers[1])
    model.model.layers[2].forward = torch.compile(model.model.layers[2].forward, backend="eager")
    model.model.layers[1].mlp.compile(backend="eager")
    model(PROMPT, output_hidden_states=True)
    expected, answer = answers(model)
    assert torch.equal(answer, expected)
    assert torch.equal(answer, first)


def test_parts_that_cannot_be_copied_are_refused():
    model, _ = speculating()
    model.model.layers[0].source = (number for number in range(3))
    with pytest.raises(BeagleError, match="can't be copied"):
        model.generate(PROMPT, max_new_tokens=3)


def test_examples_need_public_names_alone():
    for example in (Path(__file__).parent.parent / "examples").glob("*.py"):
        names = [
            node for node in ast.walk(ast.parse(example.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        modules = [getattr(node, "module", None) or node.names[0].name for node in names]
        assert "beagle" in modules
        assert not [module for module in modules if module.startswith("beagle.")]
