"""vLLM's own hidden states, over its connector, feed the trainer: they are those of transformers within bf16's rounding."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from beagle.targets.loading import DEFAULT_TARGET, load_target, resolve
from beagle.training.data import Stored
from beagle.training.vllm_states import StatesServer, VllmStates
from conftest import REAL_CACHE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

LAYERS = (10, 20)  # of the shipped head
ANSWERS = int(os.environ.get("BEAGLE_ANSWERS", "200"))
LIMIT = 2_000_000  # bytes


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 1500
        while not healthy(url):
            assert process.poll() is None, (root / "log").read_text()[-3000:]
            assert time.monotonic() < end, (root / "log").read_text()[-3000:]
            time.sleep(1)
        yield url, folder
    finally:
        process.terminate()
        process.wait(60)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def samples(target, count: int) -> list[Stored]:
    """Dialogues of various lengths, as the answers of a training are."""
    found = []
    for i in range(count):
        text = " ".join(f"Question {i}, part {j}: what is {i * 7 + j} times {j + 3}?" for j in range(1 + i % 12))
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"It is {i * i}, I think."}]
        ids = target.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        found.append(Stored(f"s/{i}", torch.tensor(ids), None, len(ids) - 12))
    return found


def parts(target, sample: Stored) -> torch.Tensor:
    """The target's own states of a sample, ``[tokens, layers, hidden]``."""
    ids = sample.tokens[None]
    states = target.prefill(ids, target.new_cache(1, ids.shape[1]))[0].float()
    return states.view(len(states), len(LAYERS) + 1, target.hidden_size)


def gaps(states: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Differences relative to the others' norms, ``[tokens, layers]``."""
    return (states - others).norm(dim=-1) / others.norm(dim=-1)


def test_states_are_those_of_transformers(target, true, server):
    """Both round to bf16, in orders of their own: they differ by no more than that rounding does from float32.

    The files that carry the states say which tokens they are of, which the reader compares.
    """
    url, folder = server
    asked = samples(target, ANSWERS)
    groups = [asked[at : at + 8] for at in range(0, len(asked), 8)]
    found, rounding, total = [], [], 0
    with VllmStates(StatesServer(url, folder, limit=LIMIT), target) as states:
        states.trial(asked)
        for group in states.ahead(groups):
            for sample in states(group):
                own = parts(target, sample)
                found.append(gaps(sample.states.float().view_as(own), own))
                if sample.id.endswith("0"):
                    rounding.append(gaps(own, parts(true, sample)))
                total += sample.states.numel() * 2
        assert states.most <= LIMIT < total
    assert list(folder.iterdir()) == []
    theirs, ours = torch.cat(found), torch.cat(rounding)
    print(f"{len(asked)} answers, {len(theirs)} tokens, {total} bytes")
    for name, of in (("vLLM from transformers", theirs), ("bf16 from float32", ours)):
        print(name, "mean", of.mean(0).tolist(), "median", of.median(0).values.tolist(), "most", of.amax(0).tolist())
    assert (theirs.mean(0) < 1.5 * ours.mean(0)).all()
    assert (theirs.amax(0) < 3 * ours.amax(0)).all()


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
