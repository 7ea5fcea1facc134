"""Costs that follow the passes of decoding."""

from __future__ import annotations

import random

import pytest

from beagle.decoding.costs import Costs
from beagle.decoding.live_costs import KNEE, LiveCosts
from beagle.model import Model
from beagle.targets.target import Target
from conftest import tiny_drafter, tiny_target

FLAT = Costs([8.0 + 0.001 * n for n in range(65)], draft=2.0, depth=5)


def followed(costs: LiveCosts, begin: float, slope: float, sizes: tuple[int, ...] = (4, 6, 9, 12)) -> None:
    draw = random.Random(0)
    for _ in range(600):
        n = draw.choice(sizes)
        costs.note(n, begin + slope * n + draw.uniform(-0.3, 0.3))


def test_they_begin_as_measured():
    costs = LiveCosts.of(FLAT)
    assert costs.verify == FLAT.verify
    assert costs.best_tree_size([-1.0] * 10) == FLAT.best_tree_size([-1.0] * 10)


def test_they_follow_the_passes():
    costs = LiveCosts.of(FLAT)
    followed(costs, begin=5.0, slope=0.5)
    assert costs.verify[1] == pytest.approx(5.5, rel=0.05)
    assert costs.verify[12] == pytest.approx(11.0, rel=0.05)
    assert costs.best_tree_size([-4.0] * 40) < FLAT.best_tree_size([-4.0] * 40)
    followed(costs, begin=10.0, slope=0.1)
    assert costs.verify[1] == pytest.approx(10.1, rel=0.05)
    assert costs.verify[12] == pytest.approx(11.2, rel=0.05)


def test_passes_alike_say_nothing_of_the_steepness():
    steep = Costs([5.0 + 0.4 * n for n in range(65)], draft=2.0, depth=5)
    costs = LiveCosts.of(steep)
    followed(costs, begin=10.0, slope=0.0, sizes=(1,))
    assert costs.verify[1] == pytest.approx(10.0, rel=0.05)
    assert costs.verify[9] - costs.verify[1] == pytest.approx(8 * 0.4, rel=0.1)


def test_an_interrupted_pass_changes_little():
    costs = LiveCosts.of(FLAT)
    followed(costs, begin=8.0, slope=0.2)
    before = list(costs.verify)
    costs.note(6, 5000.0)
    assert costs.verify[6] == pytest.approx(before[6], rel=0.03)


def test_large_trees_are_as_steep_as_measured():
    measured = Costs([8.0 + (0.1 * n if n <= KNEE else 0.1 * KNEE + 1.0 * (n - KNEE)) for n in range(65)], 2.0, 5)
    costs = LiveCosts.of(measured)
    followed(costs, begin=6.0, slope=0.2)
    assert costs.verify[40] - costs.verify[KNEE] == pytest.approx(measured.verify[40] - measured.verify[KNEE])
    assert costs.verify == sorted(costs.verify)


def test_a_context_too_short_for_large_trees():
    costs = LiveCosts.of(Costs([1.0] * 5, draft=0.5, depth=5))
    followed(costs, begin=1.0, slope=0.1, sizes=(1, 2, 4, 8))
    assert len(costs.verify) == 5
    assert costs.verify[4] == pytest.approx(1.4, rel=0.15)


def test_only_where_drafts_change_no_bit(monkeypatch):
    """Elsewhere other trees may flip near-ties, so that a second run would not be the first."""
    monkeypatch.setattr("beagle.model.cached_costs", lambda *_: FLAT)
    target = tiny_target()
    model = Model(target, tiny_drafter(target))
    assert model._costs_of_sizes(model.drafter) is FLAT
    monkeypatch.setattr(Target, "drafts_change_no_bit", True)
    live = model._costs_of_sizes(model.drafter)
    assert isinstance(live, LiveCosts)
    model.generate("w3 w4 w5", max_new_tokens=24)
    assert live is model._costs_of_sizes(model.drafter)
    assert live.verify != FLAT.verify
    assert model._costs_of_sizes(model.drafter, batch=True) is FLAT
