"""A whole pass by C++ of ours: the states of the eager pass, of the families that it knows."""

import shutil

import pytest
import torch

from beagle.evaluation.breakdown import breakdown
from beagle.targets import loading, native
from beagle.targets.linears import tiled
from beagle.targets.linears.quantized import dequantized
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++")), reason="there is no C++ compiler"),
    pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX-512 BF16"),
]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
TREES = {
    "token": TreeShape([-1]),
    "tree": TreeShape([-1, 0, 0, 1, 1, 2, 3]),
    "chain": TreeShape.chain(20),
}


@pytest.fixture(scope="module")
def folder(kernel_folder):
    assert native.build(kernel_folder) is None
    return kernel_folder


@pytest.fixture(autouse=True)
def kernel(folder):
    assert tiled.load(folder)


def model(family, **options):
    options = {"sliding_window": None, "num_hidden_layers": 3} | SHAPE | options
    if family in ("llama", "qwen3"):
        options.pop("sliding_window")
    torch.manual_seed(0)
    made = tiny_model(family, **options).bfloat16()
    for name, parameter in made.named_parameters():
        if "norm" in name or "bias" in name:  # else all ones or zeros
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return made


def three(folder, family, quantize=None, layers=(), **options):
    """The same target natively, eagerly, and in fp32 with the same weights."""
    found = native.find(folder, model(family, **options), quantize, layers)
    whole = model(family, **options).float()
    for linear in whole.model.modules():
        if quantize and isinstance(linear, torch.nn.Linear):
            linear.weight.data = dequantized(linear.weight.data.bfloat16(), quantize)
    kinds = (quantize, quantize, None)
    models = (model(family, **options), model(family, **options), whole)
    fast, eager, right = (
        Target(made, tiny_tokenizer(), f"tiny-{family}", kind, state_layers=layers)
        for made, kind in zip(models, kinds, strict=True)
    )
    assert found is not None
    assert native.suits(fast.layers)
    fast.use(found)  # compares
    return fast, eager, right


def cache_of(target, context):
    ids = torch.randint(1, target.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    cache = target.new_cache(1, context + 64)
    target.prefill(ids, cache)
    return cache


def states_of(target, shape, context=200):
    cache = cache_of(target, context)
    return target.verify(cache, torch.arange(3, 3 + len(shape.parents)), shape).float(), cache


def gap(ours, right):
    return float((ours - right).norm() / right.norm())


@pytest.mark.parametrize("shape", TREES.values(), ids=TREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_its_states_are_right(folder, family, shape):
    fast, eager, right = three(folder, family)
    (ours, cache), (theirs, written), (expected, _) = (states_of(target, shape) for target in (fast, eager, right))
    assert gap(ours, expected) < 1.5 * gap(theirs, expected) < 0.06
    slots = slice(200, 200 + len(shape.parents))
    for one, other in zip(cache.tensors, written.tensors, strict=True):
        assert gap(one[:, :, slots].float(), other[:, :, slots].float()) < 0.03


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_its_quantised_states_are_right(folder, quantize):
    ours, theirs, expected = (states_of(target, TREES["tree"])[0] for target in three(folder, "qwen2", quantize))
    assert gap(ours, expected) < 1.5 * gap(theirs, expected) < 0.06


def test_outputs_of_other_layers_come_with_the_top_states(folder):
    ours, theirs, expected = (states_of(target, TREES["tree"])[0] for target in three(folder, "llama", layers=(1, 2)))
    assert ours.shape == (7, 3 * 128)
    for part, eager, right in zip(ours.split(128, 1), theirs.split(128, 1), expected.split(128, 1), strict=True):
        assert gap(part, right) < 1.5 * gap(eager, right) < 0.06


def test_embeddings_that_do_more_than_look_up_are_asked(folder):
    fast, _, _ = three(folder, "llama")
    usual, _ = states_of(fast, TREES["tree"])
    embed = fast.embed
    embed.register_forward_hook(lambda module, ids, rows: 2 * rows)
    assert native.table_of(embed) is None
    asked = fast.compiled.runner
    assert asked._table is not None
    asked._table = native.table_of(embed)
    others, _ = states_of(fast, TREES["tree"])
    embed._forward_hooks.clear()
    assert native.table_of(embed) is not None
    assert native.table_of(torch.nn.Embedding(8, 64)) is None  # not bf16
    assert native.table_of(torch.nn.Embedding(8, 64, max_norm=1.0).bfloat16()) is None
    asked._table = None
    same, _ = states_of(fast, TREES["tree"])
    assert torch.equal(same, usual)
    assert not torch.equal(others, usual)


def branching(nodes):
    """A tree with many paths, some of them long."""
    draw = torch.Generator().manual_seed(nodes)
    reach = [int(torch.randint(1, 5, (), generator=draw)) for _ in range(nodes)]
    return TreeShape([-1, *(max(0, node - reach[node]) for node in range(1, nodes))])


OVER_THE_END = (
    TreeShape([-1, 0, 0, 0, 1, 2, 1, 4, 6, 5, 7, 10, 11, 8, 12, 14, 15]),
    (3, 9, 13, 16),
)  # of a chunk of keys
MANY_PATHS = branching(60), range(7, 60, 4)  # more than have room in one block
STAR = TreeShape([-1] + [0] * 40), (1, 20, 40)  # more than have a place of their parity


@pytest.mark.parametrize(
    ("quantize", "tree"),
    [(None, OVER_THE_END), ("int8", OVER_THE_END), ("int4", OVER_THE_END), (None, MANY_PATHS), (None, STAR)],
)
@pytest.mark.parametrize("context", [5, 31, 120, 128, 200])
def test_a_token_of_a_tree_gets_the_bits_that_it_gets_alone(folder, quantize, tree, context):
    shape, leaves = tree
    fast, _, _ = three(folder, "qwen3", quantize)
    together, _ = states_of(fast, shape, context)
    depths = shape.depths()
    threads = torch.get_num_threads()
    try:
        for leaf in leaves:
            path = torch.where(shape.ancestors()[leaf])[0].tolist()
            cache = cache_of(fast, context)
            for node in path:
                torch.set_num_threads(1 + node % 3)
                alone = fast.verify(cache, torch.tensor([3 + node]), TREES["token"])
                cache.lengths = [context + depths[node] + 1]
                assert torch.equal(alone[0].float(), together[node])
    finally:
        torch.set_num_threads(threads)


def test_without_tile_registers_tokens_get_their_bits_too(folder, tmp_path):
    source = tmp_path / "pass.cpp"  # as on a CPU that has none
    source.write_text("#include <immintrin.h>\n#undef __AMX_BF16__\n" + native.SOURCE.read_text())
    assert native.library.build(tmp_path / "pass.so", source) is None
    fast, _, _ = three(folder, "qwen3")
    (shape, leaves), context = MANY_PATHS, 120
    usual, _ = states_of(fast, shape, context)
    plain = native.library.function(tmp_path / "pass.so", "beagle_pass")
    plain.argtypes, plain.restype = fast.compiled.runner._run.argtypes, None
    fast.compiled.runner._run = plain
    together, _ = states_of(fast, shape, context)
    assert gap(together, usual) < 0.02
    for leaf in leaves:
        cache = cache_of(fast, context)
        for node in torch.where(shape.ancestors()[leaf])[0].tolist():
            alone = fast.verify(cache, torch.tensor([3 + node]), TREES["token"])
            cache.lengths = [cache.lengths[0] + 1]
            assert torch.equal(alone[0].float(), together[node])


@pytest.mark.parametrize("context", [100, 120])
def test_a_token_that_is_no_number_spoils_its_own_path_alone(folder, context):
    fast, _, _ = three(folder, "llama")
    shape = TreeShape([-1, 0, 0, 1, 2, *range(4, 16)])  # two paths, one of them over the end of a chunk of keys
    fast.compiled.runner._table[4] = torch.nan  # node 1
    together, _ = states_of(fast, shape, context)
    assert together.isnan().any(1).nonzero().flatten().tolist() == [1, 3]
    cache = cache_of(fast, context)
    for node in (0, 2, *range(4, 17)):
        alone = fast.verify(cache, torch.tensor([3 + node]), TREES["token"])
        cache.lengths = [cache.lengths[0] + 1]
        assert torch.equal(alone[0].float(), together[node])


def test_exact_mode_takes_the_same_passes(folder):
    fast, _, _ = three(folder, "llama")
    cache, shape, tokens = cache_of(fast, 100), TREES["tree"], torch.arange(3, 10)
    expected = fast.verify(cache, tokens, shape)
    assert fast.min_exact_tokens <= 2
    fast.eager = None
    assert torch.equal(fast.verify_exact(cache, tokens, shape, 128), expected)
    assert torch.equal(fast.exact_logits(expected[:1]), fast.exact_logits(expected)[:1])


def test_a_tree_that_grows_level_by_level_gets_the_same_bits(folder):
    fast, _, _ = three(folder, "llama")
    shape = TREES["tree"]
    together, _ = states_of(fast, shape)
    cache = cache_of(fast, 200)
    parts = [
        fast.verify(cache, torch.arange(3 + done, 3 + n), TreeShape(shape.parents[:n]), done)
        for done, n in ((0, 3), (3, 7))
    ]
    assert torch.equal(torch.cat(parts).float(), together)


@pytest.mark.parametrize("context", [70, 103, 231])
def test_long_chains_run_over_the_end_of_a_chunk(folder, context):
    """Their first tokens see nothing of the second chunk: what they leave there must not lie before its memory."""
    fast, *_ = three(folder, "llama")
    cache, ids = cache_of(fast, context), torch.arange(3, 63)
    for n in (20, 40, 60):
        together = fast.verify(cache, ids[:n], TreeShape.chain(n))
    alone = []
    for i in range(60):
        alone.append(fast.verify(cache, ids[i : i + 1], TreeShape([-1])))
        cache.compact([0])
    assert torch.equal(torch.cat(alone), together)


def test_each_cache_is_read_and_written_in_turn(folder):
    fast, *_ = three(folder, "llama")
    contexts, shape = (20, 40), TREES["tree"]
    alone = [states_of(fast, shape, context)[0] for context in contexts]
    caches = [cache_of(fast, context) for context in contexts]
    for cache, expected in [*zip(caches, alone, strict=True)] * 2:
        assert torch.equal(fast.verify(cache, torch.arange(3, 10), shape).float(), expected)


def test_parts_of_a_pass_add_up(folder):
    fast, _, _ = three(folder, "llama")
    for parts in breakdown(fast, 40):
        whole = parts.pop("ms")
        assert 0 < parts.pop("rows") <= 16
        assert sum(parts.values()) == pytest.approx(whole, rel=0.5)  # medians of each
        assert all(
            parts[f"{name}_ms"] > 0 for name in ("products", "attention", "others", "waiting", "lm_head", "python")
        )


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {}),  # norms of another kind, soft caps
        ("granite", {}),  # the same modules, with multipliers
        ("llama", {"head_dim": 48}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
)
def test_other_models_are_left_to_graphs(folder, family, options):
    assert native.find(folder, tiny_model(family, **(SHAPE | options)).bfloat16(), None) is None


def test_other_dtypes_are_left_to_graphs(folder):
    assert native.find(folder, tiny_model("llama", **SHAPE), None) is None


def test_sliding_windows_are_left_to_graphs(folder):
    target = Target(model("mistral", sliding_window=8), tiny_tokenizer(), "tiny")
    assert not native.suits(target.layers)


def test_it_can_be_refused(folder, monkeypatch):
    monkeypatch.setenv("BEAGLE_COMPILED", "0")
    assert native.find(folder, model("llama"), None) is None


def test_the_command_has_nothing_to_compile(folder, beagle, monkeypatch):
    made = model("llama")
    monkeypatch.setattr(loading, "compiled_dir", lambda: folder)
    monkeypatch.setattr(loading, "load_model", lambda *given, **options: (made, tiny_tokenizer()))
    monkeypatch.setattr("beagle.targets.compiled.build", None)
    ended = beagle("compile", "-t", "tiny-llama", "--dtype", "bfloat16", "--draft", "none")
    assert ended.code == 0
    assert "computed by C++" in ended.err
