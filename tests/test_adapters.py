"""Adapters of peft and transformers: whatever is done to them, ``generate`` with drafts answers as without."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers.integrations import peft as integration

import beagle
from beagle.errors import BeagleError
from conftest import tiny_model
from speculating import PLAN, PROMPT

MLP = ["up_proj", "down_proj"]


def lora(seed=0, **options):
    """A configuration whose fresh adapters change answers."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": MLP, "task_type": TaskType.CAUSAL_LM, **options}
    return LoraConfig(init_lora_weights=False, **options)


def speculating(dtype=torch.float32):
    model = tiny_model().to(dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, beagle.speculate(model, "lookup", plan=PLAN)


def adapted(dtype=torch.float32, *, after=True, **options):
    """A model with two adapters, put on after ``speculate`` or before."""
    model = tiny_model().to(dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if after:
        beagle.speculate(model, "lookup", plan=PLAN)
    torch.manual_seed(1)
    adapters = get_peft_model(model, lora(**options))
    adapters.add_adapter("other", lora(**{**options, "target_modules": MLP}))
    if not after:
        beagle.speculate(adapters, "lookup", plan=PLAN)
    return model, adapters


def logits_of(model, options=None):
    out = model.generate(PROMPT, max_new_tokens=10, return_dict_in_generate=True, output_logits=True, **(options or {}))
    return torch.cat(out.logits).float()


def expect(model, base, tolerance=1e-4):
    """The logits of drafted answers, which are those without drafts.

    Args:
        model: that is asked. base: whose ``generate`` drafts.
    """
    answer = logits_of(model)
    drafting = base.__dict__.pop("generate")
    try:
        expected = logits_of(model)
    finally:
        base.__dict__["generate"] = drafting
    assert float((answer - expected).abs().max() / expected.abs().max()) < tolerance
    return answer


def differ(a, b):
    return float((a - b).abs().max() / b.abs().max()) > 0.01


@pytest.mark.parametrize("after", [True, False])
def test_adapters_are_set_disabled_and_enabled(after):
    model, adapters = adapted(after=after)
    first = expect(adapters, model)
    with adapters.disable_adapter():
        plain = expect(adapters, model)
    adapters.set_adapter("other")
    other = expect(adapters, model)
    adapters.set_adapter("default")
    assert torch.equal(expect(adapters, model), first)
    assert differ(first, plain)
    assert differ(other, plain)
    assert differ(other, first)


@pytest.mark.parametrize("after", [True, False])
def test_adapters_are_merged_and_taken_out_again(after):
    model, adapters = adapted(after=after)
    with adapters.disable_adapter():
        plain = expect(adapters, model)
    first = expect(adapters, model)
    adapters.merge_adapter()
    torch.testing.assert_close(expect(adapters, model), first, rtol=1e-3, atol=1e-3)
    adapters.unmerge_adapter()
    torch.testing.assert_close(expect(adapters, model), first, rtol=1e-3, atol=1e-3)
    assert differ(first, plain)


def test_a_merged_adapter_is_disabled():
    """peft takes it out of the weights when the model is next run; the caller's model must know of it."""
    model, adapters = adapted()
    first = logits_of(adapters)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapters.merge_adapter()
    logits_of(adapters)
    with adapters.disable_adapter():
        plain = logits_of(adapters)
        assert not model.model.layers[0].mlp.up_proj.merged
        expect(adapters, model)
    assert differ(first, plain)
    torch.testing.assert_close(expect(adapters, model), first, rtol=1e-3, atol=1e-3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=1e-4, atol=1e-5)


def test_adapters_are_merged_for_good():
    model, adapters = adapted()
    first = expect(adapters, model)
    merged = adapters.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(expect(model, model), first, rtol=1e-3, atol=1e-3)


def test_adapters_are_taken_off():
    model, _ = speculating()
    plain = expect(model, model)
    adapters = get_peft_model(model, lora())
    assert differ(expect(adapters, model), plain)
    assert adapters.unload() is model
    assert torch.equal(expect(model, model), plain)


def test_settings_and_weights_of_adapters():
    model, adapters = adapted()
    seen = [expect(adapters, model)]
    model.model.layers[1].mlp.up_proj.scaling["default"] = 40.0
    seen.append(expect(adapters, model))
    model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data.mul_(-3)
    seen.append(expect(adapters, model))
    adapters.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="linear")
    adapters.set_adapter("both")
    seen.append(expect(adapters, model))
    adapters.delete_adapter("both")
    adapters.set_adapter("other")
    seen.append(expect(adapters, model))
    assert all(differ(a, b) for a, b in pairwise(seen))


def test_adapters_of_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)  # 5.24 asks for one to come
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path)
    model, _ = speculating()
    plain = expect(model, model)
    model.load_adapter(str(tmp_path))
    first = expect(model, model)
    model.disable_adapters()
    assert torch.equal(expect(model, model), plain)
    model.enable_adapters()
    assert torch.equal(expect(model, model), first)
    model.add_adapter(lora(), adapter_name="second")
    model.set_adapter("second")
    second = expect(model, model)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(expect(model, model), first)
    assert differ(first, plain)
    assert differ(second, plain)
    assert differ(second, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(target_modules="all-linear"),
        lora(target_modules=[*MLP, "embed_tokens"]),
        lora(target_modules=["lm_head"]),
        lora(modules_to_save=["lm_head"]),
        lora(modules_to_save=["embed_tokens"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    ],
    ids=["dora", "all-linear", "embedding", "lm-head", "saved-lm-head", "saved-embedding", "ia3"],
)
def test_other_adapters(config, dtype):
    model, _ = speculating(dtype)
    plain = logits_of(model)
    adapters = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.mul_(3)
            if "modules_to_save" in name:
                parameter.mul_(-1)
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    ours = torch.cat(model.generate(PROMPT, **options).logits).float()
    theirs = torch.cat(type(model).generate(model, PROMPT, **options).logits).float()
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < (1e-4 if dtype == torch.float32 else 0.08)
    assert differ(ours, plain[:2])
    if dtype == torch.float32:
        expect(adapters, model)


def test_gradients_reach_adapters_after_a_drafted_answer():
    model, adapters = adapted(after=False)
    logits_of(adapters)
    adapters(input_ids=PROMPT).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.lora_A["default"].weight.grad is not None
    assert model.lm_head.weight.grad is None


def test_an_adapted_model_is_wrapped_once():
    model, fast = speculating()
    adapters = get_peft_model(model, lora())
    logits_of(adapters)
    wrapped = fast._wrapped[1]
    logits_of(adapters)
    assert fast._wrapped[1] is wrapped


def test_rows_with_adapters_of_their_own():
    model, adapters = adapted()
    adapters.eval()
    batch = PROMPT.repeat(3, 1)
    rows = adapters.generate(input_ids=batch, max_new_tokens=10, adapter_names=["default", "other", "__base__"])
    singly = [expect_tokens(adapters, name) for name in ("default", "other")]
    with adapters.disable_adapter():
        singly.append(adapters.generate(input_ids=PROMPT, max_new_tokens=10))
    assert torch.equal(rows, torch.cat(singly))
    assert not any(module._forward_pre_hooks for module in model.modules())


def expect_tokens(adapters, name):
    adapters.set_adapter(name)
    return adapters.generate(input_ids=PROMPT, max_new_tokens=10)


def refused(adapters, message, **options):
    with pytest.raises(BeagleError, match=message):
        adapters.generate(input_ids=PROMPT, max_new_tokens=4, **options)


def test_what_is_refused_of_adapters():
    model, adapters = adapted()
    hook = adapters.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].register_forward_hook(print)
    refused(adapters, r"the forward hook print on model\.layers\.0\.mlp\.up_proj\.lora_A\.default")
    hook.remove()
    expect(adapters, model)
    model, _ = speculating()
    prompts = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    refused(prompts, "the replaced prepare_inputs_for_generation")
    model, _ = speculating()
    refused(get_peft_model(model, lora(lora_dropout=0.1)).train(), r"call model\.eval\(\)")
