"""A run's folder: one run at a time, a log with every step once, and what is refused before it is touched."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from beagle.drafters.checkpoint import load_head
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.target import Target
from beagle.training.answers import AnswerGenerator
from beagle.training.config import TrainConfig
from beagle.training.data import collate, samples
from beagle.training.folder import alone
from beagle.training.pipeline import train_head
from beagle.training.prompts import Prompt
from beagle.training.recipe import AnswerConfig, Recipe
from beagle.training.states import Fingerprint, StateStore
from beagle.training.trainer import Trainer
from conftest import FAMILIES, SMALL, tiny_model, tiny_target, tiny_tokenizer
from training_runs import interrupt_after, stored


def log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_second_run_in_one_folder_is_refused_while_the_first_lives(train, tmp_path):
    out = tmp_path / "run"
    hold = f"import time\nfrom beagle.training.folder import alone\nfrom pathlib import Path\nwith alone(Path({str(out)!r})):\n print('in', flush=True)\n time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        train(out).refusal(out, f"process {first.pid}", "choose another folder")
        assert not (out / "data").exists()
    finally:
        first.kill()  # as a crash does: nothing is cleaned up
        first.wait()
    assert train(out).code == 0


def test_a_second_run_that_fills_the_same_data_is_refused(train, tmp_path):
    with alone(tmp_path / "data", ".answers.lock"):
        train(tmp_path / "run", "--data", tmp_path / "data").refusal(tmp_path / "data", "in use by another run")
    assert train(tmp_path / "run", "--data", tmp_path / "data", "--seconds", 0).code == 0


def test_answers_may_lie_in_the_folder_of_the_run(train, tmp_path):
    assert train(tmp_path / "run", "--data", tmp_path / "run").code == 0


def test_a_killed_run_leaves_no_line_twice(train, tmp_path, monkeypatch):
    assert train(tmp_path / "whole").code == 0
    one = Trainer._one

    def killed(self, group):
        if self.step == 7:  # a checkpoint stands at 4, a line of the log at 5
            raise SystemError("power cut")
        return one(self, group)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_one", killed)
        assert train(tmp_path / "run").code == 1
    assert [row["step"] for row in log(tmp_path / "run")] == ["5"]
    assert train(tmp_path / "run").code == 0
    steps, whole = ([row["step"] for row in log(tmp_path / name)] for name in ("run", "whole"))
    assert steps == whole
    assert len(set(steps)) == len(steps) > 2


def test_a_run_killed_before_its_first_checkpoint_begins_its_log_anew(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", lambda self: None)
        interrupt_after(patched, 6)
        assert train(tmp_path / "run").code == 130
    assert [row["step"] for row in log(tmp_path / "run")] == ["5"]
    assert train(tmp_path / "run").code == 0
    steps = [int(row["step"]) for row in log(tmp_path / "run")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("more", [12, 40])
def test_more_prompts_on_a_finished_run_go_on_in_its_late_stage(train, tmp_path, more):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": f"w{i + 3} w{i + 9}"}) + "\n" for i in range(6)))
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"w{i + 3} w{i + 5}"}) + "\n" for i in range(more)))
    out = tmp_path / "run"
    assert train(out, "--prompts", few).code == 0
    before = len(stored(out))
    ended = log(out)[-1]
    assert train(out, "--prompts", many).code == 0
    assert len(stored(out)) > before
    rows = log(out)
    assert int(rows[-1]["step"]) > int(ended["step"])
    stages = [row["stage"] for row in rows]
    assert stages == sorted(stages)  # early, then late
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))


def test_other_settings_are_refused_before_the_answers(train, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert train(out, "--limit", 5, "--seconds", 0).code == 0
    train(out, train={"noise": 0.1}).refusal(out, "other settings")
    (out / "checkpoint.safetensors").write_bytes(b"cut")
    train(out).refusal("checkpoint.safetensors", "corrupt")
    assert len(stored(out)) == 5


def test_a_head_that_cannot_be_built_is_refused_before_the_answers(train, tmp_path):
    for settings in ({"num_heads": 3, "num_kv_heads": 2}, {"hidden_act": "none such"}, {"head_dim": 7}):
        train(tmp_path / "run", head=settings).refusal("no head with these settings", "head section of the recipe")
    assert not (tmp_path / "run" / "data").exists()


def test_a_mistyped_data_folder_is_not_made(folders, beagle, tmp_path):
    options = ["--target", folders.target, "--out", tmp_path / "run", "--data", tmp_path / "dtaa"]
    beagle("train", *options).refusal(tmp_path / "dtaa", "holds no answers")
    assert not (tmp_path / "dtaa").exists()
    assert not (tmp_path / "run").exists()
    with pytest.raises(BeagleError, match="holds no answers"):
        train_head(tiny_target(), None, tmp_path / "run", Recipe(), data=tmp_path / "dtaa", console=Console())
    assert not (tmp_path / "dtaa").exists()


def test_an_adapter_is_no_target(beagle, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    (tmp_path / "lora" / "adapter_model.safetensors").write_text("")
    ended = beagle("generate", "w3", "--target", tmp_path / "lora", "--draft", "none")
    ended.refusal(tmp_path / "lora", "adapter (LoRA)", "merge_and_unload")


def test_questions_that_the_template_refuses_are_named_before_the_first(beagle, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<s> {{ m['content'] }} {% endfor %}<s>"
    )
    tiny_model().save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": "w3 w4"}, {"system": "w9", "prompt": "w5"}, {"prompt": "w6 w7"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--questions", path, "--target", tmp_path / "target", "--draft", "none", "--modes", "plain", "-n", 4]
    options += ["--dtype", "float32", "--device", "cpu", "--json", tmp_path / "out.json"]
    beagle("eval", *options).refusal(f"{path}:2: ", "no system role", "--skip-bad-lines")
    assert not (tmp_path / "out.json").exists()
    ended = beagle("eval", *options, "--skip-bad-lines")
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "out.json").read_text())["meta"]["finished_questions"] == 2


def test_system_messages_of_questions_reach_the_model(folders, beagle, tmp_path):
    """A question with one is answered like the dialogue that it is."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"system": "w9 w8", "prompt": "w5"}) + "\n")
    options = ["--target", folders.target, "--draft", "none", "--dtype", "float32", "--device", "cpu", "-n", 8]
    out = tmp_path / "out.json"
    assert beagle("eval", "--questions", path, "--modes", "plain", *options, "--json", out).code == 0
    dialogue = [{"role": "system", "content": "w9 w8"}, {"role": "user", "content": "w5"}]
    expected = Model(tiny_target()).generate(dialogue, max_new_tokens=8).token_ids
    other = Model(tiny_target()).generate("w5", max_new_tokens=8).token_ids
    (record,) = json.loads(out.read_text())["records"]
    assert record["turns"][0]["ids"] == expected != other


GEMMA4 = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
}
TARGETS = {
    "gemma2": {**SMALL, **FAMILIES["gemma2"]},
    "gemma3_text": {**SMALL, **FAMILIES["gemma3_text"]},
    "cohere2": SMALL,
    "cohere2_moe": SMALL,
    "gemma4_text": {**SMALL, **GEMMA4},
    "gemma3": {"text_config": {**SMALL, **FAMILIES["gemma3_text"]}},  # these also see
    "gemma4": {"text_config": {**SMALL, **GEMMA4, "final_logit_softcapping": 0.5}},
    "fuyu": {"text_config": {**SMALL, "model_type": "persimmon"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TARGETS)
def test_a_head_is_trained_for_every_family_whatever_its_config_calls_things(family, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TARGETS[family])
    config._attn_implementation = "eager"
    target = Target(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer(), family)
    prompts = [Prompt(str(i), (f"w{i + 3} w{i + 9}",)) for i in range(6)]
    recipe = Recipe(
        AnswerConfig(rows=4, max_prompt_tokens=20, max_new_tokens=8, sampled_share=0.0),
        TrainConfig(early_epochs=1, late_epochs=1, window=2, steps=2, warmup_steps=1),
    )
    folder = train_head(target, prompts, tmp_path / "run", recipe, console=Console(file=io.StringIO()))
    head = load_head(folder, target)
    assert (head.config.num_heads, head.config.head_dim) == (4, 8)
    drafted = Model(target, HeadDrafter(target, head))
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 12, "temperature": temperature}
        assert drafted.generate("w3 w4", **options).token_ids == Model(target).generate("w3 w4", **options).token_ids
    assert target.context_limit == config.get_text_config().max_position_embeddings


def test_the_cap_of_the_logits_is_the_language_models():
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma4", **TARGETS["gemma4"])
    config._attn_implementation = "eager"
    target = Target(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer(), "gemma4")
    logits = target.logits(100 * torch.randn(1, 32))
    assert float(logits.abs().max()) == pytest.approx(0.5, abs=1e-3)


def test_the_end_of_an_answer_is_trained_on(tmp_path):
    """The state whose next token ends the answer is stored, and it is what the last slot's output is compared with."""
    target = tiny_target()
    first = Model(target).generate("w5 w9", max_new_tokens=6).token_ids
    target.eos_ids = frozenset({next(token for n, token in enumerate(first) if n and first.index(token) == n)})
    answer = Model(target).generate("w5 w9", max_new_tokens=12).token_ids
    assert answer[-1] in target.eos_ids
    (sample,) = AnswerGenerator(target, AnswerConfig(rows=1, sampled_share=0.0)).run([Prompt("1", ("w5 w9",))])
    assert sample.tokens[sample.answer_from + 1 :].tolist() == answer[:-1]
    store = StateStore(tmp_path, Fingerprint.of(target, 384, 192))
    store.write([sample] * 9)
    batch = collate(samples(store.shards(), validation=False)[:1], target)
    compared = batch.pick(batch.states, batch.last[:, None] + 1)[0, 0]
    assert int(target.logits(compared).argmax()) == answer[-1]
