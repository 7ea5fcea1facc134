"""A whole draft by C++ of ours: the drafts that the same head makes eagerly with the same weights."""

import math
import shutil

import pytest
import torch

from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.drafters import native
from beagle.drafters.base import TreePlan
from beagle.drafters.head_drafter import HeadDrafter
from beagle.targets.linears import tiled
from beagle.targets.linears.quantized import dequantized
from beagle.targets.target import Target
from conftest import tiny_head, tiny_model, tiny_tokenizer
from drafting import One, paths

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++")), reason="there is no C++ compiler"),
    pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX-512 BF16"),
]
TOKENS = list(range(3, 40))  # all of them in the draft vocabulary
OTHERS = [50, 58, 61]  # that are not
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
PLANS = {
    "dynamic": TreePlan("dynamic", 4, 4, 20),
    "wide": TreePlan("dynamic", 3, 11, 60),
    "chain": TreePlan("chain", 4),
}
CASES = {
    "two blocks": {"kv_layers": (1, 2), "blocks": 2},
    "one block": {"intermediate_size": 320},
    "the paper's": {"newest_state": "none", "token_in_mlp": False},
    "shared keys": {"num_heads": 4, "num_kv_heads": 2, "blocks": 2},
    "wide heads": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 128},
}


@pytest.fixture(scope="module")
def folder(kernel_folder):
    assert native.build(kernel_folder) is None
    return kernel_folder


@pytest.fixture(autouse=True)
def kernel(folder):
    assert tiled.load(folder)


def case(name: str, dtype: torch.dtype = torch.bfloat16, **more):
    """A target, and how to make the head anew: a drafter packs its own."""
    overrides = {"draft_vocab_size": 48, **CASES[name], **more}
    layers = overrides.get("kv_layers", ())
    target = Target(tiny_model("llama", **SHAPE).to(dtype), tiny_tokenizer(), "tiny-llama", state_layers=layers)
    return target, lambda: tiny_head(target, scale=4.0, **overrides)


def exact_one(name: str, tokens=range(48)) -> One:
    """An eager drafter in fp32 with the weights as int8 has them."""
    target, head = case(name, torch.float32, draft_vocab_size=len(tokens))
    rounded = head()
    rounded.draft_vocab.copy_(torch.tensor(tokens))
    for module in (*rounded.modules(), target.model.lm_head):
        if isinstance(module, torch.nn.Linear):
            module.weight.data = dequantized(module.weight.data.bfloat16(), "int8")
    return One(HeadDrafter(target, rounded))


def library_of(folder):
    return native.functions(native.library.path(folder, "draft", native.SOURCE))


@pytest.fixture(params=list(CASES))
def both(request, kernel, folder) -> tuple[One, One]:
    """An exact drafter and the native one."""
    target, head = case(request.param)
    own = head()
    found = native.find(folder, target, own)
    assert found is not None
    fast = HeadDrafter(target, own)
    fast.use(found, "native")
    return exact_one(request.param), One(fast)


def states(drafter: One, n: int) -> torch.Tensor:
    drawn = torch.randn(n, drafter.head.config.state_size, generator=torch.Generator().manual_seed(n))
    return drawn.bfloat16().to(drafter.rotations.dtype)


def begin(drafter: One) -> None:
    drafter.begin(TOKENS, states(drafter, len(TOKENS)))


def same(fast, eager, share: float = 0.9) -> None:
    """The same candidates but for those that are about as likely as others, which decides narrow trees' further way."""
    ours, theirs = paths(fast), paths(eager)
    both = ours.keys() & theirs.keys()
    assert len(both) >= share * len(theirs)
    assert [ours[path] for path in both] == pytest.approx([theirs[path] for path in both], abs=0.1)
    assert fast.scores[:1] == pytest.approx(eager.scores[:1], abs=0.1)


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("least", [0.0, 0.2])
def test_its_drafts_are_the_eager_ones(both, plan, least):
    for drafter in both:
        begin(drafter)
    eager, fast = both
    share = 0.9 if plan.top_k == 11 else 0.0
    same(fast.draft(12, plan, least), eager.draft(12, plan, least), share)  # with nothing unread
    for unread in (1, 2, 5, 70):  # 70 are read before; what a draft leaves behind is written over
        for drafter in both:
            drafter.extend([12 + i % 20 for i in range(unread)], states(drafter, unread))
        same(fast.draft(14, plan, least), eager.draft(14, plan, least), share)


def test_keys_that_it_remembers_change_no_draft(folder):
    found = []
    for forgetful in (False, True):
        one = native_one(library_of(folder))
        whole = one.drafter.whole
        for step in range(12):  # over the end of a block of keys
            if forgetful:
                whole._memories.clear()
            found.append(one.draft(12, PLANS["wide"]))
            one.extend([12 + step] * 5, states(one, 5))
    half = len(found) // 2
    assert [(d.tokens, d.parents, d.scores) for d in found[:half]] == [
        (d.tokens, d.parents, d.scores) for d in found[half:]
    ]


def test_its_drafts_know_the_sampler_s_noise(both):
    found = []
    for drafter in both:
        begin(drafter)
        drafter.context.noise = Sampler(SamplingParams(temperature=1.0, seed=3)).noise(len(TOKENS))
        found.append(drafter.draft(12, PLANS["wide"]))
        drafter.context.noise = None
        assert drafter.draft(12, PLANS["wide"]).tokens != found[-1].tokens
    same(found[1], found[0])


def test_tokens_of_the_answer_may_be_drafted_though_the_head_lacks_them(both):
    fast, plan = both[1], TreePlan("dynamic", 1, 60)
    begin(fast)
    assert {*fast.draft(12, plan).tokens} == {*range(48)}
    for count in (2, 3):  # in the prompt, say, then in the answer
        fast.extend([OTHERS[count - 2], OTHERS[count - 1], 12], states(fast, 3))
        drafted = fast.draft(12, plan)
        assert {*drafted.tokens} == {*range(48), *OTHERS[:count]}
        assert sum(map(math.exp, drafted.scores)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("noisy", [False, True])
def test_with_them_it_drafts_as_a_head_that_has_them(folder, noisy):
    fast, eager = native_one(library_of(folder)), exact_one("two blocks", [*range(48), *OTHERS])
    found = []
    for drafter in (fast, eager):
        drafter.begin([*TOKENS, *OTHERS], states(drafter, 40))
        if noisy:
            drafter.context.noise = Sampler(SamplingParams(temperature=1.0, seed=3)).noise(40)
        found.append(drafter.draft(12, TreePlan("dynamic", 3, 51)))
    same(*found)
    assert any(token in OTHERS for path in paths(found[0]) for token in path[:-1]), "none of them was expanded"


def test_many_tokens_of_an_answer_push_out_the_oldest(both, monkeypatch):
    fast = both[1]
    monkeypatch.setattr(native, "MOST_OWN", 2)
    begin(fast)
    fast.extend(OTHERS, states(fast, 3))
    assert {*fast.draft(12, TreePlan("dynamic", 1, 60)).tokens} == {*range(48), *OTHERS[1:]}


def test_without_tile_registers_it_drafts_the_same(folder, tmp_path):
    source = tmp_path / "draft.cpp"  # as on a CPU that has none
    source.write_text("#include <immintrin.h>\n#undef __AMX_BF16__\n" + native.SOURCE.read_text())
    path = tmp_path / "draft.so"
    assert native.library.build(path, source) is None
    found = []
    for draft in (library_of(folder), native.functions(path)):
        drafter = native_one(draft)
        found.append(drafter.draft(12, PLANS["wide"]))
    same(*found)


def native_one(draft) -> One:
    """With a prompt."""
    target, head = case("two blocks")
    drafter = HeadDrafter(target, head())
    drafter.use(native.NativeDraft(target, head(), draft), "native")
    one = One(drafter)
    begin(one)
    return one


def test_several_threads_draft_as_one_does(folder):
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            drafter = native_one(library_of(folder))
            found.append(drafter.draft(12, PLANS["wide"]))
    finally:
        torch.set_num_threads(threads)
    for draft in found[1:]:
        assert draft.tokens == found[0].tokens
        assert draft.scores == pytest.approx(found[0].scores, abs=1e-5)


@pytest.mark.parametrize(
    "more", [{"draft_vocab_size": 40}, {"draft_vocab_size": None}, {"hidden_act": "gelu"}, {"head_dim": 32}]
)
def test_what_it_can_t_compute_stays_eager(folder, more):
    target, head = case("one block", **more)
    assert native.find(folder, target, head()) is None


def test_heads_that_compute_other_things_stay_eager(folder):
    target, head = case("one block")
    own = head()
    assert native.fits(target, own)
    own.__class__ = type("Ablated", (type(own),), {})
    assert not native.fits(target, own)


def test_other_dtypes_stay_eager(folder):
    target, head = case("one block", torch.float32)
    assert native.find(folder, target, head()) is None


def test_it_can_be_left_aside(folder, monkeypatch, tmp_path):
    target, head = case("one block")
    assert native.find(tmp_path, target, head()) is None  # not built
    assert native.find(folder, target, head()) is not None
    monkeypatch.setenv("BEAGLE_COMPILED", "0")
    assert native.find(folder, target, head()) is None
