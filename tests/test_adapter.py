"""LoRA adapters merged into a target when it is loaded: everywhere the answers of the fine-tune, exactly."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import beagle
from beagle.errors import BeagleError
from beagle.targets.loading import load_model, load_target
from beagle.training.states import StateStore
from conftest import own_greedy, tiny_model, tiny_tokenizer

PROMPT = "w3 w4 w5"
FLOAT = {"dtype": "float32", "device": "cpu"}


def save(folder, **options):
    """A fresh adapter of the tiny model that changes answers."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["up_proj", "q_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(1)
    get_peft_model(tiny_model(), LoraConfig(task_type=TaskType.CAUSAL_LM, **options)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    return save(tmp_path / "tuned")


def tuned(folders, adapter):
    """The base model with the adapter beside its weights, unmerged."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders.target), str(adapter)).eval()


def test_answers_are_the_adapted_models(folders, adapter):
    model = beagle.load(str(folders.target), adapter=adapter, draft=str(folders.head), **FLOAT)
    plain = beagle.load(str(folders.target), draft=None, **FLOAT)
    answer = model.generate(PROMPT, max_new_tokens=24)
    ids = tiny_tokenizer().apply_chat_template([{"role": "user", "content": PROMPT}], return_dict=True)["input_ids"]
    assert answer.token_ids == own_greedy(tuned(folders, adapter), ids, 24)
    assert answer.token_ids != plain.generate(PROMPT, max_new_tokens=24).token_ids


def test_states_are_known_by_the_merged_weights(folders, adapter, tmp_path):
    """Base, base with adapter, merged folder: two models, the last two the same."""
    model, tokenizer = load_model(str(folders.target), adapter=adapter, **FLOAT)
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    base = load_target(str(folders.target), **FLOAT).digest
    merged = load_target(str(tmp_path / "merged"), **FLOAT).digest
    assert load_target(str(folders.target), adapter=adapter, **FLOAT).digest == merged != base


def test_commands_take_an_adapter(folders, beagle, adapter, questions, tmp_path):
    """`generate`, and `eval` in all modes, transformers' own among them."""
    expected = beagle("generate", PROMPT, *folders.plain, "--adapter", adapter, "-n", 12, "--quiet").out
    assert expected.strip()
    assert expected != beagle("generate", PROMPT, *folders.plain, "-n", 12, "--quiet").out
    assert expected == beagle("generate", PROMPT, *folders.options, "--adapter", adapter, "-n", 12, "--quiet").out
    options = ["--questions", questions, *folders.options, "--modes", "plain,beagle,transformers", "-n", 8]
    ended = beagle("eval", *options, "--adapter", adapter, "--json", tmp_path / "out.json")
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["meta"]["arguments"]["adapter"] == "tuned"
    answers: dict[str, list] = {}
    for record in result["records"]:
        answers.setdefault(record["id"], []).append([turn["ids"] for turn in record["turns"]])
    assert all(len(found) == 3 and found.count(found[0]) == 3 for found in answers.values())


def test_a_head_is_trained_on_the_merged_model(train, adapter, folders, tmp_path):
    ended = train(tmp_path / "run", "--adapter", adapter)
    assert ended.code == 0, ended.err
    store = StateStore.existing(tmp_path / "run" / "data")
    assert store.fingerprint.weights == load_target(str(folders.target), adapter=adapter, **FLOAT).digest
    assert json.loads((tmp_path / "run" / "result.json").read_text())["adapter"] == "tuned"
    train(tmp_path / "run").refusal("weights")  # another model's answers


def test_the_adapters_own_tokenizer_is_taken(folders, adapter):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(adapter)
    assert load_target(str(folders.target), adapter=adapter, **FLOAT).tokenizer.chat_template == tokenizer.chat_template


def test_an_adapter_is_no_target_and_the_flag_is_named(beagle, adapter):
    beagle("generate", "w3", "--target", adapter, "--draft", "none").refusal(
        adapter, "is an adapter (LoRA)", "--adapter"
    )


def refusal(folders, folder) -> str:
    with pytest.raises(BeagleError, match=r"^adapter '") as caught:
        load_target(str(folders.target), adapter=folder, **FLOAT)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_merged_is_refused(folders, adapter, tmp_path, monkeypatch):
    assert "no adapter_config.json" in refusal(folders, tmp_path)
    tokens = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    get_peft_model(tiny_model(), tokens).save_pretrained(tmp_path / "prompt")
    assert "of type PROMPT_TUNING, and LORA alone is merged" in refusal(folders, tmp_path / "prompt")
    get_peft_model(tiny_model(hidden_size=40), LoraConfig(target_modules=["up_proj"])).save_pretrained(
        tmp_path / "wide"
    )
    assert "give the model that it was trained on" in refusal(folders, tmp_path / "wide")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'beagle-decoding[adapter]'" in refusal(folders, adapter)


def test_weights_that_are_left_over_or_missing_are_refused(folders, adapter):
    """peft warns of them and goes on, with another model than was tuned."""
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    name = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != name}, file)
    assert f"{name} is in the model alone" in refusal(folders, adapter)
    save_file({**whole, name.replace("layers.0", "layers.7"): whole[name].clone()}, file)
    assert "layers.7" in (message := refusal(folders, adapter))
    assert "is in its file alone" in message


def test_pickled_weights_are_never_read(folders, adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refusal(folders, adapter)


def test_shared_weights_are_not_merged_into_one_of_two_uses(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    options = {"r": 4, "target_modules": ["embed_tokens"], "init_lora_weights": False}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(
        BeagleError, match="another model when it is merged: one of embeddings that share their weights"
    ):
        load_target(str(tmp_path / "tied"), adapter=tmp_path / "lora", **FLOAT)


def test_vllm_takes_no_adapter(beagle, adapter):
    beagle("serve", "--engine", "vllm", "--adapter", adapter).refusal("--adapter", "--engine vllm", "merge_and_unload")
