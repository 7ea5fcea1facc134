"""Reports and the viewer: what they show, and where they refuse."""

from __future__ import annotations

import copy
import io
import re
import sys

import pytest

from beagle.decoding.costs import Costs
from beagle.decoding.stats import Stats
from beagle.errors import BeagleError
from beagle.evaluation import figures
from beagle.evaluation.records import Record, Turn, write_result
from beagle.evaluation.report import answer, plots, tables
from beagle.evaluation.report.table import Table
from beagle.evaluation.report.write import write_report
from beagle.research.training_log import read_log

LOG = "step,stage,loss,seconds,tokens,alpha_1,alpha_2\n10,early,3,1,1000,0.5,0.2\n20,late,2,2,2000,0.5,0.4\n"


def record(mode, identity, accepted, seconds):
    stats = Stats(tokens=1, decode_seconds=seconds, verify_seconds=seconds * 0.7, draft_seconds=seconds * 0.2)
    for n in accepted:
        stats.note_pass(n)
        stats.passed_tokens += n + 1
    stats.tokens += stats.passed_tokens
    ids = list(range(stats.tokens))
    return Record(
        "easy", identity, f"c{identity}", mode, 0, [Turn(ids, stats, [f" {mode}<{i}>" for i in ids])], 100.0, 3.0
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Three questions: Beagle is twice as fast, lookup unresolved; as content and as a file."""
    records = []
    for n, (fast, unsure) in enumerate([(1.0, 1.5), (1.0, 2.0), (1.1, 2.6)]):
        records += [record("plain", str(n), [0] * 12, 2.0), record("beagle", str(n), [1, 0] * 4, fast)]
        records.append(record("lookup", str(n), [2, 0, 1] * 2, unsure))
    costs = dict.fromkeys(("beagle", "lookup"), Costs([0.1] * 9, 0.05, 5))
    content = figures.figures(records, costs, {"plain": 0.0, "beagle": 8.0, "lookup": 0.0})
    arguments = {"temperature": 0.0, "exact": False, "tree": "dynamic", "max_new_tokens": 13}
    machine = {"cpu": "a <cpu>", "gpu": None, "threads": 2}
    content["meta"] = {
        "target": {"name": "owner/tiny", "dtype": "float32"}, "arguments": arguments, "machine": machine,
        "versions": {"torch": "2"}, "revision": "abc", "date": "2026-01-01T00:00:00", "command": "beagle eval",
    }  # fmt: skip
    content["questions"] = [{"set": "easy", "id": str(n), "category": "", "turns": ["why</script>?"]} for n in range(3)]
    path = tmp_path_factory.mktemp("result") / "tiny.json"
    write_result(path, content, records)
    return content, path


def test_tables(result):
    content, _ = result
    assert tables.heading(content) == "tiny, fp32, greedy, 13 new tokens, 3 questions"
    overview, details, costs = tables.tables(content)
    assert [row[2] for row in overview.rows] == ["1", "1.94", "n. r."]
    assert overview.rows[1][4] == "11"  # 8 of the drafter's weights and 3 while answering
    assert details.rows[1][4] == "1.94× (1.85 to 2.00)"
    assert details.rows[2][4].startswith("not resolved: ")
    assert costs.rows[1][1:5] == ["25.8", "90.4", "0.0", "12.9"]
    assert costs.rows[1][7] == "1.00×"  # τ 1.5 at one and a half passes
    assert "| mode | token/s |" in overview.markdown()


def test_categories_of_several_questions_have_a_table(result):
    content = copy.deepcopy(result[0])
    assert tables.by_category(content) is None
    content["sets"]["easy"]["categories"] = {"c": copy.deepcopy(content["sets"]["easy"]), "d": content["sets"]["easy"]}
    assert len(tables.by_category(content).rows) == 6


def test_a_ratio_the_other_way_round():
    part = {"ratios": {"plain/transformers": {"median": 2.0, "low": 1.25, "high": 4.0, "pooled": 2.5, "count": 3}}}
    assert tables.over_plain(part, "transformers") == {
        "median": 0.5, "low": 0.25, "high": 0.8, "pooled": 0.4, "count": 3,
    }  # fmt: skip
    assert tables.over_plain(part, "beagle") == {}


def test_rarely_tried_depths_are_not_plotted():
    m = {"accepted_at_depth": {"0": 10, "1": 5, "2": 4, "3": 1}, "step_alpha": [0.5, 0.5, 0.2]}
    assert plots.well_tried(m) == [0.5, 0.5]  # the third depth was tried 5 times


def test_a_whole_report(result, tmp_path, beagle):
    _, path = result
    ended = beagle("report", path, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    plotted = {"tiny_speed_up", "tiny_step_alpha", "tiny_iteration"}
    for name in plotted:
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert set(re.findall(r"\((\w+)\.png\)", markdown)) == plotted
    assert "| beagle |" in markdown
    before = (tmp_path / "out" / "tiny_speed_up.svg").read_text()
    write_report([path], tmp_path / "out")
    assert (tmp_path / "out" / "tiny_speed_up.svg").read_text() == before  # same figures, same file
    write_report([path, path], tmp_path / "out")
    assert "(tiny-2_speed_up.png)" in (tmp_path / "out" / "report.md").read_text()


def test_plots_without_matplotlib_are_refused(result, tmp_path, beagle, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    beagle("report", result[1], "--out", tmp_path / "out").refusal("matplotlib", "beagle-decoding[plots]")
    beagle("research", "plot", tmp_path / "log.csv", "--out", tmp_path / "out").refusal("matplotlib", "[plots]")
    beagle("profile", "--plot", tmp_path / "a.png").refusal("matplotlib", "[plots]")


def test_tables_of_the_terminal_hold_every_cell():
    from rich.console import Console

    table = Table("the title", ["mode", "what"], [["a", "[bold]1 | 2"]], "a note")
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(table.rich())
    shown = console.export_text()
    assert all(text in shown for text in ("the title", "mode", "what", "[bold]1 | 2", "a note"))
    assert table.markdown() == "**the title**\n\n| mode | what |\n| --- | --- |\n| a | [bold]1 \\| 2 |\n\na note\n"


def test_training_logs(tmp_path, beagle):
    again = LOG + "20,late,2,3,2100,0.5,0.6\n"  # trained again after a crash
    for name, text in (("a", LOG), ("b", again)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(text)
    points = read_log(tmp_path / "b" / "log.csv")
    assert [(p["step"], p["stage"], p["tokens"]) for p in points] == [(10, "early", 1000), (20, "late", 2100)]
    assert [p["expected_length"] for p in points] == pytest.approx([1.6, 1.8])
    logs = [tmp_path / name / "log.csv" for name in ("a", "b")]
    ended = beagle("research", "plot", *logs, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"curves.png", "courses.png", "step_alpha.png"}
    beagle("research", "plot", logs[0], logs[0], "--out", tmp_path / "out").refusal("'a'", "rename")
    beagle("report", logs[0], "--out", tmp_path / "out").refusal(logs[0], "beagle research plot")


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", LOG.replace("0.5", "x"), LOG.replace("alpha", "beta"), None])
def test_other_files_are_no_training_logs(content, tmp_path, beagle):
    path = tmp_path / "x.csv"
    if content is not None:
        path.write_text(content)
    line = beagle("research", "plot", path, "--out", tmp_path / "out").refusal(path)
    assert ";" in line


@pytest.mark.parametrize("content", ["", '{"modes": {}}', '{"runs": [], "findings": []}', "[]", None])
def test_other_files_are_refused(content, tmp_path, beagle):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    line = beagle("report", path, "--out", tmp_path / "out").refusal(path)
    assert ";" in line


def test_view(result, beagle):
    _, path = result
    ended = beagle("view", path, "--question", "1")
    assert ended.code == 0
    assert "why</script>?" in ended.out
    assert "beagle<0> beagle<1>" in ended.out  # the first mode that drafts
    assert "beagle: 13 tokens, 8 passes, τ 1.50" in ended.out
    assert "plain<0>" in beagle("view", path, "--question", "easy/1", "--mode", "plain").out
    beagle("view", path, "--question", "9").refusal("question '9'", "0, 1, 2")
    beagle("view", path, "--question", "1", "--mode", "eagle").refusal("mode 'eagle'", "plain, beagle, lookup")


def test_ids_that_two_sets_share():
    one = record("plain", "1", [0], 1.0)
    two = Record("hard", *list(vars(one).values())[1:])
    with pytest.raises(BeagleError, match="easy/1"):
        answer.find_record([one, two], "1")
    assert answer.find_record([one, two], "hard/1") is two


def test_colours_follow_the_depth():
    turn = record("beagle", "1", [2, 0], 1.0)
    (text,) = answer.coloured_turns(turn)
    shown = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert shown == [(" beagle<1>", answer.TERMINAL[1]), (" beagle<2>", answer.TERMINAL[2])]
