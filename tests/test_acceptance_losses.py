"""Losses shaped like acceptance: against plain formulas and autograd in fp64, and in both stages of both heads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from beagle.drafters.eagle_head import EagleConfig, EagleHead
from beagle.drafters.head import BeagleHead, HeadConfig
from beagle.errors import BeagleError
from beagle.research.compare.variants import parse
from beagle.training import losses
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.losses import ROUND, dpace_weights, regression, slot_losses, total
from beagle.training.recipe import Recipe, read_recipe
from beagle.training.stages import STAGES, stage_loss
from beagle.training.states import Fingerprint, StateStore
from beagle.training.trainer import Trainer
from beagle.training.windows import Batch
from conftest import tiny_target

LOSSES = ["cross_entropy", "total_variation", "lk", "log_acceptance"]


def made(slots: int, hidden: int = 8, vocab: int = 21, seed: int = 0):
    """Predicted states, true states, LM head, weights, bias."""
    random = torch.Generator().manual_seed(seed)
    predicted, true = torch.randn(2, slots, hidden, generator=random)
    head, bias = torch.randn(vocab, hidden, generator=random), torch.randn(vocab, generator=random)
    return predicted, true, head, torch.rand(slots, generator=random), bias


def plain(loss: str, share: float, predicted, true, head, weights, bias):
    """The formulas as they are written, and acceptance."""
    p = F.softmax(F.linear(true, head, bias), dim=-1)
    log_q = F.log_softmax(F.linear(predicted, head, bias), dim=-1)
    cross_entropy = -(p * log_q).sum(-1)
    alpha = torch.minimum(p, log_q.exp()).sum(-1)
    variation = (p - log_q.exp()).abs().sum(-1) / 2
    weight = torch.exp(-3 * alpha.detach())
    own = {
        "cross_entropy": cross_entropy,
        "total_variation": variation,
        "lk": weight * cross_entropy + (1 - weight) * variation,
        "log_acceptance": -alpha.log(),
    }[loss]
    return weights * (share * cross_entropy + (1 - share) * own), alpha


@pytest.mark.parametrize("slots", [1, 5, 70])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_autograd_in_double_precision(monkeypatch, loss, share, slots):
    monkeypatch.setattr(losses, "CHUNK", ROUND)
    predicted, true, head, weights, bias = made(slots)
    exact_input = predicted.double().requires_grad_()
    exact, alpha = plain(loss, share, exact_input, *(x.double() for x in (true, head, weights, bias)))
    factors = torch.rand(slots, generator=torch.Generator().manual_seed(1))
    (factors.double() * exact).sum().backward()

    predicted.requires_grad_()
    values, acceptance = slot_losses(
        predicted, true, head, weights, bias, loss=loss, cross_entropy_share=share, measure=True
    )
    (factors * values).sum().backward()
    torch.testing.assert_close(values.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(acceptance.double(), alpha.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predicted.grad.double(), exact_input.grad, atol=1e-5, rtol=1e-5)
    assert not acceptance.requires_grad
    assert slot_losses(predicted, true, head, weights, bias, loss=loss)[1] is None


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_a_draft_that_is_never_accepted_has_a_finite_loss_and_gradient(loss):
    predicted = torch.tensor([[300.0, 0.0]], requires_grad=True)
    values, acceptance = slot_losses(
        predicted, torch.tensor([[0.0, 300.0]]), torch.eye(2), torch.ones(1), loss=loss, measure=True
    )
    values.sum().backward()
    assert acceptance.item() == 0
    assert values.isfinite().all()
    assert predicted.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_training_a_state_on_each_loss_accepts_more(loss):
    predicted, true, head, weights, bias = made(6)
    state = predicted.clone().requires_grad_()
    optimizer = torch.optim.Adam([state], lr=0.05)
    seen = []
    for _ in range(120):
        values, acceptance = slot_losses(state, true, head, weights, bias, loss=loss, measure=True)
        seen.append(acceptance)
        optimizer.zero_grad()
        total(values).backward()
        optimizer.step()
    assert seen[-1].mean() > max(0.8, seen[0].mean() + 0.2)


def soft_cross_entropy_of_the_paper(predicted, true, head, weights, bias):
    """Value and gradient as they were before there was a choice, operation by operation."""
    real = len(predicted)
    predicted, true = (F.pad(x, (0, 0, 0, -real % losses.ROUND)) for x in (predicted, true))
    weights = F.pad(weights, (0, -real % losses.ROUND))
    value = predicted.new_zeros(())
    gradient = torch.empty_like(predicted)
    for at in range(0, len(predicted), losses.CHUNK):
        chunk = slice(at, at + losses.CHUNK)
        log_q = F.log_softmax(F.linear(predicted[chunk], head, bias).float(), dim=-1)
        p = F.softmax(F.linear(true[chunk], head, bias).float(), dim=-1)
        value += -(weights[chunk] * torch.linalg.vecdot(p, log_q)).sum()
        error = log_q.exp_().sub_(p).mul_(weights[chunk, None])
        gradient[chunk] = error.to(head.dtype) @ head
    return value, gradient[:real]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("slots", [1, 64, 515, 1200])
def test_the_papers_loss_keeps_every_bit(slots, autocast):
    predicted, true, head, weights, bias = made(slots, hidden=32, vocab=97)
    head = head.bfloat16() if autocast else head
    predicted.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, gradient = soft_cross_entropy_of_the_paper(predicted.detach(), true, head, weights, bias)
        found = total(slot_losses(predicted, true, head, weights, bias)[0])
    found.backward()
    assert torch.equal(found.detach(), value)
    assert torch.equal(predicted.grad, gradient)


def test_dpace_weights_are_sums_over_later_steps_of_products_over_earlier_ones():
    real = [torch.tensor([[True, True], [True, False]]), torch.tensor([[True, True], [False, False]]),
            torch.tensor([[True, False], [False, False]])]  # fmt: skip
    acceptance = torch.tensor([0.2, 0.6, 1.0, 0.4, 0.0, 0.8])  # of steps 1, 1, 1, 2, 2, 3
    a, b, c = 0.6, 0.8, 1.0
    whole = [a + a * 0.7 + a * 0.7 * 0.9, b + b * 0.5, c, a * 0.7 + a * 0.7 * 0.9, b * 0.5, a * 0.7 * 0.9]
    expected = torch.tensor(whole) / sum(whole)
    torch.testing.assert_close(dpace_weights(acceptance, real), expected)


HEADS = {
    "beagle": lambda: BeagleHead(HeadConfig(**SHAPE)),
    "eagle": lambda: EagleHead(EagleConfig(**SHAPE)),
}
SHAPE = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 32,
         "target_vocab_size": 40}  # fmt: skip


def setting(architecture: str):
    """A head, a batch whose last window is cut short, and the LM head."""
    torch.manual_seed(0)
    head = HEADS[architecture]()
    embeddings, states = torch.randn(2, 2, 32, 16)
    batch = Batch(embeddings, states, torch.tensor([2, 5]), torch.tensor([27, 20]))
    return head, batch, (torch.randn(40, 16), torch.randn(40))


def settled(head, batch, lm_head, config, stage):
    """Loss, what is shown, and gradients by name."""
    head.zero_grad()
    loss, shown = stage_loss(head, batch, lm_head, config, stage=stage, offset=1, noise=torch.zeros_like(batch.states))
    loss.backward()
    return loss.detach(), shown, {name: p.grad.clone() for name, p in head.named_parameters()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("stage", "dpace"), [("early", False), ("late", False), ("late", True)])
@pytest.mark.parametrize("architecture", HEADS)
def test_each_loss_trains_both_stages_of_both_heads_without_regression(architecture, stage, dpace, loss):
    head, batch, lm_head = setting(architecture)
    config = TrainConfig(window=3, steps=3, loss=loss, dpace=dpace, regression=0)
    value, shown, gradients = settled(head, batch, lm_head, config, stage)
    assert torch.equal(value, shown)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())
    with_regression = settled(head, batch, lm_head, replace(config, regression=10.0), stage)
    assert torch.equal(with_regression[1], shown)
    assert with_regression[0] > value


@pytest.mark.parametrize("loss", ["cross_entropy", "lk"])
@pytest.mark.parametrize("architecture", HEADS)
def test_the_late_loss_with_dpace_weighs_each_chain_by_its_own_acceptance(architecture, loss):
    head, batch, lm_head = setting(architecture)
    config = TrainConfig(window=3, steps=3, noise=0, loss=loss, dpace=True, regression=2.0)
    found = settled(head, batch, lm_head, config, "late")

    head.zero_grad()
    parts = STAGES[type(head)].late(head, batch, batch.states, 3, 1, 3)
    states, slots, real = (torch.stack(x) for x in zip(*parts, strict=True))
    true = torch.stack([batch.pick(batch.states, at + 1) for at in slots])
    values, alpha = plain(loss, 0.0, states, true, lm_head[0], torch.ones(()), lm_head[1])
    smooth = torch.where(real, 0.5 + 0.5 * alpha.detach(), 0)
    weights = torch.zeros_like(smooth)
    for j, m in itertools.combinations_with_replacement(range(3), 2):
        weights[j] += smooth[: m + 1].prod(0)
    weights = torch.where(real, weights, 0)
    weights = weights / weights.sum()
    shown = (weights * values).sum()
    whole = shown + 2 * regression(states.flatten(0, 2), true.flatten(0, 2), weights.flatten())
    whole.backward()
    torch.testing.assert_close(found[1], shown.detach())
    torch.testing.assert_close(found[0], whole.detach())
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[2][name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_dpace_leaves_the_early_stage_as_it_is():
    head, batch, lm_head = setting("beagle")
    config = TrainConfig(window=3, steps=3)
    ordinary = settled(head, batch, lm_head, config, "early")
    weighed = settled(head, batch, lm_head, replace(config, dpace=True), "early")
    assert torch.equal(ordinary[0], weighed[0])


def recipe(tmp_path: Path, line: str) -> TrainConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"train:\n  {line}\n")
    return read_recipe(path).train


def test_recipes_choose_the_loss(tmp_path):
    assert recipe(tmp_path, "loss: total_variation\n  cross_entropy_share: 0.1\n  dpace: true") == TrainConfig(
        loss="total_variation", cross_entropy_share=0.1, dpace=True
    )


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("loss: tv", "train.loss: .*'total_variation', 'lk' or 'log_acceptance', not 'tv'"),
        ("loss:", "train.loss: .*not None"),
        ("cross_entropy_share: 1.5", "train.cross_entropy_share: .*less than or equal to 1, not 1.5"),
        ("cross_entropy_share: -1", "train.cross_entropy_share: .*greater than or equal to 0, not -1"),
        ("dpace: 0.5", "train.dpace: .*not 0.5"),
        ("regression: -1", "train.regression: .*not -1"),
        ("losses: lk", r"unknown key \['losses'\] in train; known are .*loss, cross_entropy_share"),
    ],
)
def test_a_wrong_loss_is_refused_in_one_line(tmp_path, line, named):
    with pytest.raises(BeagleError, match=named) as error:
        recipe(tmp_path, line)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def store(target, tmp_path_factory):
    random = torch.Generator().manual_seed(0)
    store = StateStore(tmp_path_factory.mktemp("states"), Fingerprint.of(target, 20, 24))
    tokens = torch.randint(3, 60, (12, 16), generator=random)
    states = torch.randn(12, 16, target.hidden_size, generator=random).bfloat16()
    store.write(Sample(str(i), *sample, 1) for i, sample in enumerate(zip(tokens, states, strict=True)))
    return store


RUN = TrainConfig(
    early_epochs=2, late_epochs=2, window=3, steps=3, batch_tokens=64, learning_rate=1e-2, warmup_steps=1, dropout=0.1
)


@pytest.mark.parametrize("architecture", HEADS)
def test_an_interrupted_run_of_an_acceptance_loss_ends_where_a_whole_one_does(target, store, tmp_path, architecture):
    config = replace(RUN, loss="lk", cross_entropy_share=0.1, dpace=True, regression=0)
    options = {"architecture": architecture}
    Trainer(target, store, tmp_path / "whole", config, options).train()
    for _ in range(99):
        trainer = Trainer(target, store, tmp_path / "parts", config, options)
        trainer.train(seconds=0)
        if trainer.step == trainer.total:
            break
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_from_before_there_was_a_choice_goes_on_with_the_papers_loss_alone(target, store, tmp_path):
    first = Trainer(target, store, tmp_path, RUN)
    identity = first.identity()
    for name in ("loss", "cross_entropy_share", "dpace"):
        del identity["train"][name]
    first.identity = lambda: identity
    first.train(seconds=0)
    assert Trainer(target, store, tmp_path, RUN).step == 1
    for other in ({"loss": "lk"}, {"cross_entropy_share": 0.1}, {"dpace": True}):
        with pytest.raises(BeagleError, match="other settings"):
            Trainer(target, store, tmp_path, replace(RUN, **other))


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("tv", {"loss": "total_variation"}),
        ("tvce", {"loss": "total_variation", "cross_entropy_share": 0.1}),
        ("lk-noreg", {"loss": "lk", "regression": 0.0}),
        ("logacc-dpace", {"loss": "log_acceptance", "dpace": True}),
        ("dpace", {"dpace": True}),
    ],
)
def test_losses_are_compared_by_name(word, changed):
    for architecture in ("beagle", "eagle-unrolled"):
        plain, other = (parse(name).settings(Recipe(), 0)[0] for name in (architecture, f"{architecture}-{word}"))
        assert other == replace(plain, **changed)


@pytest.mark.parametrize("name", ["beagle-tv-lk", "eagle-tv-tvce", "beagle-window-dpace"])
def test_a_variant_has_one_loss(name):
    with pytest.raises(BeagleError, match="contradicts a word before it"):
        parse(name)


def test_a_late_loss_without_chains_has_no_dpace():
    assert not parse("beagle-window").settings(Recipe(train=TrainConfig(dpace=True)), 0)[0].dpace
