"""Tree sizes from measured costs."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beagle.decoding.costs import SEVERAL, Costs, cached_costs, interpolate, measure, still_true, tree_sizes
from beagle.drafters.base import TreePlan
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import SmallModelDrafter
from beagle.targets.loading import cache_dir
from conftest import tiny_drafter, tiny_target

SCORES = [math.log(p) for p in (0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)]


def test_no_candidates_where_every_row_costs_a_whole_pass():
    assert Costs([float(n) for n in range(65)], draft=0.0, depth=5).best_tree_size(SCORES) == 0


def test_all_candidates_where_rows_are_free():
    assert Costs([1.0] * 65, draft=0.04, depth=5).best_tree_size(SCORES) == len(SCORES)


def test_size_is_the_best_rate_between_these():
    costs = Costs([1.0 + 0.15 * n for n in range(65)], draft=0.2, depth=5)
    rates = [
        (1 + sum(math.exp(s) for s in SCORES[:n])) / (costs.verify[n + 1] + costs.draft) for n in range(len(SCORES) + 1)
    ]
    size = costs.best_tree_size(SCORES)
    assert size == rates.index(max(rates))
    assert 0 < size < len(SCORES)


def test_more_candidates_than_measured_rows():
    assert Costs([1.0] * 9, draft=0.0, depth=5).best_tree_size([-0.1] * 60) == 7
    assert Costs([1.0] * 9, draft=0.0, depth=5).best_tree_size([]) == 0


def test_another_level_must_earn_its_time():
    assert Costs([2.0, 2.0], draft=2.5, depth=5).min_expected_tokens() == pytest.approx(0.5)
    rows = [1.9 + 0.1 * n for n in range(65)]  # each row more costs 0.1
    assert Costs(rows, draft=2.5, depth=5).min_expected_tokens() == pytest.approx(0.6)


def test_several_contexts_share_a_level_and_ask_more_of_it():
    costs = Costs(
        [float(n) for n in range(65)], draft=2.5, depth=5, seconds_per_extra_context=1.5
    )  # a row costs what a token does
    assert costs.drafting(4) == 7.0
    assert costs.min_expected_tokens(4) == pytest.approx(2 * (7.0 / 5 / 4 + 1.0))
    shared_level = Costs([4.0] * 65, draft=2.5, depth=5)
    assert shared_level.min_expected_tokens(4) == pytest.approx(2 * (2.5 / 5 / 4) / 1.0)


def test_the_draft_that_is_done_already_makes_no_candidate_worth_while():
    rows = [1.0 + 0.5 * n for n in range(65)]
    cheap, dear = (Costs(rows, draft=draft, depth=5, seconds_per_extra_context=draft) for draft in (0.0, 50.0))
    assert dear.best_tree_size([-1.0] * 20, 4) == cheap.best_tree_size([-1.0] * 20, 4)


@given(st.dictionaries(st.integers(1, 64), st.floats(0, 10), min_size=1))
def test_interpolated_times_never_fall(points):
    times = interpolate(points)
    assert len(times) == max(points) + 1
    assert times == sorted(times)
    assert all(times[n] >= points[n] - 1e-9 for n in points)


def test_interpolation_between_points():
    assert interpolate({1: 1.0, 2: 2.0, 4: 6.0}) == pytest.approx([1.0, 1.0, 2.0, 4.0, 6.0])


def test_costs_are_measured_once(target, monkeypatch):
    plan, drafter = TreePlan(), tiny_drafter(target)
    first = cached_costs(target, drafter, plan)
    assert len(first.verify) == 65
    assert min(first.verify) > 0
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: pytest.fail("measured again"))
    assert cached_costs(target, drafter, plan) == first


def test_costs_of_a_busy_machine_are_not_kept(target, monkeypatch):
    busy = Costs([0.5] * 65, draft=0.1, depth=5, steady=False)
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: busy)
    plan, drafter = TreePlan(), tiny_drafter(target)
    assert cached_costs(target, drafter, plan) == busy
    idle = Costs([0.25] * 65, draft=0.1, depth=5)
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: idle)
    assert cached_costs(target, drafter, plan) == idle


def test_a_machine_that_is_busy_for_a_moment_is_measured_again(target, monkeypatch):
    busy, idle = (Costs([0.5] * 65, draft=0.1, depth=5, steady=steady) for steady in (False, True))
    found = iter([busy, idle])
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: next(found))
    assert cached_costs(target, tiny_drafter(target), TreePlan()) == idle


def test_costs_that_passes_are_far_faster_than_are_measured_again(target, monkeypatch):
    monkeypatch.setattr("beagle.decoding.costs.still_true", still_true)
    slow, now = (Costs([seconds] * 65, draft=0.1, depth=5) for seconds in (60.0, 1e-9))
    plan, drafter = TreePlan(), tiny_drafter(target)
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: slow)
    assert cached_costs(target, drafter, plan) == slow
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: now)
    assert cached_costs(target, drafter, plan) == now
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: pytest.fail("measured again"))
    assert cached_costs(target, drafter, plan) == now


def test_a_busy_machine_shows(target, monkeypatch):
    monkeypatch.setattr("beagle.decoding.costs.STEADY", 1.3)
    clock = iter(i * (1.0 if i % 4 < 2 else 1.9) for i in range(10**6))
    monkeypatch.setattr("beagle.decoding.costs.time.perf_counter", lambda: next(clock))
    assert not measure(target, tiny_drafter(target), TreePlan(depth=1), context=20).steady


def test_batches_have_costs_of_their_own(target, monkeypatch):
    drafter, plan = tiny_drafter(target), TreePlan()
    single = cached_costs(target, drafter, plan)
    with monkeypatch.context() as patch:
        patch.setattr(target, "verify", None)
        shared = cached_costs(target, drafter, plan, batch=True)
    assert shared != single
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: pytest.fail("measured again"))
    assert cached_costs(target, drafter, plan) == single


@given(st.integers(1, 64), st.integers(1, 8))
def test_nodes_are_spread_evenly(nodes, rows):
    counts = tree_sizes(nodes, rows)
    assert sum(counts) == nodes
    assert len(counts) == min(nodes, rows)
    assert max(counts) - min(counts) <= 1


def test_the_rows_of_a_batch_have_contexts_of_their_own(target, monkeypatch):
    """A pass over several contexts takes longer than one of as many nodes behind a single one."""
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    run = target.verify_trees

    def noted(cache, tokens, shapes, first=0):
        seen.add((tuple(cache.lengths), tuple(len(shape.parents) for shape in shapes)))
        return run(cache, tokens, shapes, first)

    monkeypatch.setattr(target, "verify_trees", noted)
    measure(target, tiny_drafter(target), TreePlan(depth=1), batch=True, context=20, repeats=1)
    assert {lengths for lengths, _ in seen} == {(20,) * SEVERAL}
    assert {counts for _, counts in seen} >= {(1,), (1, 1, 1, 1), (2, 2, 1, 1), (16, 16, 16, 16)}


def test_each_drafter_has_its_own_costs(target):
    plan, small = TreePlan(), tiny_target(seed=1)
    for drafter in (tiny_drafter(target), LookupDrafter(), SmallModelDrafter(target, small)):
        costs = cached_costs(target, drafter, plan)
        assert costs.draft > 0
        assert cached_costs(target, drafter, plan) == costs
    known = json.loads((cache_dir() / "costs.json").read_text())
    assert [entry["key"]["drafter"] for entry in known] == [tiny_drafter(target).name, "lookup", "model:tiny-llama"]


def test_unreadable_cache_is_measured_over(target):
    path = cache_dir() / "costs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{broken")
    cached_costs(target, tiny_drafter(target), TreePlan(depth=1))
    assert len(json.loads(path.read_text())) == 1
