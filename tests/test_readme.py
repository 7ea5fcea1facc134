"""README, docs/results.md and results are in step."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "scripts" / "readme_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "kinds"), [("README.md", ["figures", "sets", "claims"]), ("docs/results.md", ["suites", "trainings"])]
)
def test_tables_are_those_of_the_result_files(script, page, kinds):
    assert page in script.PAGES
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [block[1] for block in script.BLOCK.findall(text)] == kinds
    assert script.filled(text) == text, "run python scripts/readme_figures.py"


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
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = script.BLOCK.search(text)[0]
    row = table.splitlines()[3]
    changed = text.replace(row, row.replace("|", "| 9", 1))
    assert changed != text
    assert script.filled(changed) == text


def test_no_file_for_a_table(script):
    with pytest.raises(SystemExit, match="names no file"):
        script.filled("<!-- sets: results/none_*.json -->\n<!-- end of sets -->")
