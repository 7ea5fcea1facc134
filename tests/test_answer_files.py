"""Training on answers that exist: files of a target's answers, and dialogues that bring theirs."""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from beagle.drafters.checkpoint import load_head
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.loading import load_target
from beagle.targets.target import Target
from beagle.training import answer_files, texts
from beagle.training import states as states_module
from beagle.training.answer_files import AnswerFolder, AnswersManifest, StoredAnswer, prompt_key
from beagle.training.answers import AnswerGenerator, Sample
from beagle.training.data import collate, samples
from beagle.training.make_answers import make_answers
from beagle.training.prompts import Prompt, parse_prompt, read_prompts
from beagle.training.recipe import AnswerConfig
from beagle.training.states import StateStore, read_shard, shard_ids
from conftest import tiny_model, tiny_target, tiny_tokenizer

LIMIT = 10
PROMPTS = [
    Prompt(
        f"p{i}",
        tuple(" ".join(f"w{3 + (7 * i + 11 * t + j * j) % 60}" for j in range(1 + i % 5)) for t in range(1 + i % 3)),
        system="w50 w51" if i % 4 == 3 else "",
    )
    for i in range(12)
]
CONFIG = AnswerConfig(rows=4, max_prompt_tokens=60, max_new_tokens=LIMIT, max_turns=3, sampled_share=0.0)


@pytest.fixture(params=["llama", "gemma3_text"])
def target(request) -> Target:
    target = tiny_target(request.param)
    target.eos_ids = frozenset({2, 17, 30, 41})  # so that some answers end early
    return target


def answered(target: Target, prompts=PROMPTS) -> list[StoredAnswer]:
    """The target's own answers, turn by turn, one at a time."""
    found = []
    for prompt in prompts:
        history = [{"role": "system", "content": prompt.system}] if prompt.system else []
        for number, turn in enumerate(prompt.turns):
            history.append({"role": "user", "content": turn})
            answer = Model(target).generate(history, max_new_tokens=LIMIT + 1)
            ended = answer.token_ids[-1] in target.eos_ids
            tokens = torch.tensor(answer.token_ids)
            before = len(target.tokenizer.apply_chat_template(history, return_dict=True)["input_ids"])
            found.append(StoredAnswer(prompt_key(prompt), prompt.id, number, 0.0, ended, before, tokens))
            made = answer.token_ids[:-1] if ended else answer.token_ids
            if not made:
                break
            history.append({"role": "assistant", "content": target.tokenizer.decode(made, skip_special_tokens=True)})
    return found


def folder_of(target: Target, path, answers) -> AnswerFolder:
    folder = AnswerFolder.create(path, AnswersManifest.of(target, {"temperatures": [0.0]}))
    folder.append(answers)
    return folder


class Run:
    """Fills one store from a folder of answers; ``printed`` is what the last call printed."""

    def __init__(self, target: Target, folder) -> None:
        self.target, self.folder, self.printed = target, folder, ""

    def __call__(self, prompts, config=CONFIG, **options) -> StateStore:
        out = io.StringIO()
        try:
            return make_answers(self.target, prompts, self.folder, config, Console(file=out, width=400), **options)
        finally:
            self.printed = out.getvalue()


@pytest.fixture
def run(target, tmp_path) -> Run:
    return Run(target, tmp_path / "data")


def everything(store: StateStore) -> dict[str, Sample]:
    """Stored samples by their ids."""
    found = {}
    for shard in store.shards():
        content = read_shard(shard)
        cuts = content["offsets"][1:-1]
        states = content["states"].tensor_split(cuts) if "states" in content else [None] * len(shard_ids(shard))
        parts = content["tokens"].long().tensor_split(cuts)
        for name, *row in zip(shard_ids(shard), parts, states, content["answer_from"].tolist(), strict=True):
            assert name not in found
            found[name] = Sample(name, *row)
    return found


@pytest.fixture
def nothing_is_generated(monkeypatch):
    def refused(*_args, **_options):
        raise AssertionError("the target was asked")

    monkeypatch.setattr(AnswerGenerator, "run", refused)


# files


def rows(answers):
    return [(a.prompt, a.id, a.turn, a.temperature, a.ended, a.prompt_tokens, a.tokens.tolist()) for a in answers]


def some(count: int, *, first: int = 0, tokens: int = 10) -> list[StoredAnswer]:
    return [
        StoredAnswer(f"{first + i:016x}", f"p{i}", 0, 0.7, i % 2 == 0, 5 + i, torch.arange(tokens) + i)
        for i in range(count)
    ]


def test_answers_are_read_as_they_were_written_and_full_files_stay(tmp_path, monkeypatch):
    target = tiny_target()
    monkeypatch.setattr(answer_files, "FILE_TOKENS", 40)
    folder = folder_of(target, tmp_path, some(6))
    assert [path.name for path in folder.files()] == ["answers-00000.safetensors", "answers-00001.safetensors"]
    full = folder.files()[0].read_bytes()
    assert folder.append(some(6)) == 0
    assert folder.append([*some(6), *some(5, first=6)]) == 5
    again = AnswerFolder.open(tmp_path)
    assert rows(again.read()) == rows([*some(6), *some(5, first=6)])
    assert again.manifest == folder.manifest
    assert [len(again._read(path)) for path in again.files()] == [4, 4, 3]
    assert folder.files()[0].read_bytes() == full


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "U16"), (65_537, "I32")])
def test_token_ids_take_two_bytes_where_they_fit(tmp_path, size, dtype):
    manifest = replace(AnswersManifest.of(tiny_target(), {}), vocab_size=size)
    folder = AnswerFolder.create(tmp_path, manifest)
    largest = replace(some(1)[0], tokens=torch.tensor([3, size - 1]))
    folder.append([largest])
    assert rows(folder.read()) == rows([largest])
    with safe_open(folder.files()[0], "pt") as file:
        assert file.get_slice("tokens").get_dtype() == dtype


def test_the_key_of_a_prompt_is_fixed():
    assert prompt_key(Prompt("1", ("Grüße, 世界", "b"))) == "5fb82a2a12efa029"
    assert prompt_key(Prompt("2", ("Grüße, 世界", "b"), system="s")) == "9b9e513b7a5f0dcd"


def test_damaged_files_are_named(tmp_path):
    folder = folder_of(tiny_target(), tmp_path, some(3))
    with pytest.raises(BeagleError, match=r"holds token \d+ of a vocabulary of 4; copy or download it again"):
        AnswerFolder(tmp_path, replace(folder.manifest, vocab_size=4)).read()
    (path,) = folder.files()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BeagleError, match=r"answers-00000\.safetensors' is damaged .*; copy or download it again"):
        folder.read()
    (tmp_path / "manifest.json").write_text('{"target": "t"}')
    with pytest.raises(BeagleError, match=r"manifest\.json' is damaged"):
        AnswerFolder.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(BeagleError, match=r"holds no manifest\.json; check the path"):
        AnswerFolder.open(tmp_path)


# training from them


def test_stored_answers_give_the_samples_of_generated_ones(target, tmp_path, run):
    settings = {"rows": 4, "max_prompt_tokens": 60, "max_new_tokens": LIMIT, "max_turns": 3, "sampled_share": 0.0}
    generated = {sample.id: sample for sample in AnswerGenerator(target, AnswerConfig(**settings)).run(PROMPTS)}
    stored = everything(run(PROMPTS, answers=folder_of(target, tmp_path / "answers", answered(target))))
    assert stored.keys() == generated.keys()
    assert len({len(sample.tokens) for sample in stored.values()}) > 5  # passes are padded
    for name, sample in generated.items():
        assert torch.equal(stored[name].tokens, sample.tokens)
        assert stored[name].answer_from == sample.answer_from
        torch.testing.assert_close(stored[name].states.float(), sample.states.float(), atol=0.02, rtol=0.02)


@pytest.mark.usefixtures("nothing_is_generated")
def test_prompts_and_answers_without_each_other_are_counted(target, tmp_path, run):
    folder = folder_of(target, tmp_path / "answers", answered(target, PROMPTS[:9]))
    store = run(PROMPTS[2:], answers=folder)
    assert {name.partition("/")[0] for name in everything(store)} == {p.key for p in PROMPTS[2:9]}
    assert f"2 prompts of '{folder.folder}' are not among the given ones, and are left out" in run.printed
    assert f"3 given prompts have no answer in '{folder.folder}', and are left out" in run.printed
    with pytest.raises(BeagleError, match="answers none of the 3 prompts; give the prompts that its answers were"):
        run(PROMPTS[9:], answers=folder)


def test_tokens_alone_are_stored_where_states_are_live(tmp_path, monkeypatch):
    target = tiny_target()
    folder = folder_of(target, tmp_path / "answers", answered(target))
    whole = everything(Run(target, tmp_path / "disk")(PROMPTS, answers=folder))
    monkeypatch.setattr(Target, "prefill", None)
    live = everything(Run(target, tmp_path / "live")(PROMPTS, replace(CONFIG, states="live"), answers=folder))
    assert {n: s.tokens.tolist() for n, s in live.items()} == {n: s.tokens.tolist() for n, s in whole.items()}
    assert {s.states for s in live.values()} == {None}


def test_lengths_of_the_recipe_hold(tmp_path):
    target = tiny_target()
    target.eos_ids = frozenset()
    folder = folder_of(target, tmp_path / "answers", answered(target))
    config = replace(CONFIG, max_prompt_tokens=12, max_new_tokens=4, max_turns=2)
    run = Run(target, tmp_path / "data")
    found = everything(run(PROMPTS, config, answers=folder))
    expected = {
        f"{prompt.key}/{answer.turn}": 4 + answer.prompt_tokens
        for prompt in PROMPTS
        for answer in folder.read()
        if answer.prompt == prompt_key(prompt) and answer.turn < 2 and answer.prompt_tokens <= 12
    }
    assert {name: len(sample.tokens) for name, sample in found.items()} == expected
    passed_over = sum(answer.turn < 2 for answer in folder.read()) - len(expected)
    assert passed_over > 0
    assert f"{passed_over} turns are longer than 12 tokens" in run.printed


def test_fewer_tokens_are_the_first_of_more(tmp_path):
    target = tiny_target()
    answers = answered(target)
    folder = folder_of(target, tmp_path / "answers", answers)
    few = everything(Run(target, tmp_path / "few")(PROMPTS, replace(CONFIG, max_tokens=70), answers=folder))
    run = Run(target, tmp_path / "more")
    store = run(PROMPTS, replace(CONFIG, max_tokens=70), answers=folder)
    assert everything(store).keys() == few.keys()
    more = everything(run(PROMPTS, replace(CONFIG, max_tokens=200), answers=folder))  # goes on
    assert few.keys() < more.keys() < everything(run(PROMPTS, answers=folder)).keys()
    keys = {prompt_key(prompt): prompt.key for prompt in PROMPTS}
    order = [f"{keys[answer.prompt]}/{answer.turn}" for answer in answers if len(answer.tokens) > 1]
    assert set(order[: len(more)]) == more.keys()
    assert sum(len(s.tokens) for s in few.values()) >= 70


@pytest.mark.usefixtures("nothing_is_generated")
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    target = tiny_target()
    monkeypatch.setattr(states_module, "SHARD_TOKENS", 40)
    monkeypatch.setattr(texts, "PASS_TOKENS", 64)
    folder = folder_of(target, tmp_path / "answers", answered(target))
    whole = everything(Run(target, tmp_path / "whole")(PROMPTS, answers=folder))
    run = Run(target, tmp_path / "data")
    passes = []
    prefill = target.prefill

    def interrupted(tokens, cache):
        passes.append(tokens.shape)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return prefill(tokens, cache)

    monkeypatch.setattr(target, "prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(PROMPTS, answers=folder)
    kept = everything(StateStore.existing(run.folder))
    assert 0 < len(kept) < len(whole)
    again = everything(run(PROMPTS, answers=folder))
    assert {name: s.tokens.tolist() for name, s in again.items()} == {n: s.tokens.tolist() for n, s in whole.items()}
    assert sum(rows for rows, _ in passes[3:]) == len(whole) - len(kept)
    assert all(rows * length <= 64 + 16 * rows for rows, length in passes)
    run(PROMPTS, answers=folder)
    assert len(everything(StateStore.existing(run.folder))) == len(whole)


def test_answers_of_another_target_are_refused(target, tmp_path, run):
    folder = folder_of(target, tmp_path / "answers", answered(target, PROMPTS[:2]))
    other = Target(tiny_model(seed=1), tiny_tokenizer(), "another")
    other.eos_ids = target.eos_ids
    with pytest.raises(BeagleError, match=rf"holds answers of {target.name} made with weights .*another has"):
        Run(other, tmp_path / "other")(PROMPTS, answers=folder)
    target.tokenizer.chat_template += " "
    with pytest.raises(BeagleError, match="made with template"):
        run(PROMPTS, answers=folder)
    assert not run.folder.exists() or not list(run.folder.glob("*.safetensors"))


def test_prompts_that_are_encoded_otherwise_are_refused_by_name(tmp_path):
    target = tiny_target()
    answers = answered(target, PROMPTS[:3])
    folder = folder_of(target, tmp_path / "answers", [*answers[:-1], replace(answers[-1], prompt_tokens=99)])
    turn, have = answers[-1].turn, answers[-1].prompt_tokens
    with pytest.raises(BeagleError, match=rf"prompt 'p2': turn {turn + 1} has {have} tokens .* had 99 when") as caught:
        Run(target, tmp_path / "data")(PROMPTS[:3], answers=folder)
    assert str(folder.folder) in str(caught.value)


def test_a_store_never_mixes_sources(tmp_path):
    target = tiny_target()
    run = Run(target, tmp_path / "data")
    run(PROMPTS, answers=folder_of(target, tmp_path / "answers", answered(target)))
    with pytest.raises(BeagleError, match="made with source 'files', not None; choose another folder"):
        run(PROMPTS)


# given text

DIALOGUE = {
    "messages": [
        {"role": "system", "content": "w50"},
        {"role": "user", "content": "w3 w4"},
        {"role": "assistant", "content": "w9 w8 w7"},
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w11"},
        {"role": "user", "content": "w6"},
    ]
}


def test_dialogues_keep_their_answers():
    def answers(*talk):
        roles = {"u": "user", "a": "assistant", "s": "system"}
        messages = [{"role": roles[part[0]], "content": part[1:]} for part in talk]
        return parse_prompt({"messages": messages}, 1).answers

    assert parse_prompt(DIALOGUE, 1).answers == ("w9 w8 w7", "w11")
    assert answers("u1", "u2", "a3") == ()
    assert answers("u1", "a2", "a3", "u4", "a5") == ("2",)
    assert answers("a1", "u2", "a3") == ()
    assert answers("u1", "a ", "u2", "a2") == ()
    assert answers("sx", "u1", "a2") == ("2",)
    assert parse_prompt({"turns": ["1"]}, 1).answers == ()


@pytest.mark.usefixtures("nothing_is_generated")
def test_given_answers_are_trained_on_as_they_stand(target, run):
    prompts = [parse_prompt(DIALOGUE, 1), Prompt("2", ("w3",))]
    found = everything(run(prompts, replace(CONFIG, source="given")))
    texts = {0: "<s> w50 <s> w3 w4 <s> w9 w8 w7", 1: "<s> w50 <s> w3 w4 <s> w9 w8 w7 <s> w5 <s> w11"}
    assert {name: target.tokenizer.decode(s.tokens) for name, s in found.items()} == {
        f"{prompts[0].key}/{turn}": text for turn, text in texts.items()
    }
    for turn, answer in ((0, 3), (1, 1)):
        sample = found[f"{prompts[0].key}/{turn}"]
        assert sample.answer_from == len(sample.tokens) - answer - 1
        fresh = target.prefill(sample.tokens[None], target.new_cache(1, 64))[0]
        torch.testing.assert_close(sample.states.float(), fresh, atol=0.02, rtol=0.01)
    assert "1 prompts bring no answer to their first turn, and are left out" in run.printed


def test_given_answers_that_cannot_be(tmp_path):
    target = tiny_target()
    run, given = Run(target, tmp_path / "data"), replace(CONFIG, source="given")
    with pytest.raises(BeagleError, match="none of the prompts brings an answer"):
        run(PROMPTS, given)
    folder = folder_of(target, tmp_path / "answers", answered(target, PROMPTS[:1]))
    with pytest.raises(BeagleError, match="leave one of them out"):
        run(PROMPTS, given, answers=folder)
    half = Prompt("half", ("w3",), answers=("\ud800",))
    with pytest.raises(BeagleError, match=r"prompt 'half': .*; mend the line or pass --skip-bad-lines"):
        run([half], given)
    run([half, parse_prompt(DIALOGUE, 1)], given, skip_bad_lines=True)
    assert len(everything(StateStore.existing(run.folder))) == 2


# what is held out, and what is learned


def test_a_prompt_is_held_out_in_every_store(tmp_path, monkeypatch):
    """All its turns, however the store is cut into shards and whatever else it holds."""
    target = tiny_target()
    prompts = [Prompt(str(i), (f"w{3 + i % 60} w{3 + i // 60}", "w3")) for i in range(600)]
    states = torch.zeros(6, 32, dtype=torch.bfloat16)
    both = [Sample(f"{p.key}/{turn}", torch.arange(3, 9), states, 2) for p in prompts for turn in (0, 1)]

    def held(made, size, name):
        monkeypatch.setattr(states_module, "SHARD_TOKENS", size)
        store = StateStore(tmp_path / name, states_module.Fingerprint.of(target, 40, LIMIT))
        store.write(made)
        ids = [name for path in store.shards() for name in shard_ids(path)]
        kept = {True: [], False: []}
        for value, into in kept.items():
            for path in store.shards():
                own = shard_ids(path)
                into += [own[int(s.id.rpartition("/")[2])] for s in samples([path], validation=value)]
        assert sorted(kept[True] + kept[False]) == sorted(ids)
        return set(kept[True])

    few, more = held(both[:300], 30, "few"), held(both[::-1], 1000, "more")
    assert few == {name for name in more if name in {s.id for s in both[:300]}}
    assert 2 < len(few) < len(more)
    assert all({f"{name[:24]}/0", f"{name[:24]}/1"} <= more for name in more)


def test_the_end_of_an_answer_bears_a_loss(target):
    """The output of the last slot is compared with the state before the end, by which the target ends the answer."""
    settings = {"rows": 4, "max_prompt_tokens": 60, "max_new_tokens": LIMIT, "sampled_share": 0.0}
    made = list(AnswerGenerator(target, AnswerConfig(**settings)).run(PROMPTS))
    ended = [s for s in made if len(s.tokens) - s.answer_from - 1 < LIMIT]
    assert ended
    batch = collate(ended, target)
    label = target.logits(batch.pick(batch.states, batch.last[:, None] + 1)[:, 0]).argmax(-1)
    assert set(label.tolist()) <= target.eos_ids


# the command


@pytest.fixture
def answer_folder(folders, prompts, tmp_path):
    target = load_target(str(folders.target), dtype="float32", device="cpu")
    return folder_of(target, tmp_path / "answers", answered(target, read_prompts(prompts)))


@pytest.mark.usefixtures("nothing_is_generated")
def test_the_command_trains_from_stored_answers(train, folders, answer_folder, tmp_path):
    out = tmp_path / "run"
    ended = train(out, "--answers", answer_folder.folder)
    assert ended.code == 0, ended.err
    assert load_head(out / "head", load_target(str(folders.target), dtype="float32", device="cpu"))
    assert json.loads((out / "data" / "manifest.json").read_text())["source"] == "files"
    assert train(out, "--answers", answer_folder.folder).code == 0


@pytest.mark.usefixtures("nothing_is_generated")
def test_the_states_of_stored_answers_serve_another_run(train, beagle, folders, answer_folder, tmp_path):
    assert train(tmp_path / "run", "--answers", answer_folder.folder).code == 0
    options = ["--target", folders.target, "--device", "cpu", "--config", tmp_path / "recipe.yaml"]
    ended = beagle("train", *options, "--data", tmp_path / "run" / "data", "--out", tmp_path / "other")
    assert ended.code == 0, ended.err
    assert (tmp_path / "other" / "head").is_dir()


def test_a_generators_answers_are_collected(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    tool = importlib.import_module("collect_answers")
    made = [{"prompt": "a" * 16, "id": "p", "turn": turn, "temperature": 0.7, "prompt_tokens": 5} for turn in (0, 1)]
    tensors = {"tokens": torch.tensor([7, 2, 8, 9, 9], dtype=torch.uint16), "lengths": torch.tensor([2, 3])}
    save_file(tensors, tmp_path / "part0-00000.safetensors", metadata={"samples": json.dumps(made)})
    folder = folder_of(tiny_target(), tmp_path / "answers", tool.raw_answers(tmp_path, [2]))
    assert rows(folder.read()) == [
        ("a" * 16, "p", 0, 0.7, True, 5, [7, 2]),
        ("a" * 16, "p", 1, 0.7, False, 5, [8, 9, 9]),
    ]


def test_the_command_without_prompts_is_refused(beagle, folders, answer_folder, tmp_path):
    options = ["--target", folders.target, "--device", "cpu", "--out", tmp_path / "run"]
    refusal = beagle("train", *options, "--answers", answer_folder.folder).refusal(answer_folder.folder)
    assert "--prompts" in refusal
    assert not (tmp_path / "run").exists()


def test_answers_that_are_cut_are_counted_once(tmp_path):
    target = tiny_target()
    run = Run(target, tmp_path / "data")
    folder = folder_of(target, tmp_path / "answers", answered(target, PROMPTS[:4]))
    run(PROMPTS[:4], replace(CONFIG, max_new_tokens=3), answers=folder)
    longer = sum(len(answer.tokens) - 1 > 3 for answer in folder.read())
    assert longer > 1
    assert run.printed.count(f"{longer} answers are longer than 3 tokens, and are cut there") == 1
