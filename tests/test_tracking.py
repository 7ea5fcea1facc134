"""``beagle train --log-with``: what ``log.csv`` gets, through accelerate's trackers."""

from __future__ import annotations

import csv
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from beagle.training.answers import AnswerGenerator


class Service:
    """A package that runs are logged to.

    Attributes:
        started: arguments of ``init``.
        config: the run's settings.
        logged: step and values.
    """

    def __init__(self):
        self.started, self.config, self.logged, self.finished = [], {}, [], 0

    def init(self, *args, **options):
        self.started.append((args, options))
        return self

    def update(self, values, **_):
        self.config |= values

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def service(monkeypatch, request):
    """Stands for the package of that name, behind accelerate's tracker."""
    name, fake = request.param, Service()
    module = ModuleType(name)
    module.init, module.config = fake.init, SimpleNamespace(update=fake.update)
    monkeypatch.setitem(sys.modules, name, module)
    if name == "tensorboard":  # torch's writer is accelerate's first choice

        class SummaryWriter:
            def __init__(self, folder, **options):
                fake.init(folder, **options)

            def add_hparams(self, values, metric_dict):
                fake.update(values)

            def add_scalar(self, name, value, global_step):
                if fake.logged and fake.logged[-1][0] == global_step:
                    fake.logged[-1][1][name] = value
                else:
                    fake.log({name: value}, global_step)

            def flush(self):
                pass

            def close(self):
                fake.finish()

        writer = ModuleType("torch.utils.tensorboard")
        writer.SummaryWriter = SummaryWriter
        import torch.utils

        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
        monkeypatch.setattr(torch.utils, "tensorboard", writer, raising=False)
    return name, fake


def same(logged, out):
    """Whether a service has what the log has; trackio gets no steps from accelerate 1.10."""
    rows = log_of(out)
    assert [values for _, values in logged] == [values for _, values in rows] != []
    return all(step in (None, own) for (step, _), (own, _) in zip(logged, rows, strict=True))


def log_of(out):
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["step"]), {k: float(v) for k, v in row.items() if k not in ("step", "stage") and v}) for row in rows
    ]


ALL = pytest.mark.parametrize("service", ["tensorboard", "wandb", "trackio"], indirect=True)


@ALL
def test_a_tracker_gets_what_the_log_gets(service, train, tmp_path):
    name, fake = service
    ended = train(tmp_path / "run", "--log-with", name)
    assert ended.code == 0, ended.err
    assert same(fake.logged, tmp_path / "run")
    assert len(fake.started) == fake.finished == 1
    assert fake.config["train.window"] == 3
    assert fake.config["train.learning_rate"] == 0.01
    assert fake.config["answers.sampled_share"] == 0
    [(args, options)] = fake.started
    if name == "tensorboard":
        assert args == (str(tmp_path / "run" / "tensorboard"),)
        assert options == {}
    else:
        assert (args, options["project"], options["name"]) == ((), "beagle", "run")
    json.dumps(fake.config)


@ALL
def test_a_resumed_run_logs_what_comes_after_its_checkpoint(service, train, tmp_path):
    name, fake = service
    assert train(tmp_path / "run", "--log-with", name, "--seconds", 0).code == 0
    assert fake.logged == []
    assert train(tmp_path / "run", "--log-with", name).code == 0
    assert same(fake.logged, tmp_path / "run")
    assert fake.finished == 2
    if name == "tensorboard":
        assert fake.started[1][1] == {"purge_step": 2}


@pytest.mark.parametrize("service", ["wandb"], indirect=True)
def test_a_run_that_is_stopped_is_finished_there(service, train, tmp_path, monkeypatch):
    from training_runs import interrupt_after

    interrupt_after(monkeypatch, 6)
    assert train(tmp_path / "run", "--log-with", "wandb").code == 130
    assert service[1].finished == 1


@pytest.mark.parametrize("service", ["wandb"], indirect=True)
def test_a_tracker_that_refuses_is_one_line_before_the_first_answer(service, train, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    sys.modules["wandb"].init = refuse
    monkeypatch.setattr(AnswerGenerator, "run", lambda *_: pytest.fail("answered"))
    train(tmp_path / "run", "--log-with", "wandb").refusal("wandb", "No API key configured.", "log in")


def test_without_a_tracker_only_the_log_is_written(train, tmp_path):
    assert train(tmp_path / "run").code == 0
    assert log_of(tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_one_line(name, train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    train(tmp_path / "run", "--log-with", name).refusal(f"pip install {name}")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(train, tmp_path):
    train(tmp_path / "run", "--log-with", "paper").refusal("tracker 'paper'", "tensorboard, wandb, trackio")
