"""The wrapped target against transformers itself: trees, compaction, ragged batches, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from beagle.errors import BeagleError
from beagle.targets.family import refuse_unsupported
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import FAMILIES, tiny_model, tiny_target, tiny_tokenizer

CONTEXT = [5, 9, 33, 12, 60, 41, 7, 7, 28, 50, 19]  # longer than every sliding window of FAMILIES
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6, 5, 0]
TOKENS = [10, 11, 12, 13, 14, 15, 16, 17, 18, 11]


def path_to(node: int, parents: list[int]) -> list[int]:
    """Nodes from the root to ``node``."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@torch.no_grad()
def reference(model, ids: list[int]) -> torch.Tensor:
    """Logits of the last token by transformers' own eager attention, no cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_gives_each_path_its_own_logits(family):
    model, target = tiny_model(family), tiny_target(family)
    cache = target.new_cache(1, 64)
    prefilled = target.logits(target.prefill(torch.tensor([CONTEXT]), cache)[0])
    torch.testing.assert_close(prefilled[-1], reference(model, CONTEXT), atol=1e-4, rtol=1e-4)

    logits = target.logits(target.verify(cache, torch.tensor(TOKENS), TreeShape(PARENTS)))
    for node in range(len(PARENTS)):
        ids = CONTEXT + [TOKENS[i] for i in path_to(node, PARENTS)]
        torch.testing.assert_close(logits[node], reference(model, ids), atol=1e-4, rtol=1e-4)

    kept = path_to(7, PARENTS)  # 0 1 3 6 7: gaps, so keys have to move
    cache.compact(kept)
    assert cache.length == len(CONTEXT) + len(kept)
    context = CONTEXT + [TOKENS[i] for i in kept]
    parents = [-1, 0, 0, 2, 3, 4, 5]  # deep enough for a window to end inside the path
    again = target.logits(target.verify(cache, torch.tensor(range(20, 27)), TreeShape(parents)))
    for node in range(len(parents)):
        ids = context + [20 + i for i in path_to(node, parents)]
        torch.testing.assert_close(again[node], reference(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
def test_exact_form_agrees_with_the_ordinary_one(family):
    target = tiny_target(family)
    cache = target.new_cache(1, 64)
    target.prefill(torch.tensor([CONTEXT]), cache)
    tokens, shape = torch.tensor(TOKENS), TreeShape(PARENTS)
    plain = target.verify(cache, tokens, shape)
    exact = target.verify_exact(cache, tokens, shape, 64)
    torch.testing.assert_close(exact, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "phi"])
def test_sequences_that_share_passes_go_on_like_single_ones(family):
    target = tiny_target(family)
    prompts = [CONTEXT, CONTEXT[:3], CONTEXT[2:9]]
    cache = target.new_cache(3, 32)
    together = target.verify_trees(
        cache, torch.tensor([t for prompt in prompts for t in prompt]), [TreeShape.chain(len(p)) for p in prompts]
    ).split([len(p) for p in prompts])
    cache.lengths = [len(p) for p in prompts]
    owns = [target.new_cache(1, 32) for _ in prompts]
    for own, prompt, states in zip(owns, prompts, together, strict=True):
        alone = target.prefill(torch.tensor([prompt]), own)[0]
        torch.testing.assert_close(states, alone, atol=1e-4, rtol=1e-4)
    for tokens in ([20, 21, 22], [23, 24, 25], [26, 27, 28]):
        states = target.verify_trees(cache, torch.tensor(tokens), [TreeShape([-1])] * 3)
        cache.compact_sequences([[0]] * 3)
        for own, token, state in zip(owns, tokens, states, strict=True):
            alone = target.verify(own, torch.tensor([token]), TreeShape([-1]))[0]
            own.compact([0])
            torch.testing.assert_close(state, alone, atol=1e-4, rtol=1e-4)


def test_copied_row_goes_on_like_its_source():
    target = tiny_target("gemma3_text")
    source, cache = target.new_cache(1, 16), target.new_cache(2, 32)
    target.prefill(torch.tensor([CONTEXT]), source)
    cache.copy_sequence(1, source, 0)
    expected = target.verify(source, torch.tensor([20]), TreeShape([-1]))[0]
    states = target.verify_trees(cache, torch.tensor([3, 20]), [TreeShape([-1])] * 2)
    torch.testing.assert_close(states[1], expected, atol=1e-5, rtol=1e-5)


def test_tree_shape_knows_depths_and_ancestors():
    shape = TreeShape(PARENTS)
    assert shape.depths() == [len(path_to(i, PARENTS)) - 1 for i in range(len(PARENTS))]
    seen = shape.ancestors()
    for i in range(len(PARENTS)):
        assert set(seen[i].nonzero()[:, 0].tolist()) == set(path_to(i, PARENTS))


def test_encoder_decoders_are_refused():
    config = AutoConfig.for_model("t5")
    for refuse in (
        lambda: refuse_unsupported(config, "some-model"),
        lambda: Target(SimpleNamespace(config=config), None, "some-model"),
    ):
        with pytest.raises(BeagleError, match="encoder-decoder") as caught:
            refuse()
        assert str(caught.value).startswith("some-model: ")
        assert "choose a" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unusual_attention_is_refused():
    with pytest.raises(BeagleError):
        tiny_target("cpmant", dim_ff=48, dim_head=8)


def test_head_with_a_transform_is_refused_or_right():
    model = tiny_model("bert", is_decoder=True)
    try:
        target = Target(tiny_model("bert", is_decoder=True), tiny_tokenizer(), "bert")
    except BeagleError:
        return
    states = target.prefill(torch.tensor([CONTEXT]), target.new_cache(1, 16))[0]
    torch.testing.assert_close(target.logits(states[-1]), reference(model, CONTEXT), atol=1e-4, rtol=1e-4)


def test_eos_ids_come_from_the_generation_config_first():
    model = tiny_model()
    model.generation_config.eos_token_id = [2, 7]
    assert Target(model, tiny_tokenizer(), "x").eos_ids == {2, 7}
