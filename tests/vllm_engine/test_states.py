"""vLLM's own hidden states, over its connector, feed the trainer: they are those of transformers within bf16's rounding."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from processes import Server, free_port

from beagle.drafters.checkpoint import find_head, load_head
from beagle.targets.loading import DEFAULT_TARGET, load_target, resolve
from beagle.training.answers import Sample
from beagle.training.stages import step_alpha
from beagle.training.vllm_states import StatesServer, VllmStates
from conftest import REAL_CACHE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

LAYERS = (10, 20)  # of the shipped head
ANSWERS = int(os.environ.get("BEAGLE_ANSWERS", "200"))
LIMIT = 2_000_000  # bytes
CLOSE = {"mean": 1.1, "99%": 1.25, "max": 1.5}  # the rounding of transformers that vLLM's may be: max is of one token


def loaded(dtype: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
        return load_target(DEFAULT_TARGET, dtype=dtype, device="cpu", state_layers=LAYERS)


@pytest.fixture(scope="module")
def target():
    """As vLLM has it."""
    return loaded("bfloat16")


@pytest.fixture(scope="module")
def true():
    return loaded("float32")


@pytest.fixture(scope="module")
def server(target, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
        model = resolve(DEFAULT_TARGET)
    port = free_port()
    root = tmp_path_factory.mktemp("served")
    folder = root / "states"
    folder.mkdir()
    layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [*LAYERS, target.layer_count]}}
    method = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": layers}
    connector = {
        "kv_connector": "HiddenStatesOnCpu",
        "kv_connector_module_path": "beagle.vllm.connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]
    command += ["--speculative-config", json.dumps(method), "--kv-transfer-config", json.dumps(connector)]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "NUMBA_NUM_THREADS": "1"}
    with Server(command, port, {**os.environ, **settings}, root / "log") as process:
        process.wait(1500)
        yield process.url, folder


def samples(target, count: int) -> list[Sample]:
    """Dialogues of various lengths, as the answers of a training are."""
    found = []
    for i in range(count):
        text = " ".join(f"Question {i}, part {j}: what is {i * 7 + j} times {j + 3}?" for j in range(1 + i % 12))
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"It is {i * i}, I think."}]
        ids = target.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        found.append(Sample(f"s/{i}", torch.tensor(ids), None, len(ids) - 12))
    return found


def parts(target, sample: Sample) -> torch.Tensor:
    """The target's own states of a sample, ``[tokens, layers, hidden]``."""
    ids = sample.tokens[None]
    states = target.prefill(ids, target.new_cache(1, ids.shape[1]))[0].float()
    return states.view(len(states), len(LAYERS) + 1, target.hidden_size)


def gaps(states: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Differences relative to the others' norms, ``[tokens, layers]``."""
    return (states - others).norm(dim=-1) / others.norm(dim=-1)


def figures(of: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of ``[tokens, layers]``, a number a layer."""
    return {"mean": of.mean(0), "99%": of.quantile(0.99, dim=0), "max": of.amax(0)}


def test_states_are_those_of_transformers(target, true, server):
    """Both round to bf16, in orders of their own; the true states are those of the same weights in float32.

    vLLM's are no farther from them than transformers' are.
    The files that carry the states name the tokens that they are of, which the reader compares.
    """
    url, folder = server
    asked = samples(target, ANSWERS)
    groups = [asked[at : at + 8] for at in range(0, len(asked), 8)]
    vllm, transformers, apart, total = [], [], [], 0
    with VllmStates(StatesServer(url, folder, limit=LIMIT), target) as states:
        states.trial(asked)
        for group in states.ahead(groups):
            for wanted, sample in zip(group, states(group), strict=True):
                assert torch.equal(sample.tokens, wanted.tokens)
                own, exact = parts(target, sample), parts(true, sample)
                served = sample.states.float().view_as(own)
                vllm.append(gaps(served, exact))
                transformers.append(gaps(own, exact))
                apart.append(gaps(served, own))
                total += sample.states.numel() * sample.states.element_size()
        assert states.most <= LIMIT < total
    assert list(folder.iterdir()) == []
    theirs, ours, between = (figures(torch.cat(of)) for of in (vllm, transformers, apart))
    print(f"{len(asked)} answers, {sum(map(len, vllm))} tokens, {total} bytes; layers {[*LAYERS, target.layer_count]}")
    for name, found in (("vLLM from float32", theirs), ("ours from float32", ours), ("vLLM from ours", between)):
        print(name, {key: [round(x, 4) for x in of.tolist()] for key, of in found.items()})
    for key, factor in CLOSE.items():
        assert (theirs[key] <= factor * ours[key]).all(), key
    assert (between["max"] <= 2 * ours["max"]).all()  # each is as far from float32 as that, at most


def test_a_head_is_trained_on_them(target, server, tmp_path, beagle):
    """Answers and states from one server; the training's own check of the served head finds no gap."""
    url, folder = server
    prompts, recipe = tmp_path / "prompts.jsonl", tmp_path / "recipe.yaml"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i} plus {i + 3}?"}) + "\n" for i in range(8)))
    answers = {"max_new_tokens": 8, "max_prompt_tokens": 80, "states": "live", "sampled_share": 0, "rows": 4}
    train = {"early_epochs": 1, "late_epochs": 1, "draft_vocab_size": 64, "batch_tokens": 256}
    recipe.write_text(yaml.safe_dump({"answers": answers, "train": train, "head": {"kv_layers": list(LAYERS)}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        options = ["--prompts", prompts, "--config", recipe, "--dtype", "bfloat16", "--device", "cpu"]
        options += ["--answers-from", url, "--answers-model", name, "--states-from", url, "--states-folder", folder]
        ended = beagle("train", "--target", DEFAULT_TARGET, "--out", tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    assert list(folder.iterdir()) == []
    assert (Path(tmp_path) / "run" / "head" / "model.safetensors").is_file()


def dialogues(numbers: range) -> list[list[dict[str, str]]]:
    """With answers that a small head learns soon."""
    return [
        [
            {"role": "user", "content": f"Add each of the numbers from {i} on to {i + 3}."},
            {"role": "assistant", "content": " ".join(f"{i + j} plus {i + 3} is {2 * i + j + 3}." for j in range(5))},
        ]
        for i in numbers
    ]


def test_a_head_trained_on_them_drafts_as_well(true, server, tmp_path, beagle, capsys):
    """As one that was trained on transformers' states of the same answers: step-α on others, within its noise.

    Both start from the shipped head, since a short training from random weights is noisier by far.
    """
    url, folder = server
    prompts, recipe = tmp_path / "prompts.jsonl", tmp_path / "recipe.yaml"
    prompts.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues(range(60))))
    answers = {"source": "given", "max_new_tokens": 80, "max_prompt_tokens": 80, "states": "disk", "rows": 8}
    train = {"early_epochs": 3, "late_epochs": 1, "window": 3, "early_window": 1, "steps": 3, "batch_tokens": 1024}
    train |= {"draft_vocab_size": 256, "learning_rate": 1e-3, "warmup_steps": 5, "schedule": "cosine"}
    recipe.write_text(yaml.safe_dump({"answers": answers, "train": train}))
    held_out = []
    for messages in dialogues(range(60, 90)):
        ids = true.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        start = true.tokenizer.apply_chat_template(messages[:1], return_dict=True, add_generation_prompt=True)
        sample = Sample("held", torch.tensor(ids), None, len(start["input_ids"]))
        held_out.append(replace(sample, states=parts(true, sample).flatten(1)))

    def measured(name: str, folder: Path) -> tuple[list[float], list[int]]:
        alphas, tried = step_alpha(load_head(folder, true).eval(), true, [held_out], 3)
        with capsys.disabled():
            print(f"{name}: step-α {[round(alpha, 4) for alpha in alphas]} of {tried} drafts")
        return alphas, tried

    found = [measured("shipped", find_head("head", DEFAULT_TARGET))]
    for name, served in (("vllm", ["--states-from", url, "--states-folder", folder]), ("transformers", [])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
            options = ["--prompts", prompts, "--config", recipe, "--dtype", "bfloat16", "--device", "cpu", *served]
            ended = beagle("train", "--target", DEFAULT_TARGET, "--out", tmp_path / name, "--init", "head", *options)
        assert ended.code == 0, ended.err
        found.append(measured(f"trained on states of {name}", tmp_path / name / "head"))
    before, theirs, ours = found
    for a, m, b, n in zip(*theirs, *ours, strict=True):
        assert abs(a - b) <= 3 * (a * (1 - a) / m + b * (1 - b) / n) ** 0.5  # standard errors
    assert min(theirs[0][0], ours[0][0]) > before[0][0] + 0.04  # they have learnt from the states
