"""The pages and the result files are in step, and what the README shows is run as it stands there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import threading
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from beagle.drafters import checkpoint
from beagle.drafters.checkpoint import save_head
from beagle.evaluation import suites
from beagle.serving import server
from beagle.targets import loading
from conftest import tiny_head, tiny_model, tiny_target, tiny_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


# the figures


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "tools" / "readme_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_result_files(script):
    kinds: dict[str, list[str]] = {}
    for page in script.pages():
        text = page.read_text(encoding="utf-8")
        kinds[page.name] = [block[1] for block in script.BLOCK.findall(text)]
        assert text.count("<!-- end of ") == len(kinds[page.name]), page
        assert script.filled(text) == text, f"{page.name}: run python tools/readme_figures.py"
    assert kinds["README.md"] == ["modes"]
    assert {"benches", "sets", "suites", "claims", "trainings"} <= set(kinds["results.md"])


def test_the_readmes_table_holds_the_figures_of_its_file(script):
    (block,) = script.BLOCK.finditer(README)
    result = json.loads((ROOT / block[3]).read_text(encoding="utf-8"))
    lines = [line.split("|") for line in block[0].splitlines() if line.startswith("| ")][2:]
    speeds = [float(cells[2]) for cells in lines]
    expected = [result["modes"][mode]["tokens_per_second"] for mode in ("transformers", "plain", "beagle")]
    assert speeds == pytest.approx(expected, abs=0.05)
    ratios = [float(re.match(r" ([\d.]+)× \(", cell)[1]) for cell in lines[2][3:5]]
    assert ratios == pytest.approx([speeds[2] / speeds[0], speeds[2] / speeds[1]], rel=0.02)


def test_adding_a_result_file_is_enough(script, monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    block = "<!-- suites: results/eval_*.json -->\n<!-- end of suites -->"
    empty = script.filled(block)
    assert "No results are stored yet." in empty
    stored = json.loads((ROOT / "results" / "bench_fp32.json").read_text(encoding="utf-8"))
    (tmp_path / "results" / "eval_paper_one.json").write_text(json.dumps(stored))
    stored["meta"]["target"]["name"] = "another"
    (tmp_path / "results" / "eval_paper_other.json").write_text(json.dumps(stored))
    page = script.filled(empty)
    assert script.filled(page) == page
    assert page.count("### ") == 2
    assert page.index("smollm2-135m, fp32") < page.index("another, fp32")
    for mode, figures in stored["modes"].items():
        assert f"| {mode} |" in page
        assert f"{figures['tokens_per_second']:.1f}" in page
    assert stored["meta"]["command"] in page
    assert "No results" not in page


def test_a_changed_figure_is_noticed(script):
    row = next(line for line in script.BLOCK.search(README)[0].splitlines() if "drafts |" in line)
    changed = README.replace(row, row.replace("|", "| 9", 1))
    assert changed != README
    assert script.filled(changed) == README


def test_no_file_for_a_table(script):
    with pytest.raises(SystemExit, match="names no file"):
        script.filled("<!-- sets: results/none_*.json -->\n<!-- end of sets -->")


# what it shows


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


COMMANDS = [
    shlex.join(words)
    for block in blocks("sh")
    for line in block.splitlines()
    if (words := shlex.split(line, comments=True))
]
OURS = [command for command in COMMANDS if command.startswith("beagle ")]


def test_one_screen():
    lines = README.splitlines()
    assert len(lines) <= 110
    assert next(i for i, line in enumerate(lines) if line.startswith("## ")) <= 45
    assert "Every figure here is from a CPU" in README
    assert "are known for random weights alone" in README  # of a GPU
    assert {command.split()[0] for command in COMMANDS} == {"pip", "make", "beagle"}


def test_packages_and_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"pip install '?([\w.-]+)(?:\[([\w,-]+)\])?", README)
    assert named[0] == (".", "")  # the first command works in a clone; an extra can then be named with the package
    for package, extras in named:
        assert package in (".", project["name"])
        assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with the files that the README's commands name. The models are tiny, the recipe's sizes and questions are cut."""
    root = tmp_path_factory.mktemp("readme")
    tiny_model().save_pretrained(root / "your" / "model")
    tiny_tokenizer().save_pretrained(root / "your" / "model")
    head = tiny_head(tiny_target())
    save_head(head, root / "heads" / "smollm2-135m-instruct", target="tiny", dtype=torch.float32, meta={})
    prompts = [{"prompt": f"w{3 + i} w{60 - i} w{9 + 2 * i}"} for i in range(12)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    (root / "few.jsonl").write_text("".join(suites.QUICK.read_text().splitlines(keepends=True)[:4]))
    (root / "configs").mkdir()
    recipe = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text())
    recipe["answers"] |= {"rows": 4, "max_new_tokens": 12}
    recipe["train"] |= {"early_epochs": 1, "late_epochs": 1, "batch_tokens": 60, "draft_vocab_size": 48}
    (root / "configs" / "default.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture
def here(tiny, monkeypatch):
    """In that folder ``smollm2-135m`` is the tiny model, and its shipped head is a tiny one."""
    monkeypatch.chdir(tiny)
    monkeypatch.setenv("BEAGLE_CACHE", str(tiny / "cache"))
    monkeypatch.setattr(loading, "_embedded", lambda: str(tiny / "your" / "model"))
    monkeypatch.setattr(checkpoint, "SHIPPED", tiny / "heads")
    monkeypatch.setattr(suites, "QUICK", tiny / "few.jsonl")
    return tiny


def test_every_command_has_a_test():
    assert {command.split()[1] for command in OURS} == set(RUN) | {"chat", "serve"}
    assert len(OURS) == len(set(OURS))


def test_commands_named_in_prose_exist(beagle):
    listed = beagle("--help").out
    for name in set(re.findall(r"`beagle ([a-z-]+)", README)):
        assert re.search(rf"[│|] {name} ", listed), name


WRITES = {"eval": "quick.json", "report": "report/report.md", "train": "runs/mine/head/config.json"}
SHOWS = {"demo": "the same text, faster", "profile": "roofline", "report": "report.md"}
RUN = ["generate", "eval", "report", "profile", "demo", "train"]


NEEDED = {"quick.json": "eval", "runs/mine/head": "train"}  # what a command reads, and which one writes it


def cases() -> list[Any]:
    chosen = [command for command in OURS if command.split()[1] in RUN]
    return [pytest.param(c, marks=[pytest.mark.slow] * ("quick.json" in c), id=c) for c in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("command", cases())
def test_commands_run_as_they_stand(here, beagle, command):
    name = command.split()[1]
    for file, maker in NEEDED.items():
        if file in command and name != maker and not (here / file).exists():
            (before,) = (c for c in OURS if c.split()[1] == maker)
            assert beagle(*shlex.split(before)[1:]).code == 0
    ended = beagle(*shlex.split(command)[1:])
    assert ended.code == 0, ended.err
    if name == "generate":
        assert ended.out.strip()
        assert " tokens, " in ended.err
    if name in WRITES:
        assert (here / WRITES[name]).is_file()
    assert SHOWS.get(name, "") in ended.out + ended.err


def test_chat_answers(here, beagle):
    (command,) = (command for command in OURS if command.startswith("beagle chat"))
    ended = beagle(*shlex.split(command)[1:], stdin="w3 w4\nw5\n/exit\n")
    assert ended.code == 0
    assert ended.out.count(" tokens, ") == 2


def test_serve_answers(here, beagle, monkeypatch):
    (command,) = (command for command in OURS if command.startswith("beagle serve"))
    bind, answers = server.bind, []

    def free_port(host: str, port: int):
        assert port == int(shlex.split(command)[-1])
        listener = bind(host, 0)
        threading.Thread(target=ask, args=(listener.getsockname()[1],), daemon=True).start()
        return listener

    def ask(port: int) -> None:
        message = {"messages": [{"role": "user", "content": "w3 w4"}], "model": "smollm2-135m", "max_tokens": 4}
        try:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            answers.append(httpx.post(url, json=message, timeout=300).json())  # waits until the server accepts
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(server, "bind", free_port)
    assert beagle(*shlex.split(command)[1:]).code == 0
    assert answers[0]["usage"]["completion_tokens"] >= 1
    assert answers[0]["choices"][0]["message"]["role"] == "assistant"


def test_the_python_example_runs(here, capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert len(code.strip().splitlines()) <= 5
    text, tau, speed = capsys.readouterr().out.rsplit(maxsplit=2)
    assert text
    assert float(tau) >= 1
    assert float(speed) > 0
