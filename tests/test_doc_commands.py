"""The commands in the docs: each is one that the command line takes, with options that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from beagle.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
USAGE = typer.BadParameter.__mro__[1]  # typer has its own, or click's
STARTS = re.compile(r"(?:\S+ )*?(?:python )?-m beagle|(?:[A-Z_]+=\S+ )*beagle")


def commands(page: str) -> list[str]:
    """Those of the blocks for a shell, each as one line."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        found += [line.strip() for line in lines if STARTS.match(line.strip())]
    return found


def words(command: str) -> list[str]:
    """After ``beagle``, without a shell's operators."""
    after = shlex.split(STARTS.sub("", command, count=1), comments=True)
    return after[: next((i for i, word in enumerate(after) if word in ("|", "&&", "&", ">")), len(after))]


def parse(given: list[str]) -> None:
    """Raises what the command line does of a command or an option that it has not, or of a value that can't be."""
    command = typer.main.get_command(app)
    name = "beagle"
    while hasattr(command, "commands"):
        name, *given = given
        command = command.commands[name]
    command.make_context(name, given)


FOUND = [(page.name, command) for page in PAGES for command in commands(page.read_text("utf-8"))]


def test_commands_are_found():
    assert len(FOUND) > 40
    assert commands("```sh\nX=1 beagle a \\\n    --b\ntorchrun -n 8 -m beagle train | less\nls\n```\n") == [
        "X=1 beagle a  --b", "torchrun -n 8 -m beagle train | less",
    ]  # fmt: skip


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_the_command_line_takes_it(page, command):
    given = words(command)
    if given not in ([], ["--help"]):
        parse(given)


@pytest.mark.parametrize(
    "command", ["beagle train --out runs/mine --ranks 8", "beagle trian", "beagle generate --dtype"]
)
def test_what_it_does_not_take_is_found(command):
    with pytest.raises((KeyError, USAGE)):
        parse(words(command))
