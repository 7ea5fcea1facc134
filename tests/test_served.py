"""Train equals serve: at its end a training decodes held-out prompts, and compares with its own simulation."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from beagle.drafters.base import TreePlan
from beagle.drafters.checkpoint import save_head
from beagle.drafters.head_drafter import HeadDrafter
from beagle.drafters.load import DraftSpec, load_drafter
from beagle.model import Model
from beagle.targets.target import Target
from beagle.training import served as module
from beagle.training.answers import Sample
from beagle.training.served import Served, measure_served, simulate
from beagle.training.stages import step_alpha
from conftest import SCALES, tiny_head, tiny_target

SEEDS = {"beagle": 1, "eagle": 0, "eagle3": 0}  # of targets that repeat themselves, so that drafts are right


def stored(target: Target, prompt: list[int], new: int = 30) -> Sample:
    """A greedy answer with its states, its last token not run, as training data have it."""
    answer = Model(target).generate(prompt, max_new_tokens=new + 1).token_ids
    tokens = torch.tensor([*prompt, *answer[:-1]])
    states = target.prefill(tokens[None], target.new_cache(1, len(tokens)))[0]
    return Sample(f"{prompt}", tokens, states, len(prompt) - 1)


@pytest.fixture(params=SEEDS)
def made(request, tmp_path):
    """A target, a head whose few draft tokens are often right, its folder, and held-out samples."""
    layers = (1, 2) if request.param == "eagle3" else ()
    target = tiny_target(state_layers=layers, seed=SEEDS[request.param])
    target.eos_ids = frozenset()
    samples = [stored(target, [1, 3 + 5 * i, 4 + i, 9], 20 + i) for i in range(10)]
    counts = Counter(int(token) for sample in samples for token in sample.tokens[sample.answer_from + 1 :])
    settings = {"kv_layers": layers} if layers else {}
    head = tiny_head(
        target, architecture=request.param, scale=SCALES[request.param], draft_vocab_size=2, seed=2, **settings
    )
    head.draft_vocab.copy_(torch.tensor(sorted(token for token, _ in counts.most_common(2))))
    save_head(head, tmp_path / "head", target="tiny", dtype=torch.float32, meta={})
    return target, head, tmp_path / "head", samples


def test_simulated_and_decoded_length_are_the_same_walk(made):
    target, head, folder, samples = made
    drafter = load_drafter(DraftSpec(head=str(folder)), target)
    model = Model(target, drafter, TreePlan("chain", 5, 1, 5))
    walks = simulate(head, target, samples)
    for sample, walk in zip(samples, walks, strict=True):
        prompt = sample.tokens[: sample.answer_from + 1].tolist()
        stats = model.generate(prompt, max_new_tokens=len(sample.tokens) - sample.answer_from).stats
        assert walk == (stats.passed_tokens, stats.passes)
    assert sum(tokens for tokens, _ in walks) > 1.15 * sum(passes for _, passes in walks)  # drafts were accepted
    assert simulate(head, target, samples[:1]) == walks[:1]


def test_a_head_that_is_served_as_it_was_trained_falls_not_short(made):
    target, head, folder, samples = made
    found = measure_served(head, folder, target, samples)
    assert found.prompts == 10
    assert found.simulated == pytest.approx(found.tau)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert not found.falls_short
    alphas, _ = step_alpha(head, target, [samples], 5)
    assert len(found.lines(alphas)) == 2
    assert f"simulated {found.tau:.2f}, decoded {found.tau:.2f}" in found.lines(alphas)[1]


@pytest.mark.parametrize("made", ["beagle"], indirect=True)
def test_a_head_that_is_served_otherwise_falls_short(made, monkeypatch):
    target, head, folder, samples = made
    draft = HeadDrafter.draft

    def shifted(self, *args, **options):  # drafts that are right in training, and wrong when they are served
        drafts = draft(self, *args, **options)
        return [replace(one, tokens=[(token + 1) % 64 for token in one.tokens]) for one in drafts]

    monkeypatch.setattr(HeadDrafter, "draft", shifted)
    found = measure_served(head, folder, target, samples)
    assert found.simulated > 1.15
    assert found.tau < found.simulated
    assert found.falls_short


@pytest.mark.parametrize(
    ("simulated", "tau", "error", "short"),
    [
        (3.0, 2.0, 0.1, True),
        (3.0, 2.0, None, False),
        (3.0, 2.0, 0.4, False),
        (3.0, 2.9, 0.01, False),
        (2.0, 3.0, 0.1, False),
    ],
)
def test_what_is_noise(simulated, tau, error, short):
    assert Served(8, 5, simulated, tau, [0.5], error).falls_short == short


def test_the_error_is_that_of_paired_prompts():
    same = [(20, 10), (30, 10), (24, 12), (40, 10), (8, 4)]
    assert module._error(same, same) == 0
    other = [(20, 12), (30, 9), (24, 14), (40, 12), (8, 4)]
    random = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(2000):
        at = torch.randint(5, (5,), generator=random).tolist()
        draws.append(module._ratio([same[i] for i in at]) - module._ratio([other[i] for i in at]))
    assert module._error(same, other) == pytest.approx(torch.tensor(draws).std().item(), rel=0.3)
    assert module._error(same[:3], other[:3]) is None


def test_a_training_says_so_at_its_end(train, tmp_path, prompts):
    many = [{"prompt": f"w{3 + i % 60} w{3 + (7 * i) % 60}"} for i in range(300)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in many))
    short = {"early_epochs": 0.2, "late_epochs": 0.2}
    ended = train(tmp_path / "run", answers={"rows": 32}, train=short)
    assert ended.code == 0, ended.err
    served = json.loads((tmp_path / "run" / "result.json").read_text())["served"]
    assert served["prompts"] >= 3
    assert served["tau"] >= 1
    assert not served["falls_short"]
    shown = " ".join(ended.err.split())
    assert f"simulated {served['simulated']:.2f}, decoded {served['tau']:.2f}" in shown
    assert "step-α of validation" in shown


def test_a_training_without_held_out_answers_says_so(train, tmp_path, prompts):
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for row in rows[:2]:
        prompts.write_text(json.dumps(row) + "\n")
        ended = train(tmp_path / row["prompt"].replace(" ", ""))
        assert ended.code == 0, ended.err
        assert "no answer is held out" in " ".join(ended.err.split())


def test_a_training_whose_head_drafts_worse_is_an_error_and_keeps_it(train, tmp_path, prompts, monkeypatch):
    many = [{"prompt": f"w{3 + i % 60} w{3 + (7 * i) % 60}"} for i in range(300)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in many))
    draft = HeadDrafter.draft

    def shifted(self, *args, **options):
        drafts = draft(self, *args, **options)
        return [replace(one, tokens=[(token + 1) % 64 for token in one.tokens]) for one in drafts]

    monkeypatch.setattr(HeadDrafter, "draft", shifted)
    monkeypatch.setattr(module, "SHARE", 0.0)
    monkeypatch.setattr(module, "ERRORS", 0.5)
    ended = train(tmp_path / "run", train={"early_epochs": 1, "late_epochs": 1})
    ended.refusal(tmp_path / "run" / "head", "drafts worse than in training", "likely causes")
    served = json.loads((tmp_path / "run" / "result.json").read_text())["served"]
    assert served["falls_short"]
    assert (tmp_path / "run" / "head" / "config.json").is_file()
