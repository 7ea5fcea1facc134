"""The compiled pass: the same states as the eager one, for the very weights it was made of."""

import json
import shutil

import pytest
import torch

from beagle.decoding.costs import cached_costs
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets import aot_cache, compiled, loading
from beagle.targets.loading import cache_dir
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import tiny_drafter, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++")), reason="there is no C++ compiler"),
]
TREE = TreeShape([-1, 0, 0, 1, 1, 2, 4])
PROMPT = [1, *range(3, 15)]  # longer than the window


def model(**overrides):
    return tiny_model("gemma2", num_hidden_layers=2, **overrides)  # one layer slides, both cap their scores


def target_of(made) -> Target:
    return Target(made, tiny_tokenizer(), "tiny-gemma2")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    compiled.build(folder, model(), "tiny-gemma2", kinds=("tree", "exact", "trees"))
    return folder


@pytest.fixture
def fast(packages) -> Target:
    made = model()
    found = compiled.find(packages, made, None)
    assert found is not None
    target = target_of(made)
    target.use(found)
    return target


def states_of(target: Target, shape: TreeShape) -> torch.Tensor:
    cache = target.new_cache(1, 40)
    target.prefill(torch.tensor([PROMPT]), cache)
    first = target.verify(cache, torch.arange(5, 5 + len(shape.parents)), shape)
    cache.compact([0])
    return torch.cat([first, target.verify(cache, torch.tensor([9]), TreeShape([-1]))])  # reads what was written


@pytest.mark.parametrize("shape", [TreeShape([-1]), TREE, TreeShape.chain(20)], ids=["root", "tree", "chain"])
def test_its_states_are_the_eager_ones(fast, shape):
    assert torch.allclose(states_of(fast, shape), states_of(target_of(model()), shape), atol=1e-4)


def test_trees_run_in_it(fast, monkeypatch):
    monkeypatch.setattr(fast, "eager", None)  # the eager pass
    cache = fast.new_cache(1, 20)
    cache.lengths = [5]
    assert fast.verify(cache, torch.arange(5, 12), TREE).shape == (7, fast.hidden_size)


def rows_of(target: Target, shapes: list[TreeShape]) -> torch.Tensor:
    cache = target.new_cache(4, 60)
    prompts = [PROMPT, PROMPT[:2], PROMPT * 2, PROMPT[:5]]
    flat = torch.tensor([token for prompt in prompts for token in prompt])
    target.verify_trees(cache, flat, [TreeShape.chain(len(prompt)) for prompt in prompts])
    cache.lengths = [len(prompt) for prompt in prompts]
    counts = [len(shape.parents) for shape in shapes]
    first = target.verify_trees(cache, torch.arange(5, 5 + sum(counts)) % 29, shapes)
    cache.compact_sequences([[0]] * len(shapes))
    return torch.cat(
        [first, target.verify_trees(cache, torch.arange(9, 9 + len(shapes)), [TreeShape([-1])] * len(shapes))]
    )


@pytest.mark.parametrize(
    "shapes",
    [[TREE], [TreeShape([-1])] * 4, [TREE, TreeShape([-1]), TreeShape.chain(20)]],
    ids=["one row", "roots", "three of four rows"],
)
def test_states_of_rows_are_the_eager_ones(fast, shapes, monkeypatch):
    expected = rows_of(target_of(model()), shapes)
    rows_of(fast, shapes)  # compares itself with the eager pass
    monkeypatch.setattr(fast, "eager", None)
    assert torch.allclose(rows_of(fast, shapes), expected, atol=1e-4)


def test_prompts_longer_than_a_tree_are_eager(fast, monkeypatch):
    monkeypatch.setitem(fast.compiled.runner._graphs, "trees", None)
    ids = torch.arange(66) % 29
    eager = target_of(model())
    assert torch.equal(
        fast.verify_trees(fast.new_cache(3, 80), ids, [TreeShape.chain(66)]),
        eager.verify_trees(eager.new_cache(3, 80), ids, [TreeShape.chain(66)]),
    )


def test_short_prompts_and_later_sequences_are_the_eager_ones(fast):
    ids, eager = torch.arange(20) % 29, target_of(model())
    for count in (1, 2):  # behind the first of three sequences
        tokens, chains = ids.repeat(count), [TreeShape.chain(20)] * count
        found = fast.verify_trees(fast.new_cache(3, 80), tokens, chains, first=1)
        expected = eager.verify_trees(eager.new_cache(3, 80), tokens, chains, first=1)
        assert torch.allclose(found, expected, atol=1e-4)
    found, expected = (target.prefill(ids[None], target.new_cache(1, 24)) for target in (fast, eager))
    assert torch.allclose(found, expected, atol=1e-4)


def break_graph(target: Target, kind: str, monkeypatch) -> None:
    runner = target.compiled.runner
    run = compiled.aot_cache.load(runner._package / compiled.FILES[kind])
    monkeypatch.setitem(runner._graphs, kind, lambda inputs: [states + 1.0 for states in run(inputs)])


def test_another_models_pass_over_rows_is_refused(fast, monkeypatch):
    break_graph(fast, "trees", monkeypatch)
    with pytest.raises(BeagleError, match="computes something else"):
        Model(fast).generate_batch([PROMPT, PROMPT[:4]], max_new_tokens=2)


def test_grouped_heads_without_a_cap_and_states_of_several_layers(tmp_path):
    """They take the fused attention, for whose sake heads of a group become rows."""
    layers = (1,)
    compiled.build(
        tmp_path, tiny_model("llama", num_hidden_layers=2), "tiny-llama", kinds=("tree", "trees"), state_layers=layers
    )
    target, eager = (
        Target(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), "tiny-llama", state_layers=layers)
        for _ in range(2)
    )
    assert compiled.find(tmp_path, tiny_model("llama", num_hidden_layers=2), None) is None  # its states are narrower
    found = compiled.find(tmp_path, tiny_model("llama", num_hidden_layers=2), None, layers)
    assert found is not None
    target.use(found)
    assert torch.allclose(states_of(target, TREE), states_of(eager, TREE), atol=1e-4)
    for shapes in ([TREE, TreeShape([-1]), TreeShape.chain(9)], [TreeShape([-1])]):
        assert torch.allclose(rows_of(target, shapes), rows_of(eager, shapes), atol=1e-4)
    (alone,) = Model(target).generate_batch([PROMPT], max_new_tokens=12)
    assert alone.token_ids == Model(eager).generate(PROMPT, max_new_tokens=12).token_ids


def test_what_is_there_already_stays(packages, tmp_path, monkeypatch):
    folder = tmp_path / "compiled"
    shutil.copytree(packages, folder)
    (place,) = folder.iterdir()
    (place / compiled.FILES["trees"]).unlink()
    kept = {name: (place / name).stat().st_mtime_ns for name in (compiled.FILES["tree"], compiled.FILES["exact"])}
    made = []
    monkeypatch.setattr(compiled, "_export", lambda *given: made.append(given[3].name) or given[3].write_bytes(b""))
    compiled.build(folder, model(), "tiny-gemma2", kinds=("tree", "trees"))
    assert made == [compiled.FILES["trees"]]
    assert {name: (place / name).stat().st_mtime_ns for name in kept} == kept


def test_batched_answers_equal_plain_ones(fast):
    prompts = [PROMPT, PROMPT[:3], PROMPT[4:], PROMPT[:7]]
    plain = Model(target_of(model()))
    expected = [plain.generate(prompt, max_new_tokens=24).token_ids for prompt in prompts]
    drafted = Model(fast, tiny_drafter(fast, scale=15.0), TreePlan("dynamic", 4, 4, 12))
    assert [answer.token_ids for answer in drafted.generate_batch(prompts, max_new_tokens=24, rows=3)] == expected
    assert [answer.token_ids for answer in Model(fast).generate_batch(prompts, max_new_tokens=24, rows=3)] == expected


def test_drafted_answers_equal_plain_ones(fast):
    plain = Model(target_of(model())).generate(PROMPT, max_new_tokens=40)
    drafted = Model(fast, tiny_drafter(fast, scale=15.0), TreePlan("dynamic", 4, 4, 12)).generate(
        PROMPT, max_new_tokens=40
    )
    assert drafted.token_ids == plain.token_ids
    assert Model(fast).generate(PROMPT, max_new_tokens=40).token_ids == plain.token_ids


def test_exact_answers_are_bitwise_plain_ones(fast, monkeypatch):
    eager = states_of(target_of(model()), TREE)
    cache = fast.new_cache(1, 96)
    fast.prefill(torch.tensor([PROMPT]), cache)
    assert fast.min_exact_tokens >= 2
    monkeypatch.setattr(fast, "eager", None)  # the eager pass
    tokens = torch.arange(5, 5 + len(TREE.parents))
    states = fast.verify_exact(cache, tokens, TREE, 64)
    assert torch.allclose(states, eager[:-1], atol=1e-4)
    path = [0, 1, 4, 6]
    alone = []
    for node in path:
        alone.append(fast.verify_exact(cache, tokens[[node]], TreeShape([-1]), 64)[0])
        cache.compact([0])
    assert torch.equal(states[path], torch.stack(alone))


def test_another_models_exact_pass_is_refused(fast, monkeypatch):
    break_graph(fast, "exact", monkeypatch)
    with pytest.raises(BeagleError, match="computes something else"):
        Model(fast).generate(PROMPT, max_new_tokens=2, exact=True)
    assert fast.compiled is not None


def test_exact_drafted_answers_equal_exact_plain_ones(fast):
    plain = Model(fast).generate(PROMPT, max_new_tokens=40, exact=True)
    drafter = tiny_drafter(fast, scale=15.0)
    drafted = Model(fast, drafter, TreePlan("dynamic", 4, 4, 12)).generate(PROMPT, max_new_tokens=40, exact=True)
    assert drafted.token_ids == plain.token_ids


def test_other_weights_have_none(packages):
    made = model()
    made.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert compiled.find(packages, made, None) is None
    assert compiled.find(packages, model(num_key_value_heads=4), None) is None
    assert compiled.find(packages, model(), "int8") is None


def test_another_models_pass_is_refused(fast):
    other = target_of(model(seed=1))
    with pytest.raises(BeagleError, match="computes something else"):
        other.use(fast.compiled.runner)
    assert other.compiled is None


def test_it_can_be_left_aside(packages, monkeypatch):
    monkeypatch.setenv("BEAGLE_COMPILED", "0")
    assert compiled.find(packages, model(), None) is None


def test_the_command_leaves_what_is_compiled(packages, beagle, monkeypatch):
    monkeypatch.setattr(loading, "compiled_dir", lambda: packages)
    monkeypatch.setattr(loading, "load_model", lambda *arguments, **options: (model(), tiny_tokenizer()))
    monkeypatch.setattr(compiled, "build", None)
    ended = beagle("compile", "-t", "tiny-gemma2", "--dtype", "float32", "--exact", "--draft", "none")
    assert ended.code == 0, ended.err
    assert "compiled already" in ended.err
    assert "beagle profile" in ended.err


def test_the_command_needs_leave(beagle, monkeypatch):
    monkeypatch.setenv("BEAGLE_COMPILED", "0")
    monkeypatch.setattr(loading, "load_model", None)
    beagle("compile").refusal("BEAGLE_COMPILED=0")


def test_the_command_refuses_a_kind_before_it_works(beagle, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    beagle("compile", "--quantize", "int3").refusal("int3", "int8 or int4")


def test_a_broken_package_is_named(packages, tmp_path):
    (place,) = packages.iterdir()
    broken = tmp_path / place.name
    shutil.copytree(place, broken)
    (broken / "pass.so").write_bytes(b"nothing")
    made = model()
    found = compiled.find(tmp_path, made, None)
    with pytest.raises(BeagleError, match="delete the folder"):
        Target(made, tiny_tokenizer(), "tiny-gemma2").use(found)


def test_its_costs_are_its_own(fast):
    drafter = tiny_drafter(fast)
    cached_costs(fast, drafter, TreePlan())
    fast.compiled = None
    cached_costs(fast, drafter, TreePlan())
    assert len(json.loads((cache_dir() / "costs.json").read_text())) == 2


def test_what_cannot_be_traced_is_refused(tmp_path, monkeypatch):
    made = model()
    monkeypatch.setattr(made.model, "forward", lambda **kwargs: [kwargs["inputs_embeds"].numpy()])
    with pytest.raises(BeagleError, match="can't be compiled here"):
        compiled._export(
            compiled.Graph(made.model, "tree", [None]), made.get_input_embeddings(), [], tmp_path / "p", "tiny"
        )


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(BeagleError, match="free space or set BEAGLE_CACHE"),
        aot_cache.writing(tmp_path / "file" / "p", {}),
    ):
        pass
