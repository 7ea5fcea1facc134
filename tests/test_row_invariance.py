"""A token's bits are the same in a pass of its own and in a chain, on a CPU in bf16: attention here, products elsewhere."""

from __future__ import annotations

import pytest
import torch

from beagle.targets.attention import attend_plan
from beagle.targets.cache import KVCache, LayerShape
from beagle.targets.plan import KEY_BLOCK, of_tree, of_trees
from beagle.targets.shape import TreeShape
from conftest import tiny_target

TOKENS, KV_HEADS, DIM = 16, 3, 64


def filled(context: int, slots: int) -> KVCache:
    cache = KVCache(
        [LayerShape(KV_HEADS, DIM, DIM)], batch=1, capacity=slots, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    for tensor in cache.tensors:
        tensor[:, :, : context + TOKENS] = torch.randn(
            1, KV_HEADS, context + TOKENS, DIM, generator=torch.Generator().manual_seed(context)
        ).bfloat16()
    cache.lengths = [context]
    return cache


def attended(cache, query, plan, window):
    keys, values = (tensor[:, :, : plan.keys] for tensor in cache.tensors)
    return attend_plan(plan, query, keys, values, DIM**-0.5, window, None, None)


@pytest.mark.parametrize("context", [3, 40, 250, 500])
@pytest.mark.parametrize("heads", [KV_HEADS, 3 * KV_HEADS])
@pytest.mark.parametrize("window", [None, 24])
def test_attention_of_a_chain_is_that_of_single_tokens(context, heads, window):
    cache = filled(context, 544)
    query = torch.randn(1, heads, TOKENS, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = attended(cache, query, of_tree(cache, TreeShape.chain(TOKENS), [window]), window)
    for i in range(TOKENS):
        cache.lengths = [context + i]
        alone = attended(cache, query[:, :, i : i + 1], of_tree(cache, TreeShape([-1]), [window]), window)
        assert torch.equal(together[:, :, i : i + 1], alone)


def test_trees_see_whole_blocks_of_slots_where_the_cache_has_them():
    cache = filled(20, 4 * KEY_BLOCK)
    assert of_tree(cache, TreeShape.chain(12), [None]).keys == KEY_BLOCK
    plan = of_tree(cache, TreeShape([-1, 0, 0, *range(2, 15)]), [None])
    assert plan.keys == 2 * KEY_BLOCK
    seen = plan.masks[None][0, 0] == 0
    assert seen[2].nonzero().flatten().tolist() == [*range(20), 20, 22]
    assert of_trees(cache, [TreeShape.chain(13)], [None]).keys == 2 * KEY_BLOCK
    assert of_tree(filled(20, 40), TreeShape.chain(13), [None]).keys == 40


def test_a_cache_has_whole_blocks():
    assert tiny_target().new_cache(2, 33).capacity == 2 * KEY_BLOCK
