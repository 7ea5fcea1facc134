"""Captured drafts: all levels replayed on memory of their own, the same candidates as eager ones.

A CUDA graph's place is taken by a trace, as in ``test_captured``.
"""

from itertools import zip_longest

import pytest
import torch

from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.drafters.base import TreePlan
from beagle.drafters.captured import CapturedDraft, capture_drafts
from beagle.model import Model, Piece
from beagle.targets.captured import LEAST_KEYS
from conftest import LIVELY, SMALL, Recorder, tiny_drafter, tiny_target
from drafting import One

pytestmark = pytest.mark.slow

PLANS = {
    "dynamic": TreePlan("dynamic", 4, 4, 20),
    "chain": TreePlan("chain", 4),
    "root": TreePlan("dynamic", 1, 3, 3),
    "wider than the vocabulary": TreePlan("dynamic", 3, 100, 60),
}


def states(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, SMALL["hidden_size"], generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["beagle", "eagle"])
def pair(request) -> tuple[One, One, Recorder]:
    """An eager drafter, and one whose drafts are recorded."""
    target, recorder = tiny_target(), Recorder()
    eager, fast = (
        One(tiny_drafter(target, architecture=request.param, scale=LIVELY[request.param], draft_vocab_size=48))
        for _ in range(2)
    )
    fast.drafter.whole = CapturedDraft(fast.eager, fast.rotations, recorder)
    return eager, fast, recorder


def drafts(drafter: One, plan: TreePlan, context: int, min_expected_tokens: float = 0.0) -> list:
    """Of a context, after its growth, and of another shorter one in the same memory."""
    tokens = [3 + i % 40 for i in range(context)]
    drafter.begin(tokens, states(context))
    found = [drafter.draft(12, plan, min_expected_tokens)]
    drafter.extend([12, 13], states(2, 2))
    found.append(drafter.draft(14, plan, min_expected_tokens))
    drafter.begin(tokens[:5], states(5, 3))
    return [*found, drafter.draft(15, plan, min_expected_tokens)]


@pytest.mark.parametrize(
    ("plan", "context"),
    [
        *[("dynamic", context) for context in (9, LEAST_KEYS, LEAST_KEYS + 44)],
        ("chain", LEAST_KEYS + 44), ("root", 9), ("wider than the vocabulary", 9),
    ],
)  # fmt: skip
def test_its_drafts_are_the_eager_ones(pair, plan, context):
    eager, fast, recorder = pair
    found = [drafts(drafter, PLANS[plan], context) for drafter in (fast, eager)]
    for one, other in zip(*found, strict=True):
        assert (one.tokens, one.parents) == (other.tokens, other.parents)
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
    assert recorder.made == (1 if context == 9 else 2)  # one for each size of context, whatever it holds


def test_candidates_not_worth_a_row_are_left_out(pair):
    eager, fast, _ = pair
    plan = TreePlan("dynamic", 2, 4, 20)
    whole, some = (drafts(fast, plan, 9, gain)[0] for gain in (0.0, 0.3))
    assert len(some.tokens) < len(whole.tokens)
    assert some.tokens == drafts(eager, plan, 9, 0.3)[0].tokens


def test_static_trees_and_several_contexts_are_drafted_eagerly(pair):
    eager, fast, recorder = pair
    assert drafts(fast, TreePlan("static", 5), 9) == drafts(eager, TreePlan("static", 5), 9)
    found = []
    for drafter in (eager, fast):
        contexts = [drafter.drafter.context() for _ in range(2)]
        for i, context in enumerate(contexts):
            context.extend(list(range(3, 12 - i)), states(9 - i))
        found.append(drafter.drafter.draft(contexts, [12, 13], PLANS["dynamic"]))
    assert found[0] == found[1]
    assert recorder.made == 0


def test_answers_that_take_turns_share_the_graphs(pair):
    eager, fast, recorder = pair
    plan = TreePlan(nodes=6, top_k=3, depth=3)
    prompts = [f"w{5 + i} w9 w33" for i in range(3)]
    found = []
    for drafter in (eager, fast):
        model = Model(tiny_target(), drafter.drafter, plan)
        answers = [[] for _ in prompts]
        streams = [model.stream(prompt, raw=True, max_new_tokens=24) for prompt in prompts]
        for pieces in zip_longest(*streams, fillvalue=Piece("")):  # in turn
            for answer, piece in zip(answers, pieces, strict=True):
                answer.append(piece.token_ids)  # as many a step: the drafts were equal, too
        found.append(answers)
    assert found[0] == found[1]
    assert recorder.made == 1  # the shorter drafts at the end of an answer, too


def test_nothing_of_the_last_context_is_left(pair):
    """A NaN behind a mask is a NaN."""
    eager, fast, _ = pair
    plan = PLANS["dynamic"]
    drafts(fast, plan, 9)  # what is recorded with a NaN is refused
    fast.begin(list(range(3, 40)), torch.full((37, SMALL["hidden_size"]), torch.nan))
    fast.draft(12, plan)
    assert [draft.tokens for draft in drafts(fast, plan, 9)] == [draft.tokens for draft in drafts(eager, plan, 9)]


def test_a_draft_that_cannot_be_recorded_is_eager_and_says_so_once(pair, capsys):
    eager, fast, _ = pair

    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    fast.whole._record = full
    assert drafts(fast, PLANS["dynamic"], 9) == drafts(eager, PLANS["dynamic"], 9)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("a draft of 4 levels can't be captured as a graph (CUDA out of memory), so it runs") == 1


def test_a_deeper_plan_is_recorded_anew_and_a_refused_one_leaves_the_shallower_graph(pair):
    eager, fast, recorder = pair
    plans = [TreePlan("dynamic", depth, 4, 20) for depth in (2, 4, 3)]
    assert [drafts(fast, plan, 9)[0].tokens for plan in plans] == [drafts(eager, plan, 9)[0].tokens for plan in plans]
    assert recorder.made == 2
    fast.whole._record = None  # whatever goes wrong
    deeper = TreePlan("dynamic", 5, 4, 20)
    assert drafts(fast, deeper, 9) == drafts(eager, deeper, 9)
    fast.head.level = None  # the eager level
    assert drafts(fast, plans[1], 9)[0].tokens == drafts(eager, plans[1], 9)[0].tokens


def test_a_graph_that_drafts_something_else_is_refused(pair, capsys):
    eager, fast, recorder = pair

    def wrong(run):
        replay, out = recorder(run)
        return lambda: (replay(), out[1].mul_(3)), out

    fast.whole._record = wrong
    assert drafts(fast, PLANS["dynamic"], 9) == drafts(eager, PLANS["dynamic"], 9)
    assert "its candidates are not the eager ones" in " ".join(capsys.readouterr().err.split())


def test_on_a_cpu_nothing_is_captured():
    drafter = tiny_drafter(tiny_target())
    capture_drafts(drafter)
    assert drafter.whole is None


@pytest.mark.parametrize("plan", [PLANS["dynamic"], PLANS["chain"]], ids=["dynamic", "chain"])
def test_it_adds_the_noise_of_each_draft(pair, plan):
    eager, fast, _ = pair
    noises = [Sampler(SamplingParams(temperature=0.8, seed=seed)).noise(3) for seed in (0, 1)]
    found = []
    for drafter in (eager, fast):
        drafter.begin([3, 4, 5, 6], states(4))
        for noise in (None, *noises, None):
            drafter.context.noise = noise
            found.append(drafter.draft(12, plan))
    for one, other in zip(found[:4], found[4:], strict=True):
        assert (one.tokens, one.parents) == (other.tokens, other.parents)
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
    assert found[0] == found[3]
    assert len({tuple(draft.tokens) for draft in found}) == 3
