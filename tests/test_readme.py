"""README and results are in step."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "scripts" / "readme_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_result_files(script):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [block[1] for block in script.BLOCK.findall(text)] == ["figures", "sets"]
    assert script.filled(text) == text, "run python scripts/readme_figures.py"


def test_a_changed_figure_is_noticed(script):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = script.BLOCK.search(text)[0]
    row = table.splitlines()[3]
    changed = text.replace(row, row.replace("|", "| 9", 1))
    assert changed != text
    assert script.filled(changed) == text


def test_no_file_for_a_table(script):
    with pytest.raises(SystemExit, match="names no file"):
        script.filled("<!-- sets: results/none_*.json -->\n<!-- end of sets -->")
