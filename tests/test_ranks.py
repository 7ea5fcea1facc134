"""Training on several processes: they learn what one does, whoever dies, and say in one line why a run ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from beagle.cli import main
from beagle.drafters.block import Layer
from beagle.errors import BeagleError
from beagle.ranks import Ranks
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.data import batches, collate
from beagle.training.gradients import Draw, Gradients
from beagle.training.stages import STAGES, count_slots
from beagle.training.states import Fingerprint, StateStore
from beagle.training.trainer import Trainer, new_head
from conftest import LIVELY, Folders, tiny_head, tiny_target
from training_runs import RECIPE

CONFIG = TrainConfig(
    early_epochs=6, late_epochs=7, window=3, steps=3, batch_tokens=160, learning_rate=2e-3, warmup_steps=4,
    schedule="cosine", noise=0.05, regression=0.1, dropout=0.15, validate_every=25, checkpoint_every=4,
)  # fmt: skip
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_ranks"])


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def store(target, tmp_path_factory):
    """Answers of every length, some of them of one slot."""
    random = torch.Generator().manual_seed(0)

    def sample(number: int) -> Sample:
        answer_from = int(torch.randint(1, 8, (), generator=random))
        tokens = torch.randint(3, 64, (answer_from + 2 + number % 11,), generator=random)
        states = target.prefill(tokens[None], target.new_cache(1, len(tokens)))[0].bfloat16()
        return Sample(f"{number:024x}/0", tokens, states, answer_from)

    store = StateStore(tmp_path_factory.mktemp("states"), Fingerprint.of(target, 20, 24))
    store.write(map(sample, range(32)))
    return store


@pytest.mark.parametrize("architecture", LIVELY)
@pytest.mark.parametrize("stage", ["early", "late"])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_slots_are_counted_before_they_are_computed(target, store, architecture, stage, offset):
    head = tiny_head(target, architecture=architecture)
    for group in batches(store, tokens=160, seed=0, epoch=0):
        batch = collate(group, target)
        of = STAGES[type(head)]
        if stage == "early":
            parts = [of.early(head, batch, batch.states, CONFIG.window, offset)]
        else:
            parts = of.late(head, batch, batch.states, CONFIG.window, offset, CONFIG.steps)
        counts = count_slots(head, batch.first, batch.last, CONFIG, stage=stage, offset=offset)
        assert counts == [int(real.sum()) for *_, real in parts]


class Together(Ranks):
    """Ranks that take their turns in one process: each leaves what it has for the next."""

    def __init__(self, rank, count, sums):
        super().__init__(rank, count)
        self.sums = sums

    def sum(self, tensors):
        for i, tensor in enumerate(tensors):
            tensor += self.sums.get(i, 0)
            self.sums[i] = tensor.clone()


@pytest.mark.parametrize("architecture", LIVELY)
@pytest.mark.parametrize("stage", ["early", "late"])
@pytest.mark.parametrize("change", [{}, {"dpace": True}, {"loss": "lk", "regression": 0.0}], ids=str)
@pytest.mark.parametrize(("count", "micro"), [(1, 32), (3, None), (7, 16)])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(target, store, architecture, stage, change, count, micro):
    """With dropout and noise, and more ranks than some batches have samples."""
    config = replace(CONFIG, **change)
    head = tiny_head(target, architecture=architecture, scale=LIVELY[architecture]).train().requires_grad_(True)
    for module in head.modules():
        if isinstance(module, Layer):
            module.dropout = config.dropout
    rows = target.head_rows()
    for number, group in enumerate(batches(store, tokens=160, seed=0, epoch=0)):
        noise = torch.randn(len(group), collate(group, target).states.shape[1], target.hidden_size)
        draw = Draw(stage, number % 3, noise, seed=number)
        shown = Gradients(head, target, config, Ranks(), False)(group, rows, draw)
        expected = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
        assert expected
        sums: dict[int, torch.Tensor] = {}
        ranks = [Together(rank, count, sums) for rank in range(count)]
        turns = [Gradients(head, target, replace(config, micro_batch_tokens=micro), rank, False) for rank in ranks]
        values = [gradients(group, rows, draw) for gradients in turns]
        torch.testing.assert_close(values[-1], shown, rtol=1e-5, atol=1e-6)
        found = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def command(rank: int, count: int, port: int, words: list[str], stderr: Path) -> None:
    """``beagle`` as one process of several, in a process that has imported it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "BEAGLE_CACHE": str(stderr.parent / "cache"), "COLUMNS": "300", "TERM": "dumb",
    }  # fmt: skip
    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = ["beagle", *words]
    main.run()


class Launch:
    """``beagle train`` in several processes."""

    def __init__(self, folder: Path, words: list[list[str]]) -> None:
        folder.mkdir(exist_ok=True)
        port = free_port()
        self.stderr = [folder / f"stderr-{rank}" for rank in range(len(words))]
        self.processes = [
            PROCESSES.Process(target=command, args=(rank, len(words), port, own, self.stderr[rank]))
            for rank, own in enumerate(words)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert any(process.is_alive() for process in self.processes), self.errors()
            time.sleep(0.002)

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def codes(self) -> list[int]:
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]

    def errors(self) -> list[str]:
        """What the processes printed but for bars, and all lines of errors."""
        return [path.read_text() for path in self.stderr if path.exists()]

    def refusal(self) -> str:
        """The one line of an error, of whichever process."""
        text = "".join(self.errors())
        assert "Traceback" not in text
        lines = [line for line in text.splitlines() if line.startswith(("error: ", "failure of ours: "))]
        assert len(lines) == 1, text
        return lines[0]


@pytest.fixture
def words(folders, prompts, tmp_path):
    """Words of the command with a recipe of 50 steps or so."""

    def make(out: Path, *extra: object, **changes: object) -> list[str]:
        recipe = tmp_path / f"recipe-{len(list(tmp_path.iterdir()))}.yaml"
        train = RECIPE["train"] | {
            "early_epochs": 5, "late_epochs": 6, "batch_tokens": 150, "learning_rate": 2e-3, "dropout": 0.15,
            "validate_every": 20, "checkpoint_every": 3,
        }  # fmt: skip
        recipe.write_text(yaml.safe_dump(RECIPE | {"train": train | changes}))
        options = ["--config", recipe, "--target", folders.target, "--device", "cpu", "--prompts", prompts]
        return list(map(str, ["train", "--out", out, *options, *extra]))

    return make


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint.safetensors")


def assert_same_training(out: Path, expected: Path) -> None:
    found = weights(out)
    for name, tensor in weights(expected).items():
        difference = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12)
        if name.startswith("head."):
            assert float(difference) < 1e-4, name
    logs = [[line.split(",") for line in (run / "log.csv").read_text().splitlines()] for run in (out, expected)]
    assert [line[0] for line in logs[0]] == [line[0] for line in logs[1]]
    assert [line[4] for line in logs[0]] == [line[4] for line in logs[1]]  # tokens
    for ours, theirs in zip(logs[0][1:], logs[1][1:], strict=True):
        assert float(ours[2]) == pytest.approx(float(theirs[2]), rel=1e-3)
        assert list(map(float, ours[5:])) == pytest.approx(list(map(float, theirs[5:])), abs=0.02)


@pytest.fixture
def alone(words, beagle, tmp_path):
    """A run of one process."""
    out = tmp_path / "alone"
    ended = beagle(*words(out))
    assert ended.code == 0, ended
    return out


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_train_what_one_process_trains(words, alone, tmp_path, count):
    out = tmp_path / "together"
    launch = Launch(tmp_path / "logs", [words(out)] * count)
    assert launch.codes() == [0] * count, launch.errors()
    assert_same_training(out, alone)
    assert "draft head written to" in launch.errors()[0]
    assert launch.errors()[1:] == [""] * (count - 1)
    assert (out / "head" / "model.safetensors").is_file()
    assert json.loads((out / "result.json").read_text())["steps"] >= 50
