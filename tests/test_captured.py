"""Captured passes: replayed on fixed memory in fixed sizes, the same states as the eager pass.

A CUDA graph's place is taken by a trace to single operations, which as little as the graph asks Python anything again.
"""

import weakref
from itertools import zip_longest

import pytest
import torch

from beagle.drafters.base import TreePlan
from beagle.model import Model, Piece
from beagle.targets import captured, loading
from beagle.targets.captured import LEAST_KEYS, ROOMS, SIZES, Captured, key_size
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import Recorder, tiny_drafter, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

TREE = TreeShape([-1, 0, 0, 1, 1, 2, 4])
PROMPT = [1, *range(3, 15)]  # longer than the window
FAMILIES = ["llama", "gemma2"]  # of gemma2 one layer slides, both cap their scores


def eager(family: str) -> Target:
    return Target(tiny_model(family, num_hidden_layers=2, max_position_embeddings=1024), tiny_tokenizer(), family)


@pytest.fixture
def pair(request) -> tuple[Target, Target, Recorder]:
    """A target as it is, and one whose passes are recorded."""
    family = getattr(request, "param", "gemma2")
    fast, recorder = eager(family), Recorder()
    fast.use(Captured(fast.base, fast.hidden_size, fast.layers, recorder))
    return eager(family), fast, recorder


def states_of(target: Target, shape: TreeShape, context: int = len(PROMPT)) -> torch.Tensor:
    cache = target.new_cache(1, context + len(shape.parents) + 1)
    ids = torch.arange(context) % 20 + 1
    target.prefill(ids[None], cache)
    first = target.verify(cache, torch.arange(5, 5 + len(shape.parents)) % 20, shape)
    cache.compact([0])
    return torch.cat([first, target.verify(cache, torch.tensor([9]), TreeShape([-1]))])  # reads what was written


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
@pytest.mark.parametrize(
    ("shape", "context"),
    [
        (TreeShape([-1]), LEAST_KEYS - 3),
        (TREE, len(PROMPT)), (TREE, 2 * LEAST_KEYS + 5),
        (TreeShape.chain(65), len(PROMPT)), (TreeShape.chain(65), LEAST_KEYS - 3),
    ],
    ids=["root, grows", "tree", "tree, long", "most", "most, grows"],
)  # fmt: skip
def test_its_states_are_the_eager_ones(pair, shape, context):
    plain, fast, recorder = pair
    before = recorder.made
    assert torch.allclose(states_of(fast, shape, context), states_of(plain, shape, context), atol=1e-4)
    assert recorder.made > before


def test_padding_writes_over_nothing(pair):
    """A pass whose padding would still stand where the pass before it wrote."""

    def states(target: Target) -> torch.Tensor:
        cache = target.new_cache(1, 64)
        target.prefill(torch.tensor([PROMPT]), cache)
        target.verify(cache, torch.arange(5, 13), TreeShape.chain(8))
        cache.compact([0, 1, 2])
        return target.verify(cache, torch.arange(20, 25), TreeShape.chain(5))

    plain, fast, _ = pair
    assert torch.allclose(states(fast), states(plain), atol=1e-4)


def test_larger_trees_take_the_eager_pass(pair):
    plain, fast, recorder = pair
    shape, before = TreeShape.chain(SIZES[-1] + 1), recorder.made
    assert torch.allclose(states_of(fast, shape), states_of(plain, shape), atol=1e-4)
    assert recorder.made == before + 2  # of the prompt and of the token behind the tree


@pytest.mark.parametrize("draft", [False, True])
def test_answers_are_the_eager_ones_and_the_next_one_finds_its_graphs(pair, draft):
    plain, fast, recorder = pair
    texts = []
    for target in (plain, fast, fast):
        before = recorder.made
        model = Model(target, tiny_drafter(target), TreePlan(nodes=6, top_k=3, depth=3))
        texts.append([model.generate("w5 w9 w33", raw=True, max_new_tokens=40, draft=draft).token_ids for _ in "ab"])
    assert texts[0] == texts[1] == texts[2]
    assert recorder.made == before
    assert len(fast.compiled.runner._rooms) == 1


def test_answers_that_take_turns_have_memory_of_their_own(pair):
    plain, fast, _ = pair
    prompts = [f"w{5 + i} w9 w33" for i in range(ROOMS + 2)]  # the last ones take eager passes
    streams = [Model(fast).stream(prompt, raw=True, max_new_tokens=12) for prompt in prompts]
    found = [[] for _ in prompts]
    for pieces in zip_longest(*streams, fillvalue=Piece("")):  # in turn
        for ids, piece in zip(found, pieces, strict=True):
            ids += piece.token_ids
    assert len(fast.compiled.runner._rooms) == ROOMS
    assert found == [Model(plain).generate(prompt, raw=True, max_new_tokens=12).token_ids for prompt in prompts]


def test_a_free_room_that_is_too_small_makes_way(pair):
    _, fast, _ = pair
    caches = [fast.new_cache(1, 20) for _ in range(ROOMS)]
    assert fast.compiled.runner.new_cache(20) is None
    rooms = [weakref.ref(room) for room in fast.compiled.runner._rooms]
    caches.pop(2)
    larger = fast.new_cache(1, LEAST_KEYS + 1)
    assert larger.capacity == key_size(LEAST_KEYS + 1) == LEAST_KEYS * 3 // 2
    assert [room() is None for room in rooms] == [n == 2 for n in range(ROOMS)]
    assert all(cache.capacity == LEAST_KEYS for cache in caches)


def test_nothing_of_the_last_answer_is_left(pair):
    """A NaN behind a mask is a NaN."""
    _, fast, _ = pair
    cache = fast.new_cache(1, 20)
    for tensor in cache.tensors:
        tensor.fill_(torch.nan)
    del cache, tensor
    assert states_of(fast, TREE).isfinite().all()
    assert len(fast.compiled.runner._rooms) == 1


def test_a_size_that_cannot_be_recorded_runs_eagerly(pair):
    plain, fast, recorder = pair

    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    states_of(fast, TreeShape([-1]))
    fast.compiled.runner._record = full
    before = recorder.made
    assert torch.allclose(states_of(fast, TREE), states_of(plain, TREE), atol=1e-4)
    assert recorder.made == before
    assert fast.compiled.runner.failure == "CUDA out of memory"
    assert fast.compiled.runner._rooms[0].tenant() is None  # what went wrong holds no cache


def test_sizes_of_keys_waste_a_third_at_most():
    sizes = [key_size(n) for n in range(1, 5000)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * n + 1 for n, size in enumerate(sizes, 1) if n > LEAST_KEYS)
    assert len(set(sizes)) == 10


def test_a_family_that_cannot_be_captured_runs_as_before(monkeypatch, capsys):
    def fail(run):
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    monkeypatch.setattr(captured, "GraphRecorder", lambda device: fail)
    target = eager("llama")
    loading.capture_target(target)
    assert target.compiled is None
    said = " ".join(capsys.readouterr().err.split())
    assert "can't be captured as graphs (called a synchronizing CUDA operation)" in said
    assert torch.equal(states_of(target, TREE), states_of(eager("llama"), TREE))
