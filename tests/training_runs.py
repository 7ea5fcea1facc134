"""``beagle train`` with a small recipe, and what its runs leave; a plugin that ``conftest`` loads."""

from __future__ import annotations

import json
import signal

import pytest
import yaml

from beagle.training import states
from beagle.training.trainer import Trainer

RECIPE = {
    "answers": {"rows": 4, "max_prompt_tokens": 20, "max_new_tokens": 24, "max_turns": 1, "sampled_share": 0},
    "train": {
        "early_epochs": 3, "late_epochs": 3, "window": 3, "steps": 3, "batch_tokens": 120, "learning_rate": "1e-2",
        "warmup_steps": 4, "schedule": "cosine", "noise": 0.05, "validate_every": 5, "checkpoint_every": 4,
    },
}  # fmt: skip
COUNT = 12


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = [" ".join(f"w{3 + (5 * i + j * j) % 60}" for j in range(1 + i % 5)) for i in range(COUNT)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def train(folders, beagle, prompts, tmp_path):
    """Runs the command with the small recipe, some keys of it changed."""

    def call(out, *extra, **sections):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({k: {**RECIPE.get(k, {}), **sections.get(k, {})} for k in (*RECIPE, "head")}))
        options = ["--config", recipe, "--target", folders.target, "--device", "cpu", "--prompts", prompts]
        return beagle("train", "--out", out, *options, *extra)

    return call


@pytest.fixture
def losses(monkeypatch):
    """Loss of every step, in order."""
    seen = []
    one = Trainer._one

    def watched(self, group):
        seen.append(one(self, group))
        return seen[-1]

    monkeypatch.setattr(Trainer, "_one", watched)
    return seen


def stored(out):
    """Tokens of each answer on disk, by id."""
    found = {}
    for path in sorted((out / "data").glob("shard-*.safetensors")):
        content = states.read_shard(path)
        with states.open_shard(path) as file:
            ids = json.loads(file.metadata()["ids"])
        parts = content["tokens"].tensor_split(content["offsets"][1:-1])
        assert not set(ids) & set(found)
        found |= {i: part.tolist() for i, part in zip(ids, parts, strict=True)}
    return found


def interrupt_after(monkeypatch, steps, how=signal.SIGINT):
    one = Trainer._one

    def interrupted(self, group):
        if self.step == steps:
            if how == signal.SIGINT:  # which a job in the background ignores
                raise KeyboardInterrupt
            signal.raise_signal(how)
        return one(self, group)

    monkeypatch.setattr(Trainer, "_one", interrupted)
