"""Training on several processes: they learn what one does, whoever dies, and say in one line why a run ends."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from beagle import ranks
from beagle.drafters.block import Layer
from beagle.ranks import Ranks
from beagle.training import trainer
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.data import batches, collate
from beagle.training.gradients import Draw, Gradients
from beagle.training.stages import STAGES, count_slots
from beagle.training.states import Fingerprint, StateStore
from conftest import LIVELY, tiny_head, tiny_target
from launching import Launch
from training_runs import RECIPE

CONFIG = TrainConfig(
    early_epochs=6, late_epochs=7, window=3, steps=3, batch_tokens=160, learning_rate=2e-3, warmup_steps=4,
    schedule="cosine", noise=0.05, regression=0.1, dropout=0.15, validate_every=25, checkpoint_every=4,
)  # fmt: skip


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
        self.sums, self.summed = sums, 0

    def sum(self, tensors):
        self.summed += 1
        for i, tensor in enumerate(tensors):
            tensor += self.sums.get(i, 0)
            self.sums[i] = tensor.clone()


@pytest.mark.parametrize("architecture", LIVELY)
@pytest.mark.parametrize("stage", ["early", "late"])
@pytest.mark.parametrize(
    ("count", "micro", "change"),
    [(1, 32, {}), (3, None, {}), (7, 16, {}), (7, 16, {"dpace": True}), (3, 32, {"loss": "lk", "regression": 0.0})],
    ids=str,
)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(target, store, architecture, stage, change, count, micro):
    """With dropout and noise, and more ranks than some batches have samples; all of them sum, or some would wait for ever."""
    config = replace(CONFIG, **change)
    head = tiny_head(target, architecture=architecture, scale=LIVELY[architecture]).train().requires_grad_(True)
    for module in head.modules():
        if isinstance(module, Layer):
            module.dropout = config.dropout
    rows = target.head_rows()
    groups = list(batches(store, tokens=160, seed=0, epoch=0))
    for number, group in enumerate([*groups, groups[0][:1]]):
        noise = torch.randn(len(group), collate(group, target).states.shape[1], target.hidden_size)
        draw = Draw(stage, number % 3, noise, seed=number)
        shown = Gradients(head, target, config, Ranks(), False)(group, rows, draw)
        expected = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
        assert expected
        sums: dict[int, torch.Tensor] = {}
        own = replace(config, micro_batch_tokens=micro)
        turns = [Gradients(head, target, own, Together(rank, count, sums), False) for rank in range(count)]
        values = [gradients(group, rows, draw) for gradients in turns]
        assert count == 1 or [gradients.ranks.summed for gradients in turns] == [1] * count
        torch.testing.assert_close(values[-1], shown, rtol=1e-5, atol=1e-6)
        found = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


@pytest.fixture(scope="module")
def words(folders, tmp_path_factory):
    """Words of the command with a recipe of 50 steps or so."""
    made = tmp_path_factory.mktemp("recipes")
    prompts = made / "prompts.jsonl"
    texts = [" ".join(f"w{3 + (5 * i + j * j) % 60}" for j in range(1 + i % 5)) for i in range(12)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))

    def make(out: Path, *extra: object, data: Path | None = None, **changes: object) -> list[str]:
        recipe = made / f"recipe-{len(list(made.iterdir()))}.yaml"
        train = RECIPE["train"] | {
            "early_epochs": 8, "late_epochs": 9, "batch_tokens": 150, "learning_rate": 2e-3, "dropout": 0.15,
            "validate_every": 20, "checkpoint_every": 3,
        }  # fmt: skip
        recipe.write_text(yaml.safe_dump(RECIPE | {"train": train | changes}))
        source = ["--data", data] if data else ["--prompts", prompts]
        options = ["--config", recipe, "--target", folders.target, "--device", "cpu", *source]
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


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    launch = Launch(out.parent / "logs", [words(out)])
    assert launch.codes() == [0], launch.errors()
    return out


def test_ranks_train_what_one_process_trains(words, alone, tmp_path):
    out = tmp_path / "together"
    launch = Launch(tmp_path / "logs", [words(out)] * 4)
    assert launch.codes() == [0] * 4, launch.errors()
    assert_same_training(out, alone)
    assert "draft head written to" in launch.errors()[0]
    assert launch.errors()[1:] == [""] * 3
    assert (out / "head" / "model.safetensors").is_file()
    assert json.loads((out / "result.json").read_text())["steps"] >= 50


def test_a_run_goes_on_with_another_number_of_ranks(words, alone, tmp_path):
    out = tmp_path / "stopped"
    for seconds, count in ((0, 2), (0.2, 1), (600, 2)):
        launch = Launch(
            tmp_path / f"{count}", [words(out, "--seconds", seconds, micro_batch_tokens=40 * count)] * count
        )
        assert launch.codes() == [0] * count, launch.errors()
    assert_same_training(out, alone)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_and_others_go_on(words, alone, tmp_path, killed):
    out = tmp_path / "killed"
    launch = Launch(tmp_path / "first", [words(out)] * 3)
    launch.wait_for(out / "checkpoint.safetensors")
    launch.kill(killed)
    assert launch.codes() == [-signal.SIGKILL if rank == killed else 2 for rank in range(3)], launch.errors()
    assert "another rank has ended" in launch.refusal()
    assert "run the same command again" in launch.refusal()
    launch = Launch(tmp_path / "second", [words(out)] * 2)
    assert launch.codes() == [0, 0], launch.errors()
    assert_same_training(out, alone)


def test_a_rank_killed_before_there_are_answers_leaves_nothing_to_clean_up(words, alone, tmp_path):
    out = tmp_path / "early"
    launch = Launch(tmp_path / "first", [words(out)] * 2)
    launch.wait_for(out / "data" / "manifest.json")
    launch.kill(0)
    assert launch.codes() == [-signal.SIGKILL, 2]
    assert "another rank has ended" in launch.refusal()
    launch = Launch(tmp_path / "second", [words(out)])
    assert launch.codes() == [0], launch.errors()
    assert_same_training(out, alone)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(words, alone, tmp_path, monkeypatch):
    saved = []

    def full_at_the_third(tensors, path, metadata):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(trainer, "save_file", full_at_the_third)  # in the processes, too, which are forks
    out = tmp_path / "full"
    launch = Launch(tmp_path / "logs", [words(out, data=alone / "data")] * 2)
    assert launch.codes() == [2, 2], launch.errors()
    assert launch.refusal().startswith(f"error: cannot write the checkpoint in '{out}'")
    assert int(read_progress_of(out)["step"]) == 6


def read_progress_of(out: Path) -> dict:
    with safe_open(out / "checkpoint.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["progress"])


@pytest.mark.parametrize("what", ["recipe", "data"])
def test_ranks_that_differ_are_refused(words, alone, tmp_path, what):
    out, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(alone / "data", data)
    (shard,) = data.glob("shard-*.safetensors")
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    tensors["tokens"][3] += 1
    save_file(tensors, shard, metadata=metadata)
    others = words(out, data=data) if what == "data" else words(out, data=alone / "data", noise=0.1)
    launch = Launch(tmp_path / "logs", [words(out, data=alone / "data"), others])
    assert launch.codes() == [2, 2], launch.errors()
    assert f"rank 1 has another {what} than rank 0" in launch.refusal()
    assert not (out / "checkpoint.safetensors").exists()


def test_who_waits_for_a_silent_rank_gives_up(monkeypatch):
    monkeypatch.setattr(ranks, "SILENCE", 0.3)
    store = dist.HashStore()
    store.set("beat", "1")
    with pytest.raises(ranks.RankLost, match=r"rank 1 waits for the answers that rank 0 makes, .* no sign of life"):
        Ranks(1, 2, store).wait_for("answers")
    Ranks(0, 2, store).tell("answers")
    Ranks(1, 2, store).wait_for("answers")


def test_one_rank_reports():
    store = dist.HashStore()
    all_ranks = [Ranks(rank, 3, store) for rank in range(3)]
    assert [own.reports() for own in reversed(all_ranks)] == [True, False, False]
    assert [own.reports() for own in all_ranks] == [False, False, True]
    with pytest.raises(ranks.RankLost, match="a rank failed while rank 1 waited for the answers"):
        all_ranks[1].wait_for("answers")
