"""What the target is asked for training: which prompts, in which form, and what is refused before and while it answers."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

from beagle.decoding.decoder import Decoder
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.target import Target
from beagle.training.answers import AnswerGenerator, Sample
from beagle.training.config import TrainConfig
from beagle.training.data import frequent_tokens, samples
from beagle.training.make_answers import make_answers
from beagle.training.pipeline import train_head
from beagle.training.prompts import Prompt, numbered
from beagle.training.recipe import AnswerConfig, Recipe
from beagle.training.states import Fingerprint, StateStore, read_shard
from beagle.training.trainer import Trainer
from conftest import tiny_model, tiny_target, tiny_tokenizer

PROMPTS = [Prompt(str(i), (f"w{i + 3} w{2 * i + 9}", f"w{i + 5}")) for i in range(8)]
ANSWERS = AnswerConfig(rows=4, max_prompt_tokens=40, max_new_tokens=8, sampled_share=0.0)
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "<s> {{ m['content'] }} {% endfor %}<s>"
)


@pytest.fixture
def target() -> Target:
    target = tiny_target()
    target.eos_ids = frozenset()
    return target


class Run:
    """Fills one store; ``printed`` is what the last call printed."""

    def __init__(self, target: Target, folder) -> None:
        self.target, self.folder, self.printed = target, folder, ""

    def __call__(self, prompts, config=ANSWERS, **options) -> StateStore:
        out = io.StringIO()
        try:
            return make_answers(self.target, prompts, self.folder, config, Console(file=out, width=400), **options)
        finally:
            self.printed = out.getvalue()

    def asked(self) -> list[str]:
        """Text of every stored prompt, sorted."""
        found = []
        for shard in StateStore.existing(self.folder).shards():
            content = read_shard(shard)
            parts = content["tokens"].tensor_split(content["offsets"][1:-1])
            for part, first in zip(parts, content["answer_from"].tolist(), strict=True):
                found.append(self.target.tokenizer.decode(part[: first + 1]))
        return sorted(found)


@pytest.fixture
def answers(target, tmp_path) -> Run:
    return Run(target, tmp_path / "data")


def test_another_file_with_the_same_ids_is_answered(answers):
    one = [Prompt("1", ("w3 w4",)), Prompt("2", ("w5",))]
    other = [Prompt("1", ("w6 w7",)), Prompt("2", ("w5",))]
    answers(one)
    answers(other)
    assert answers.asked() == ["<s> w3 w4 <s>", "<s> w5 <s>", "<s> w6 w7 <s>"]


def test_ids_that_repeat_end_no_resume_early(answers, monkeypatch):
    prompts = [Prompt("None", (f"w{i + 3}",)) for i in range(6)]
    run = AnswerGenerator.run

    def interrupted(self, prompts):
        for i, sample in enumerate(run(self, prompts)):
            if i == 2:
                raise KeyboardInterrupt
            yield sample

    with monkeypatch.context() as patched:
        patched.setattr(AnswerGenerator, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answers(prompts)
    answers(prompts)
    assert answers.asked() == sorted(f"<s> {p.turns[0]} <s>" for p in prompts)


def test_a_prompt_that_stands_twice_is_sampled_twice(answers):
    same = [Prompt("a", ("w3 w4",)), Prompt("b", ("w3 w4",))]
    config = replace(ANSWERS, sampled_share=1.0, temperature=2.0)
    one, other = _all(answers(same, config))
    assert one.tokens.tolist() != other.tokens.tolist()
    answers(same, config)
    assert len(answers.asked()) == 2


def _all(store):
    return samples(store.shards(), validation=False) + samples(store.shards(), validation=True)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_interrupted_dialogue_is_answered_whole(target, tmp_path, monkeypatch, share):
    """All turns are there in the end, and are what one run without a break would have made of them."""
    config = replace(ANSWERS, sampled_share=share, rows=2)
    whole, run = Run(target, tmp_path / "whole"), Run(target, tmp_path / "run")
    whole(PROMPTS, config)
    step, steps = Decoder.step, []

    def interrupted(self):
        steps.append(0)
        if len(steps) == 30:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(PROMPTS, config)
    before = StateStore.existing(run.folder).done_ids()
    run(PROMPTS, config)
    after = StateStore.existing(run.folder).done_ids()
    assert set() < before < after == {f"{p.key}/{turn}" for p in PROMPTS for turn in (0, 1)}
    found = ({tuple(s.tokens.tolist()) for s in _all(StateStore.existing(r.folder))} for r in (whole, run))
    assert next(found) == next(found)


def test_system_messages_stand_before_the_question(answers):
    answers([Prompt("1", ("w3", "w4"), system="w9 w8")])
    first, second = answers.asked()
    assert first == "<s> w9 w8 <s> w3 <s>"
    assert second.startswith(f"{first} ")
    assert second.endswith(" <s> w4 <s>")


def test_dialogues_that_the_template_refuses_are_named_before_the_first_answer(answers, target, capsys):
    target.tokenizer.chat_template = REFUSES_SYSTEM
    good, bad = Prompt("1", ("w3",), source="p.jsonl:1"), Prompt("2", ("w4",), system="w9", source="p.jsonl:2")
    with pytest.raises(BeagleError, match=r"^p\.jsonl:2: .*no system role here.*--skip-bad-lines"):
        answers([good, bad])
    assert not list(answers.folder.glob("shard-*"))
    answers([good, bad], skip_bad_lines=True)
    assert answers.asked() == ["<s> w3 <s>"]
    assert "skipped p.jsonl:2" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(BeagleError, match="takes none of the 1 prompts"):
        answers([bad], skip_bad_lines=True)


def test_base_models_are_trained_on_raw_text(answers, target):
    target.tokenizer.chat_template = None
    answers([Prompt("1", ("w3 w4", "w5"), system="w9"), Prompt("2", ("w6",))])
    assert answers.asked() == ["w3 w4", "w6"]
    assert answers.printed.count("has no chat template: prompts are taken as raw text") == 1
    expected = Model(target).generate("w6", max_new_tokens=8).token_ids
    found = [s for s in _all(StateStore.existing(answers.folder)) if s.tokens[0] == 6]
    assert found[0].tokens[1:].tolist() == expected


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    target = Target(tiny_model(vocab_size=40), tiny_tokenizer(), "small")
    bad = Prompt("2", ("w5 w50",), source="p.jsonl:2")
    answers = Run(target, tmp_path)
    with pytest.raises(BeagleError, match=r"p\.jsonl:2: small: its tokenizer makes token 50 .* 40 tokens"):
        answers([Prompt("1", ("w3",)), bad])
    assert not list(tmp_path.glob("shard-*"))
    for raw in (True, False):
        with pytest.raises(BeagleError, match="makes token 50"):
            Model(target).generate("w5 w50", raw=raw)
    answers([Prompt("1", ("w3 w4",)), bad], skip_bad_lines=True)
    assert answers.asked() == ["<s> w3 w4 <s>"]


def test_a_text_without_a_token_is_refused(target):
    target.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("w9", "")
    with pytest.raises(BeagleError, match="finds no token"):
        Model(target).generate("w9", raw=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_states_that_are_no_numbers_are_refused_when_made(answers, target, value, share, monkeypatch):
    verify = target.verify

    def broken(*args, **options):
        states = verify(*args, **options)
        states[0, 3] = value
        return states

    monkeypatch.setattr(target, "verify", broken)
    prompt = Prompt("1", ("w3",), source="p.jsonl:1")
    with pytest.raises(BeagleError, match=r"p\.jsonl:1: .*tiny-llama in float32"):
        answers([prompt], replace(ANSWERS, sampled_share=share))
    assert not list(answers.folder.glob("shard-*"))


def test_half_precision_has_float32_as_its_remedy(tmp_path):
    target = tiny_target(dtype=torch.float16)
    target.eos_ids = frozenset()
    target.model.model.norm.weight.data.fill_(60_000.0)
    with pytest.raises(BeagleError, match=r"in float16.*load it with dtype float32"):
        Run(target, tmp_path)([PROMPTS[0]])


def test_stored_states_that_are_no_numbers_are_named(answers, target, tmp_path):
    store = answers(PROMPTS)
    (shard,) = store.shards()
    content = load_file(shard)
    content["states"][5, 3] = float("nan")
    save_file(content, shard, metadata={"ids": json.dumps(sorted(store.done_ids()))})
    config = TrainConfig(early_epochs=1, late_epochs=1, window=2, steps=2)
    with pytest.raises(BeagleError, match=r"NaN or infinite hidden states.*; delete it") as caught:
        Trainer(target, store, tmp_path / "run", config).train()
    assert str(shard) in str(caught.value)


def test_live_states_that_are_no_numbers_are_named(target, answers, tmp_path):
    store = answers(PROMPTS, replace(ANSWERS, states="live"))
    config = TrainConfig(early_epochs=1, late_epochs=1, window=2, steps=2)
    trainer = Trainer(target, store, tmp_path / "run", config)
    target.model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(BeagleError, match="the hidden states of tiny-llama are NaN or infinite"):
        trainer.train()


def test_tokens_that_end_an_answer_are_always_drafted(tmp_path):
    """Stored answers lack them: the last token has not been run."""
    target = tiny_target()
    store = StateStore(tmp_path / "data", Fingerprint.of(target, 40, 8))
    tokens = torch.tensor([9, 9, 5, 5, 5, 6, 6, 7])
    states = torch.randn(8, 32).bfloat16()
    store.write([Sample(f"{i}/0", tokens, states, 1) for i in range(5)])
    assert frequent_tokens(store, 2, 64).tolist() == [5, 6]
    assert frequent_tokens(store, 3, 64, {2, 11, 99}).tolist() == [2, 5, 11]
    config = TrainConfig(early_epochs=1, late_epochs=1, window=2, steps=2, draft_vocab_size=3)
    assert Trainer(target, store, tmp_path / "run", config).head.draft_vocab.tolist() == [2, 5, 6]


@pytest.mark.parametrize("size", [1, 2, 65])
def test_a_draft_vocabulary_that_cannot_be_is_refused_before_the_answers(target, tmp_path, size):
    target.eos_ids = frozenset({2, 3})
    recipe = Recipe(ANSWERS, TrainConfig(draft_vocab_size=size))
    with pytest.raises(BeagleError, match=f"draft_vocab_size is {size}, .* from 3 to 64"):
        train_head(target, PROMPTS, tmp_path / "run", recipe, console=Console(file=io.StringIO()))
    assert not (tmp_path / "run" / "data").exists()


def test_reasons_of_a_run_without_answers(target, answers):
    with pytest.raises(BeagleError, match=r"1 longer than 40 tokens; .*raise answers\.max_prompt_tokens$"):
        answers([Prompt("1", ("w3 " * 50,))])
    assert "1 turns are longer than 40 tokens" in answers.printed
    target.eos_ids = frozenset(range(64))
    with pytest.raises(BeagleError, match="8 with an empty answer, which tiny-llama ends at once") as caught:
        answers(PROMPTS)
    assert "longer" not in str(caught.value)


def test_answers_held_out_for_validation_are_not_called_short(target, answers, tmp_path):
    config = TrainConfig(early_epochs=1, late_epochs=1, window=2, steps=2)
    store = answers([Prompt("1", ("w15",))])
    with pytest.raises(BeagleError, match="holds 1 answers, all of them held out for validation; give more prompts"):
        Trainer(target, store, tmp_path / "run", config)
    with pytest.raises(BeagleError, match="held out for validation"):
        Trainer(target, store, tmp_path / "run", replace(config, draft_vocab_size=9))


def test_states_without_a_manifest_are_nobodys(target, answers):
    store = answers(PROMPTS)
    (answers.folder / "manifest.json").unlink()
    for again in (lambda: answers(PROMPTS), lambda: StateStore.existing(store.folder)):
        with pytest.raises(BeagleError, match=r"no manifest\.json says of which target"):
            again()
    assert not (answers.folder / "manifest.json").exists()


def test_numbers_of_repeated_prompts_are_their_own():
    assert [p.repeat for p in numbered([PROMPTS[0], PROMPTS[1], PROMPTS[0], replace(PROMPTS[0], system="s")])] == [
        0,
        0,
        1,
        0,
    ]
