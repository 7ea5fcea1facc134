"""The roofline of a pass, and the command that shows it beside what was measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from beagle.decoding.costs import Costs, cached_costs
from beagle.drafters.base import TreePlan
from beagle.drafters.lookup import LookupDrafter
from beagle.evaluation import profile as profile_module
from beagle.evaluation.best_rates import best_rates
from beagle.evaluation.breakdown import breakdown
from beagle.evaluation.modes import Options
from beagle.evaluation.roofline import ROUNDS, Machine, best_times, measure, roofline
from beagle.model import Model
from beagle.targets.loading import cache_dir
from conftest import SMALL, tiny_target

LAYER = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32  # q, k, v, o; MLP; norms
WEIGHTS = 3 * LAYER + 32 + 64 * 32  # final norm, LM head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_pass_are_all_but_the_embeddings(dtype, tied):
    target = tiny_target(dtype=dtype, tie_word_embeddings=tied)  # in bf16 its layers are packed
    assert target.pass_weights == WEIGHTS
    assert target.pass_bytes == WEIGHTS * dtype.itemsize


def test_roofline_by_hand(target):
    rows, context = 3, 10
    slot = 2 * SMALL["num_hidden_layers"] * SMALL["num_key_value_heads"] * SMALL["head_dim"] * 4
    read = WEIGHTS * 4 + 13 * slot
    attention = 3 * 4 * (8 + 8) * 2  # layers, heads, key and value width
    operations = rows * (2 * WEIGHTS + 13 * attention)
    slow_memory = roofline(target, Machine(bandwidth=1.0, matrix_rate=1e12), rows, context)
    assert (slow_memory.bytes, slow_memory.operations) == (read, operations)
    assert slow_memory.seconds == read
    assert roofline(target, Machine(bandwidth=1e12, matrix_rate=2.0), rows, context).seconds == operations / 2


def test_rates_are_those_of_work_done(target, monkeypatch):
    monkeypatch.setattr("beagle.evaluation.roofline.LEAST_BYTES", 64 * 2**20)
    monkeypatch.setattr("beagle.evaluation.roofline.best_times", lambda works, device: [0.5] * (len(works) - 1) + [0.1])
    machine, passes = measure(target, {1: lambda: None, 8: lambda: None})
    assert machine == Machine(bandwidth=64 * 2**20 / 0.5, matrix_rate=2 * 2048**3 / 0.5)
    assert passes == {1: 0.5, 8: 0.1}


def test_what_is_timed_takes_turns_and_its_best_round_counts(monkeypatch):
    now = iter([0.0, 0.0] + [t for n in range(ROUNDS) for t in (0, 5 - n, 0, 3)])
    clock = SimpleNamespace(perf_counter=lambda: next(now, 1.0))
    monkeypatch.setattr("beagle.evaluation.roofline.time", clock)
    monkeypatch.setattr("beagle.evaluation.roofline.LEAST_SECONDS", 0)
    called = []
    works = [lambda: called.append("a"), lambda: called.append("b")]
    next(now)
    assert best_times(works, torch.device("cpu")) == [1, 3]
    assert called == ["a", "b"] * (ROUNDS + 1)  # once to warm up


def test_fresh_costs_replace_the_known_ones(target, monkeypatch):
    times = iter([1.0, 2.0])
    monkeypatch.setattr("beagle.decoding.costs.measure", lambda *_: Costs([next(times)] * 65, 0.1, 5))

    def first(fresh):
        return cached_costs(target, LookupDrafter(), TreePlan(), fresh=fresh).verify[1]

    assert [first(False), first(False), first(True), first(False)] == [1.0, 1.0, 2.0, 2.0]


@pytest.fixture
def run(folders, beagle, tmp_path, monkeypatch):
    """Profiles two questions without measuring rates; returns the outcome and the JSON."""

    def measured(target, passes):
        for work in passes.values():
            work()
        return Machine(1e9, 1e10), {n: 0.01 + 0.001 * n for n in passes}

    monkeypatch.setattr(profile_module, "measure", measured)
    monkeypatch.setattr("beagle.model.cached_costs", lambda *a: Costs([0.01 + 0.001 * n for n in range(65)], 0.005, 5))
    path = tmp_path / "two.jsonl"
    path.write_text(
        "".join(json.dumps({"question_id": n, "turns": [text]}) + "\n" for n, text in enumerate(("w3 w4", "w9")))
    )

    def call(*extra, options=folders.options):
        ended = beagle("profile", "--questions", path, *options, "-n", 12, "--json", tmp_path / "out.json", *extra)
        return ended, json.loads((tmp_path / "out.json").read_text()) if not ended.code else {}

    return call


def test_the_best_of_two_measurements_counts(target, monkeypatch):
    found = iter([(Machine(3e9, 1e10), {1: 0.2, 8: 0.3}), (Machine(2e9, 2e10), {1: 0.1, 8: 0.4})])
    monkeypatch.setattr(profile_module, "measure", lambda *_: next(found))
    monkeypatch.setattr("beagle.model.cached_costs", lambda *_: Costs([0.01] * 65, 0.005, 5))
    profile = profile_module.Profile(Model(target), Options(max_new_tokens=4))
    profile.measure_again()
    assert (profile.now, profile.passes) == (Machine(3e9, 2e10), {1: 0.1, 8: 0.3})
    assert profile.machine == Machine(3e9, 2e10)


def test_the_best_rates_since_the_machine_started_are_kept(target, monkeypatch, tmp_path):
    boot = tmp_path / "boot_id"
    monkeypatch.setattr("beagle.evaluation.best_rates.BOOT", boot)
    boot.write_text("one\n")
    assert best_rates(Machine(3e9, 1e10), target) == Machine(3e9, 1e10)
    assert best_rates(Machine(2e9, 2e10), target) == Machine(3e9, 2e10)
    assert best_rates(Machine(1e9, 1e10), target) == Machine(3e9, 2e10)
    half = tiny_target(dtype=torch.bfloat16)
    assert best_rates(Machine(1e9, 1e9), half) == Machine(1e9, 1e9)  # products in another dtype are others
    boot.write_text("two\n")
    assert best_rates(Machine(1e9, 1e10), target) == Machine(1e9, 1e10)
    (cache_dir() / "rates.json").write_text("no JSON")
    assert best_rates(Machine(1e8, 1e10), target) == Machine(1e8, 1e10)


def test_profile_of_a_drafting_model(run, tmp_path):
    pytest.importorskip("matplotlib")
    ended, result = run("--plot", tmp_path / "out.png")
    assert ended.code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["modes"]) == {"plain", "beagle"}
    assert result["modes"]["beagle"]["identical"] == 1.0
    for m in result["modes"].values():
        outside = (m["accept_seconds"] + m["other_seconds"]) / m["seconds"]
        assert m["outside_share"] == pytest.approx(outside, abs=1e-3)
        assert m["text_seconds"] > 0
    model = result["model"]
    assert model["achieved_speed_up"] == result["ratios"]["beagle/plain"]["pooled"]
    assert model["share"] == pytest.approx(model["achieved_speed_up"] / model["expected_speed_up"], abs=1e-3)
    first = result["passes"][0]
    assert (first["rows"], first["ms"]) == (1, 11.0)
    assert first["floor_ms"] == max(first["read_ms"], first["compute_ms"]) > 0
    assert [p["rows"] for p in result["passes"]][-1] == 64
    assert "of the" in ended.out
    assert "that the cost model expects" in ended.out


def test_profile_of_plain_decoding(run, folders):
    ended, result = run(options=folders.plain)
    assert ended.code == 0
    assert set(result["modes"]) == {"plain"}
    assert "model" not in result
    assert len(result["passes"]) == 11


def test_plots_of_unknown_kinds_are_refused_before_the_work(run, tmp_path):
    ended, _ = run("--plot", tmp_path / "out.bmp")
    ended.refusal("out.bmp", ".png")


def test_passes_that_are_not_native_have_no_parts(target):
    assert breakdown(target, 10) == []


def test_parts_are_shown(run, folders, monkeypatch):
    names = ("ms", "products_ms", "attention_ms", "others_ms", "waiting_ms", "lm_head_ms", "python_ms")
    parts = [{"rows": 12, **{name: 1.0 + i for i, name in enumerate(names)}}]
    monkeypatch.setattr(profile_module, "breakdown", lambda target, context: parts)
    ended, result = run(options=folders.plain)
    assert result["parts"] == parts
    assert "parts of a native pass" in ended.out
