"""A model's generation config: the tokens that end an answer are taken from it, and nothing else."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

import beagle
from beagle.evaluation.hf_generate import HF_MODES
from beagle.evaluation.modes import Drafts, Options, load_systems
from beagle.model import Model
from beagle.targets.generation import CHANGES, left_out
from beagle.targets.loading import load_target
from conftest import tiny_model, tiny_target, tiny_tokenizer

PROMPTS = ["w5 w9 w33 w12", "w7", "w40 w41 w42 w9"]
SETTINGS = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [20, 40, 41],
    "begin_suppress_tokens": [62],
    "forced_eos_token_id": 2,
    "forced_bos_token_id": 9,
    "min_length": 12,
    "bad_words_ids": [[18], [38, 41]],
    "sequence_bias": [[[39], 4.0]],
    "stop_strings": ["w3"],
    "exponential_decay_length_penalty": (4, 1.5),
    "guidance_scale": 1.5,
}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.5}


def saved(root, **settings):
    model = tiny_model()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 18], pad_token_id=0, **settings)
    model.generation_config.save_pretrained(root)
    model.generation_config = GenerationConfig()
    config = json.loads((root / "generation_config.json").read_text())
    model.save_pretrained(root)
    (root / "generation_config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("settings"), **SETTINGS, **SAMPLING)


@pytest.fixture(scope="module")
def answers():
    """Of a model without any of the settings."""
    target = tiny_target()
    target.eos_ids = frozenset({2, 18})
    return [Model(target).generate(prompt, max_new_tokens=16).token_ids for prompt in PROMPTS]


def test_answers_follow_the_options_alone(folder, answers, capsys):
    model = beagle.load(str(folder), draft="lookup", dtype="float32")
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "generation config" in line]
    assert str(folder) in line
    for name, value in SETTINGS.items():
        assert name in line
        if isinstance(value, float):
            assert f"{name}={value}" in line
    assert "temperature" not in line  # no greedy answer depends on it
    assert model.target.eos_ids == {2, 18}
    assert [model.generate(prompt, max_new_tokens=16).token_ids for prompt in PROMPTS] == answers
    assert any(answer[-1] == 18 for answer in answers)


def test_transformers_modes_decode_as_ours_do(folder, answers):
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.repetition_penalty == 1.3
    target = load_target(str(folder), dtype="float32")
    systems = load_systems(target, HF_MODES, Drafts(small=str(folder)), dtype="float32")
    for system in systems:
        found = [system.answer(prompt, Options(max_new_tokens=16), seed=0)[0] for prompt in PROMPTS]
        assert found == answers, system.mode


def test_eval_finds_them_identical(folder, beagle, tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"id": str(i), "prompt": p}) + "\n" for i, p in enumerate(PROMPTS)))
    out = tmp_path / "out.json"
    modes = "plain,transformers,prompt-lookup"
    ended = beagle("eval", "--target", folder, "--dtype", "float32", "--questions", questions, "-n", 12,
                    "--modes", modes, "--json", out)  # fmt: skip
    assert ended.code == 0, ended.err
    assert all(mode["identical"] == 1 for mode in json.loads(out.read_text())["modes"].values())
    assert "repetition_penalty=1.3" in ended.err


@pytest.mark.parametrize(
    "settings", [{}, SAMPLING, {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0}]
)
def test_neutral_settings_need_no_line(tmp_path, capsys, settings):
    load_target(str(saved(tmp_path, **settings)), dtype="float32")
    assert "generation config" not in capsys.readouterr().err
    assert left_out(GenerationConfig(**settings)) == []
    assert left_out(None) == []


def test_every_setting_is_one_of_transformers():
    gone = {
        "penalty_alpha",
        "dola_layers",
        "num_beam_groups",
        "constraints",
        "force_words_ids",
    }  # in config files still
    assert set(CHANGES) - set(vars(GenerationConfig())) <= gone
