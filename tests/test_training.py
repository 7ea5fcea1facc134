"""Training a tiny head: the loss falls, and an interrupted run ends where a whole one does."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from beagle.decoding.stats import Stats
from beagle.drafters.base import TreePlan
from beagle.drafters.block import drop
from beagle.drafters.checkpoint import load_head
from beagle.drafters.head import BeagleHead
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.training import stages
from beagle.training import trainer as trainer_module
from beagle.training.answers import AnswerGenerator, Sample
from beagle.training.config import TrainConfig
from beagle.training.data import batches, collate, samples
from beagle.training.prompts import Prompt
from beagle.training.recipe import AnswerConfig
from beagle.training.stages import stage_loss, step_alpha
from beagle.training.states import Fingerprint, StateStore
from beagle.training.trainer import Trainer
from conftest import LIVELY, tiny_head, tiny_target
from drafting import One

PROMPTS = [Prompt(str(i), (" ".join(f"w{3 + (5 * i + j * j) % 60}" for j in range(1 + i % 5)),)) for i in range(12)]
CONFIG = TrainConfig(
    early_epochs=8,
    late_epochs=8,
    window=3,
    steps=3,
    batch_tokens=120,
    learning_rate=1e-2,
    warmup_steps=4,
    schedule="cosine",
    noise=0.05,
    regression=0.1,
    dropout=0.02,
    validate_every=5,
    checkpoint_every=4,
)


@pytest.fixture(scope="module")
def target():
    target = tiny_target()
    target.eos_ids = frozenset()
    return target


@pytest.fixture(scope="module")
def store(target, tmp_path_factory):
    store = StateStore(tmp_path_factory.mktemp("states"), Fingerprint.of(target, 20, 24))
    store.write(
        AnswerGenerator(target, AnswerConfig(rows=4, max_prompt_tokens=20, max_new_tokens=24, sampled_share=0)).run(
            PROMPTS
        )
    )
    return store


@pytest.fixture(scope="module", params=LIVELY)
def whole(request, target, store, tmp_path_factory):
    """One uninterrupted run of each architecture."""
    trainer = Trainer(target, store, tmp_path_factory.mktemp("whole"), CONFIG, {"architecture": request.param})
    trainer.train()
    return trainer


@pytest.mark.parametrize("stage", ["early", "late"])
def test_both_losses_fall(target, store, whole, stage, monkeypatch):
    group = samples(store.shards(), validation=False)
    batch = collate(group, target)
    noise, untrained = torch.zeros_like(batch.states), tiny_head(target, **whole.head_options)

    def loss(head):
        return float(stage_loss(head, batch, whole.lm_head, CONFIG, stage=stage, offset=1, noise=noise)[1])

    before, after = loss(untrained), loss(whole.head)
    ordinary = stages.slot_losses
    monkeypatch.setattr(stages, "slot_losses", lambda p, t, *rest, **options: ordinary(t, t, *rest, **options))
    entropy = loss(untrained)  # of the target's own distributions: no head gets below
    assert entropy < after
    assert after - entropy < 0.6 * (before - entropy)
    assert sum(step_alpha(whole.head, target, [group], 3)[0]) > sum(step_alpha(untrained, target, [group], 3)[0])


def test_the_early_stage_can_have_a_window_of_its_own(target, store, tmp_path, monkeypatch):
    """Every step of each stage is given that stage's window, and offsets that lie in it."""
    seen: dict[str, set[tuple[int, int]]] = {}
    ordinary = stages.STAGES[BeagleHead]

    def watched(stage, function):
        def watch(head, batch, keys_from, window, offset, *steps):
            seen.setdefault(stage, set()).add((window, offset))
            return function(head, batch, keys_from, window, offset, *steps)

        return watch

    monkeypatch.setitem(
        stages.STAGES, BeagleHead,
        replace(ordinary, early=watched("early", ordinary.early), late=watched("late", ordinary.late)),
    )  # fmt: skip
    Trainer(target, store, tmp_path, replace(CONFIG, early_window=1, early_epochs=6, late_epochs=6)).train()
    assert seen == {"early": {(1, 0)}, "late": {(3, 0), (3, 1), (3, 2)}}


@pytest.mark.parametrize("architecture", LIVELY)
@pytest.mark.parametrize("stage", ["early", "late"])
@pytest.mark.parametrize("fast", [True, False])
def test_autocast_multiplies_in_bfloat16_only_where_the_machine_does(
    target, store, tmp_path, monkeypatch, architecture, stage, fast
):
    monkeypatch.setattr(trainer_module, "pick_dtype", lambda *_: torch.bfloat16 if fast else torch.float32)
    kinds: set[torch.dtype] = set()
    losses = {}
    for autocast in (False, True):
        config = replace(CONFIG, autocast=autocast, dropout=0.0, early_epochs=int(stage == "early"))
        trainer = Trainer(target, store, tmp_path / f"{autocast}", config, {"architecture": architecture})
        trainer.head.train()
        trainer.head.q_proj.register_forward_hook(lambda _, __, out, on=autocast: kinds.add(out.dtype) if on else None)
        losses[autocast] = trainer._one(samples(store.shards(), validation=False)[:4])
        assert {p.dtype for p in trainer.head.parameters()} == {torch.float32}
        assert trainer.lm_head[0].dtype == (torch.bfloat16 if autocast and fast else torch.float32)
    assert kinds == {torch.bfloat16 if fast else torch.float32}
    assert losses[True] == (pytest.approx(losses[False], rel=0.02) if fast else losses[False])


@pytest.mark.parametrize("p", [0.15, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(3, 333, 101, requires_grad=True)  # no multiple of the bytes in a draw
    out = drop(x, p)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())
    kept = (out > 0).float()
    assert float(kept.mean()) == pytest.approx(1 - p, abs=0.01)
    assert float(out.detach().mean()) == pytest.approx(1, abs=0.01 if p < 0.9 else 0.1)
    beside = (kept - kept.mean())[..., :-1] * (kept - kept.mean())[..., 1:]
    assert float(beside.mean()) == pytest.approx(0, abs=0.005)  # eight to a draw, each on its own
    assert not torch.equal(out, drop(x, p))


def test_run_leaves_a_log_and_a_usable_head(target, whole, tmp_path):
    assert whole.step == whole.total == 16 * whole.per_epoch
    rows = list(csv.DictReader((whole.out / "log.csv").open()))
    assert [int(r["step"]) for r in rows][:2] == [5, 10]
    assert int(rows[-1]["step"]) == whole.total
    assert {r["stage"] for r in rows} == {"early", "late"}
    whole.export(tmp_path, {"steps": whole.step})
    drafter = HeadDrafter(target, load_head(tmp_path, target))
    plain, drafted = Model(target), Model(target, drafter, TreePlan("chain", depth=3))
    stats = Stats()
    for prompt in PROMPTS:
        answer = drafted.generate(prompt.turns[0], max_new_tokens=24)
        assert answer.token_ids == plain.generate(prompt.turns[0], max_new_tokens=24).token_ids
        stats.add(answer.stats)
    assert stats.tau > 1.7


def test_architectures_are_no_settings_of_one_run(target, store, whole):
    other = next(name for name in LIVELY if name != whole.head.architecture)
    with pytest.raises(BeagleError, match="other settings"):
        Trainer(target, store, whole.out, CONFIG, {"architecture": other})


def test_step_alpha_is_that_of_chain_drafts(target, whole):
    """Counted the long way: a draft from every slot of a greedy answer, as far as it holds."""
    ids = [5, 9, 33]
    tokens = ids + Model(target).generate("w5 w9 w33", raw=True, max_new_tokens=20).token_ids
    states = target.prefill(torch.tensor([tokens]), target.new_cache(1, 32))[0]
    truth = [0, *target.logits(states).argmax(-1).tolist()]  # truth[i]: the token after i - 1 others
    assert truth[3:-1] == tokens[3:]
    whole.head.eval()
    found, drafts = step_alpha(whole.head, target, [[Sample("0", torch.tensor(tokens), states, 2)]], 4)
    drafter = One(HeadDrafter(target, copy.deepcopy(whole.head)))
    tried, right = [0] * 4, [0] * 4
    for base in range(2, len(tokens) - 1):
        drafter.begin(tokens[: base + 1], states[: base + 1])
        draft = drafter.draft(tokens[base + 1], TreePlan("chain", depth=4))
        for j, token in enumerate(draft.tokens[: len(tokens) - 1 - base]):
            tried[j] += 1
            if token != truth[base + j + 2]:
                break
            right[j] += 1
    assert right[0] > 0
    assert drafts == tried
    assert found == pytest.approx([r / max(1, t) for r, t in zip(right, tried, strict=True)])


def same_weights(a: Trainer, b: Trainer) -> bool:
    theirs = b.head.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.head.state_dict().items())


@pytest.mark.parametrize("stops", [[0.0], [0.0] * 7])
def test_resumed_run_ends_bitwise_like_a_whole_one(target, store, whole, tmp_path, stops):
    for seconds in stops:
        Trainer(target, store, tmp_path, CONFIG, whole.head_options).train(seconds=seconds)
    resumed = Trainer(target, store, tmp_path, CONFIG, whole.head_options)
    assert resumed.step == len(stops)
    resumed.train()
    assert resumed.step == whole.total
    assert same_weights(resumed, whole)


def test_killed_run_resumes_from_its_last_checkpoint(target, store, whole, tmp_path, monkeypatch):
    killed = Trainer(target, store, tmp_path, CONFIG, whole.head_options)
    one = killed._one

    def dies(group):
        if killed.step == 10:
            raise SystemError("power cut")
        return one(group)

    monkeypatch.setattr(killed, "_one", dies)
    with pytest.raises(SystemError):
        killed.train()
    resumed = Trainer(target, store, tmp_path, CONFIG, whole.head_options)
    assert resumed.step == 8
    resumed.train()
    assert same_weights(resumed, whole)


def test_interrupted_run_saves(target, store, whole, tmp_path, monkeypatch):
    trainer = Trainer(target, store, tmp_path, CONFIG, whole.head_options)
    one = trainer._one
    monkeypatch.setattr(
        trainer, "_one", lambda g: one(g) if trainer.step < 6 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert Trainer(target, store, tmp_path, CONFIG, whole.head_options).step == 6


def test_finished_run_stays_as_it_is(target, store, whole):
    again = Trainer(target, store, whole.out, CONFIG, whole.head_options)
    assert again.step == again.total
    again.train()
    assert same_weights(again, whole)


@pytest.mark.parametrize(
    ("config", "head"), [({"learning_rate": 1.0}, {}), ({"seed": 1}, {}), ({}, {"num_kv_heads": 2})], ids=str
)
def test_other_settings_are_refused(target, store, whole, config, head):
    settings = TrainConfig(**{**CONFIG.__dict__, **config})
    with pytest.raises(BeagleError, match="other settings") as caught:
        Trainer(target, store, whole.out, settings, {**whole.head_options, **head})
    assert str(whole.out) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 20, -100])
def test_corrupt_checkpoint_is_refused(target, store, whole, tmp_path, keep):
    content = (whole.out / "checkpoint.safetensors").read_bytes()
    (tmp_path / "checkpoint.safetensors").write_bytes(content[:keep])
    with pytest.raises(BeagleError, match="corrupt") as caught:
        Trainer(target, store, tmp_path, CONFIG, whole.head_options)
    assert "delete it to start over" in str(caught.value)


def test_checkpoint_without_progress_is_refused(target, store, whole, tmp_path):
    save_file(load_file(whole.out / "checkpoint.safetensors"), tmp_path / "checkpoint.safetensors")
    with pytest.raises(BeagleError, match="corrupt"):
        Trainer(target, store, tmp_path, CONFIG)


def test_trimmed_vocabulary_survives_resuming(target, store, tmp_path):
    config = TrainConfig(**{**CONFIG.__dict__, "draft_vocab_size": 16})
    first = Trainer(target, store, tmp_path, config)
    first.train(seconds=0)
    again = Trainer(target, store, tmp_path, config)
    assert torch.equal(first.head.draft_vocab, again.head.draft_vocab)
    assert torch.equal(first.lm_head[0], again.lm_head[0])
    assert again.lm_head[0].shape[0] == 16


def test_schedules(target, store, tmp_path):
    trainer = Trainer(target, store, tmp_path, CONFIG)
    rates = [trainer.learning_rate(step) for step in range(trainer.total + 1)]
    assert rates[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(2e-4)
    assert json.loads((tmp_path / "run.json").read_text())["train"]["window"] == 3


def test_diverged_run_says_so(target, store, tmp_path):
    trainer = Trainer(target, store, tmp_path, CONFIG)
    with torch.no_grad():
        trainer.head.q_proj.weight.fill_(float("nan"))
    with pytest.raises(BeagleError, match="diverged at step 0"):
        trainer.train()


def test_epochs_of_unequal_length_come_to_an_end(target, tmp_path, monkeypatch):
    random = torch.Generator().manual_seed(0)
    store = StateStore(tmp_path / "states", Fingerprint.of(target, 20, 24))
    lengths = torch.randint(5, 24, (40,), generator=random).tolist()
    store.write(
        Sample(str(i), torch.full((n,), 5), torch.zeros(n, 32, dtype=torch.bfloat16), 1) for i, n in enumerate(lengths)
    )
    counts = [sum(1 for _ in batches(store, tokens=70, seed=0, epoch=e)) for e in range(30)]
    assert len(set(counts)) > 1  # else this store tests nothing
    settings = {**CONFIG.__dict__, "early_epochs": 15, "late_epochs": 15, "batch_tokens": 70, "validate_every": 9999}
    trainer = Trainer(target, store, tmp_path / "run", TrainConfig(**settings))
    readings = []

    def counted(*args, **options):
        readings.append(options["epoch"])
        assert len(readings) < 100, f"epoch {readings[-1]} is read over and over"
        return batches(*args, **options)

    monkeypatch.setattr(trainer_module, "batches", counted)
    trainer.train()
    assert trainer.step == trainer.total


def test_a_run_from_before_an_option_existed_goes_on(target, store, tmp_path):
    first = Trainer(target, store, tmp_path, CONFIG)
    identity = first.identity()
    del identity["train"]["beta_decay"]
    first.identity = lambda: identity
    first.train(seconds=0)
    assert Trainer(target, store, tmp_path, CONFIG).step == 1
    other = TrainConfig(**{**CONFIG.__dict__, "beta_decay": False})
    with pytest.raises(BeagleError, match="other settings"):
        Trainer(target, store, tmp_path, other)
