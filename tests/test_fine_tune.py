"""A head for a fine-tune: τ while it trains, and a mistyped start."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from beagle.drafters.checkpoint import find_head
from beagle.errors import BeagleError
from beagle.training import served

SHORT = {"early_epochs": 0, "late_epochs": 0.2, "validate_every": 100}


@pytest.fixture
def many(prompts):
    """Enough prompts that some are held out."""
    rows = [{"prompt": f"w{3 + i % 60} w{3 + (7 * i) % 60}"} for i in range(120)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(ended) -> list[str]:
    return [line for line in ended.err.splitlines() if "minutes of training: τ" in line]


@pytest.mark.usefixtures("many")
def test_tau_is_shown_each_minute_where_it_is_asked_for(train, folders, tmp_path, monkeypatch):
    quiet = train(tmp_path / "quiet", train=SHORT)
    assert quiet.code == 0, quiet.err
    assert lines(quiet) == []
    data = ["--data", tmp_path / "quiet" / "data"]
    start = train(tmp_path / "start", *data, "--init", folders.head, train=SHORT)
    (line,) = lines(start)  # no minute has passed
    assert re.fullmatch(r"after 0\.0 minutes of training: τ [1-6]\.\d\d on [1-4] held-out prompts", line)
    monkeypatch.setattr(served, "MINUTE", 0.0)
    shown = train(tmp_path / "shown", *data, "--show-tau", train=SHORT)
    steps = json.loads((tmp_path / "shown" / "result.json").read_text())["steps"]
    assert steps > 2
    assert len(lines(shown)) == steps  # before the first, and after each but the last
    one, other = (load_file(tmp_path / run / "head" / "model.safetensors") for run in ("quiet", "shown"))
    assert all((one[name] == other[name]).all() for name in one)  # looking changes nothing


def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("beagle.drafters.checkpoint.download_head", lambda *_: pytest.fail("asked"))
    with pytest.raises(BeagleError, match=r"^draft 'runs/mine': no such folder in 'runs'; check the path$"):
        find_head("runs/mine", "tiny")


@pytest.mark.slow
def test_the_example_repairs_a_head(folders, tmp_path, beagle, monkeypatch, capsys):
    """A tiny model: nothing is learned, but everything is run, in this process."""
    script = Path(__file__).parent.parent / "examples" / "repair_a_head.py"
    options = ["--target", folders.target, "--head", folders.head, "--dialogues", "90", "--tune-seconds", "0"]
    trained, run = [], subprocess.run

    def train(command, **how):
        if command[:3] != [sys.executable, "-m", "beagle"]:
            return run(command, **how)
        assert how == {"check": True}
        trained.append(beagle(*command[3:]))
        assert trained[-1].code == 0, trained[-1].err

    monkeypatch.setattr(subprocess, "run", train)
    command = [script, "--out", tmp_path, "--head-seconds", "1", *options]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    runpy.run_path(str(script), run_name="__main__")
    assert len(trained) == 1
    assert re.search(
        r"τ on held-out prompts of the tuned model: \d\.\d+ with .*, \d\.\d+ with the repaired one",
        capsys.readouterr().out,
    )
    assert (tmp_path / "run" / "head" / "config.json").is_file()
