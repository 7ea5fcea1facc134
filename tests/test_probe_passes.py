"""What a first load costs: the passes in which a model of plain attention is compared with itself."""

from __future__ import annotations

from beagle.targets.target import Target
from conftest import tiny_model, tiny_tokenizer


def test_a_plain_model_is_proven_in_a_few_short_passes():
    model = tiny_model("llama")
    tokens: list[int] = []
    hooked: list[str] = []

    def count(module, args, kwargs):
        tokens.append(kwargs["input_ids"].shape[1])
        hooked.extend(name for name, part in module.named_modules() if part is not module and part._forward_hooks)

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    Target(model, tiny_tokenizer(), "tiny")
    # whether it asks a cache, what its layers see, its own states, its own logits; a prompt, four tokens, a tree, one more
    assert tokens == [2, 48, 48, 12, 39, 1, 1, 1, 1, 6, 1]
    assert not hooked  # which module is at work matters only where a cache is asked
