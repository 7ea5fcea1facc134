"""Answers generated in batches, and the store that keeps them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.target import Target
from beagle.training import states as states_module
from beagle.training.answers import AnswerGenerator, Sample
from beagle.training.data import batches, collate, frequent_tokens, is_validation, samples
from beagle.training.prompts import Prompt
from beagle.training.recipe import AnswerConfig
from beagle.training.states import Fingerprint, StateStore, read_shard, shard_ids
from conftest import tiny_model, tiny_target, tiny_tokenizer

LIMIT = 10
PROMPTS = [
    Prompt(
        str(i),
        tuple(" ".join(f"w{3 + (7 * i + 11 * t + j * j) % 60}" for j in range(1 + i % 5)) for t in range(1 + i % 3)),
    )
    for i in range(12)
]


def generate(target, prompts=PROMPTS, **options) -> list[Sample]:
    settings = {"rows": 4, "max_prompt_tokens": 40, "max_new_tokens": LIMIT, "sampled_share": 0.0, **options}
    return list(AnswerGenerator(target, AnswerConfig(**settings)).run(prompts))


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def target(request):
    target = tiny_target(request.param)
    probe = target.model.generation_config.eos_token_id
    assert probe == 2
    target.eos_ids = frozenset({2, 17, 30, 41})  # so that some answers end early
    return target


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_greedy_samples_are_plain_answers_with_true_states(target, rows):
    found = {sample.id: sample for sample in generate(target, rows=rows)}
    ended = 0
    for prompt in PROMPTS:
        history = []
        for turn in range(min(2, len(prompt.turns))):
            history.append({"role": "user", "content": prompt.turns[turn]})
            plain = Model(target).generate(history, max_new_tokens=LIMIT + 1)
            sample = found.pop(f"{prompt.key}/{turn}", None)
            if len(plain.token_ids) == 1 and plain.token_ids[0] in target.eos_ids:
                assert sample is None  # an empty answer teaches nothing
                break
            answer = sample.tokens[sample.answer_from + 1 :].tolist()
            assert answer == plain.token_ids[: len(answer)]
            assert len(answer) == min(LIMIT, len(plain.token_ids) - (plain.token_ids[-1] in target.eos_ids))
            ended += plain.token_ids[-1] in target.eos_ids
            fresh = target.prefill(sample.tokens[None], target.new_cache(1, 64))[0]
            assert sample.states.dtype == torch.bfloat16
            torch.testing.assert_close(sample.states.float(), fresh, atol=0.02, rtol=0.01)
            made = [t for t in plain.token_ids if t not in target.eos_ids]
            history.append({"role": "assistant", "content": target.tokenizer.decode(made, skip_special_tokens=True)})
    assert not found
    assert ended > 0


def test_long_prompts_are_passed_over(target):
    long = Prompt("long", ("w3 " * 60,))
    assert {s.id.partition("/")[0] for s in generate(target, [long, *PROMPTS[:2]])} <= {p.key for p in PROMPTS[:2]}
    assert generate(target, [long]) == []
    assert generate(target, []) == []


def test_sampled_rows_depend_on_the_seed_alone():
    target = tiny_target()
    a, b, c = (generate(target, sampled_share=1.0, temperature=1.5, seed=s) for s in (0, 0, 1))
    assert [s.tokens.tolist() for s in a] == [s.tokens.tolist() for s in b]
    assert sorted(s.tokens.tolist() for s in a) != sorted(s.tokens.tolist() for s in c)


def fingerprint(target) -> Fingerprint:
    return Fingerprint.of(target, 40, LIMIT)


def test_store_roundtrip_in_bounded_shards(target, tmp_path, monkeypatch):
    monkeypatch.setattr(states_module, "SHARD_TOKENS", 40)
    made = generate(target)
    store = StateStore(tmp_path, fingerprint(target))
    store.write(made[:5])
    StateStore(tmp_path, fingerprint(target)).write(made[5:])  # a second run appends
    assert len(store.shards()) > 2
    assert store.done_ids() == {s.id for s in made}
    everything = samples(store.shards(), validation=False) + samples(store.shards(), validation=True)
    kept = {tuple(s.tokens.tolist()): s for s in everything}
    for sample in made:
        again = kept[tuple(sample.tokens.tolist())]
        assert torch.equal(again.states, sample.states)
        assert again.answer_from == sample.answer_from
    assert not list(tmp_path.glob(".*"))


def test_what_was_made_before_a_failure_is_kept(target, tmp_path):
    def failing():
        yield from generate(target)[:3]
        raise KeyboardInterrupt

    store = StateStore(tmp_path, fingerprint(target))
    with pytest.raises(KeyboardInterrupt):
        store.write(failing())
    assert len(store.done_ids()) == 3


def test_other_targets_states_are_not_mixed_in(target, tmp_path):
    StateStore(tmp_path, fingerprint(target))
    StateStore(tmp_path, replace(fingerprint(target), target="the same elsewhere"))
    for change in ({"weights": "other"}, {"template": "x"}, {"max_new_tokens": 11}, {"hidden_size": 8}):
        with pytest.raises(BeagleError, match=next(iter(change))) as caught:
            StateStore(tmp_path, replace(fingerprint(target), **change))
        assert str(tmp_path) in str(caught.value)
        assert "choose another folder" in str(caught.value)


@pytest.mark.parametrize("part", ["embed_tokens", "layers.1.mlp.down_proj", "norm"])
def test_a_target_fine_tuned_in_place_is_another(part):
    model = tiny_model()
    before = Fingerprint.of(Target(model, tiny_tokenizer(), "mine"), 40, LIMIT)
    model = tiny_model()
    model.get_submodule(f"model.{part}").weight.data *= 1.1
    after = Fingerprint.of(Target(model, tiny_tokenizer(), "mine"), 40, LIMIT)
    assert replace(before, weights=after.weights) == after != before


def test_a_target_in_another_dtype_is_the_same():
    models = tiny_model().to(torch.bfloat16), tiny_model().to(torch.bfloat16).float()
    one, other = (Target(model, tiny_tokenizer(), str(model.dtype)) for model in models)
    assert one.digest == other.digest != tiny_target(seed=1).digest


@pytest.fixture
def damaged(target, tmp_path):
    store = StateStore(tmp_path, fingerprint(target))
    store.write(generate(target)[:3])
    (shard,) = store.shards()
    shard.write_bytes(shard.read_bytes()[:200])
    return store, shard


def test_damaged_shard_is_named(damaged):
    _, shard = damaged
    with pytest.raises(BeagleError, match="damaged") as caught:
        read_shard(shard)
    assert str(shard) in str(caught.value)


def test_damaged_shard_is_named_on_resuming(damaged):
    store, shard = damaged
    with pytest.raises(BeagleError, match=shard.name):
        store.done_ids()


@pytest.fixture
def stored(target, tmp_path):
    """A store of one shard, and what writes other states into it."""
    store = StateStore(tmp_path, fingerprint(target))
    store.write(generate(target)[:3])
    (shard,) = store.shards()

    def rewrite(change) -> None:
        content = read_shard(shard, with_states=False) | {"states": change(read_shard(shard)["states"])}
        save_file(content, shard, metadata={"ids": json.dumps(shard_ids(shard))})

    return store, shard, rewrite


def spoiled(states: torch.Tensor) -> torch.Tensor:
    states[-1, 0] = float("nan")
    return states


def test_states_that_are_no_numbers_are_refused_and_large_ones_are_not(stored):
    _, shard, rewrite = stored
    rewrite(lambda states: torch.full_like(states, 3e38))  # their sum is infinite
    assert read_shard(shard)["states"].max() > 2.9e38
    rewrite(spoiled)
    with pytest.raises(BeagleError, match="NaN or infinite"):
        read_shard(shard)


def test_batches_are_counted_without_their_states(stored):
    store, _, rewrite = stored
    options = {"tokens": 64, "seed": 0, "epoch": 0}
    whole = [[sample.id for sample in group] for group in batches(store, **options)]
    rewrite(spoiled)
    assert [[sample.id for sample in group] for group in batches(store, **options, with_states=False)] == whole
    with pytest.raises(BeagleError, match="NaN or infinite"):
        next(batches(store, **options))


def test_damaged_manifest_is_named(target, tmp_path):
    (tmp_path / "manifest.json").write_text('{"target": ')
    with pytest.raises(BeagleError, match=r"manifest\.json"):
        StateStore(tmp_path, fingerprint(target))


def test_full_disk_is_refused_beforehand(target, tmp_path):
    store = StateStore(tmp_path, fingerprint(target))
    store.refuse_if_full(10)
    with pytest.raises(BeagleError, match="GB"):
        store.refuse_if_full(10**15)


def test_batches_cover_every_training_sample_once(target, tmp_path, monkeypatch):
    monkeypatch.setattr(states_module, "SHARD_TOKENS", 60)
    store = StateStore(tmp_path, fingerprint(target))
    store.write(generate(target))
    whole = sorted(s.id for s in samples(store.shards(), validation=False))
    orders = []
    for epoch in (0, 0, 1):
        groups = list(batches(store, tokens=64, seed=5, epoch=epoch))
        orders.append([s.id for g in groups for s in g])
        assert sorted(orders[-1]) == whole
        assert all(len(g) == 1 or len(g) * max(len(s.tokens) for s in g) <= 64 + 24 * len(g) for g in groups)
    assert orders[0] == orders[1] != orders[2]
    batch = collate(groups[0], target)
    for row, sample in enumerate(groups[0]):
        n = len(sample.tokens)
        assert torch.equal(batch.states[row, :n], sample.states.float())
        assert torch.equal(batch.embeddings[row, :n], target.embed(sample.tokens))
        assert (int(batch.first[row]), int(batch.last[row])) == (sample.answer_from, n - 2)


@pytest.mark.parametrize(("limit", "length"), [(21, 21), (2**31, 32)])
def test_padding_stays_within_the_context(target, monkeypatch, limit, length):
    """A target with learned positions has no place for more."""
    monkeypatch.setattr(target, "context_limit", limit)
    batch = collate([Sample("a", torch.ones(21, dtype=torch.long), None, 3)], target)
    assert batch.states.shape == batch.embeddings.shape == (1, length, target.hidden_size)


def test_validation_share_is_fixed():
    held = sum(is_validation(f"{i:024x}/1") for i in range(4000))
    assert 60 < held < 140


def test_frequent_tokens(target, tmp_path):
    store = StateStore(tmp_path, fingerprint(target))
    with pytest.raises(BeagleError, match="holds no answer"):
        frequent_tokens(store, 3, 64)
    tokens = torch.tensor([9, 9, 9, 9, 5, 6, 5, 6, 6, 7])
    sample = Sample("a", tokens, torch.zeros(10, 32, dtype=torch.bfloat16), 3)
    store.write([replace(sample, id=str(i)) for i in range(5)])
    assert frequent_tokens(store, 2, 64).tolist() == [5, 6]
    assert len(frequent_tokens(store, 99, 64)) == 64
    assert json.loads((tmp_path / "manifest.json").read_text())["layers"] == 3
