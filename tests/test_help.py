"""``--help`` answers at once: nothing heavy is imported for it; and it names what there is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from beagle.cli import research
from beagle.cli.main import app
from beagle.research.reproduce.experiments import ITEMS
from beagle.research.reproduce.scales import SCALES


def names(commands: typer.Typer) -> list[str]:
    return [c.name or c.callback.__name__ for c in commands.registered_commands]


COMMANDS = ["", "research", *names(app), *(f"research {name}" for name in names(research.app))]
HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "fastapi", "matplotlib")
CODE = """
import sys
sys.argv = ["beagle", *{arguments}]
from beagle.__main__ import run
try:
    run()
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = [name for name in {heavy} if name in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    code = CODE.format(arguments=[*command.split(), "--help"], heavy=HEAVY)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Usage" in ended.stdout
    if command:
        assert "Example" in ended.stdout


def test_help_of_reproduce_names_all_items(beagle):
    shown = beagle("research", "reproduce", "--help").out
    for name in (*ITEMS, *SCALES):
        assert name in shown


def test_every_command_drafts_the_librarys_tree():
    """One default for the tree's breadth and depth, and one name."""
    import inspect

    from beagle.drafters.base import TreePlan

    plan = TreePlan()
    for registered in (*app.registered_commands, *research.app.registered_commands):
        defaults = {n: p.default for n, p in inspect.signature(registered.callback).parameters.items()}
        assert "beam" not in defaults
        assert defaults.get("tree_top_k", plan.top_k) == plan.top_k
        assert defaults.get("depth", plan.depth) == plan.depth


def test_errors_of_the_library_name_no_flags():
    """What ``beagle.load`` and its neighbours raise reads well from a script; commands have flags."""
    import re
    from pathlib import Path

    import beagle

    root = Path(beagle.__file__).parent
    for file in root.rglob("*.py"):
        if file.relative_to(root).parts[0] in ("cli", "vllm"):
            continue  # the commands, and vLLM's own
        for text in re.findall(r'f?"[^"\n]*"', file.read_text(encoding="utf-8")):
            flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--skip-bad-lines"}
            assert not flags or " " not in text or "`beagle " in text, (file.name, text)
