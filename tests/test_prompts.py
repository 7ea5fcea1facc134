"""Question files in every accepted format, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json

import pytest

from beagle.errors import BeagleError
from beagle.training.prompts import read_prompts

GOOD = {"prompt": "one"}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="q.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        content = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"turns": ["a", "b"]}, ("a", "b")),
        ({"prompt": "a"}, ("a",)),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "x"},
                    {"role": "user", "content": "b"},
                ]
            },
            ("a", "b"),
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]}, ("a",)),
    ],
)
def test_formats(write, row, turns):
    (prompt,) = read_prompts(write(row))
    assert prompt.turns == turns
    assert prompt.id == "1"


def test_ids_and_categories(write):
    path = write({"id": "x", **GOOD}, {"question_id": 81, "category": "math", **GOOD}, "", GOOD)
    prompts = read_prompts(path)
    assert [p.id for p in prompts] == ["x", "81", "4"]
    assert [p.category for p in prompts] == ["", "math", ""]


def test_gzip_and_limit(write):
    path = write(*({"prompt": str(i)} for i in range(9)), name="q.jsonl.gz")
    assert len(read_prompts(path)) == 9
    assert [p.turns for p in read_prompts(path, limit=2)] == [("0",), ("1",)]


def test_limit_does_not_read_on(write):
    assert len(read_prompts(write(GOOD, "{broken"), limit=1)) == 1


@pytest.mark.parametrize(
    "bad",
    [
        "{broken",
        "[1]",
        {"text": "?"},
        {"turns": []},
        {"turns": "a"},
        {"turns": ["a", " "]},
        {"prompt": 3},
        {"messages": [{"role": "judge", "content": "a"}]},
        {"messages": ["a"]},
        {"messages": [{"role": "system", "content": "a"}]},
        {"conversations": [{"from": "human", "value": None}]},
    ],
    ids=str,
)
def test_bad_line_is_named_or_skipped(write, capsys, bad):
    path = write(GOOD, bad, {"prompt": "two"})
    with pytest.raises(BeagleError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "--skip-bad-lines" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.turns for p in read_prompts(path, skip_bad_lines=True)] == [("one",), ("two",)]
    said = capsys.readouterr().err
    assert "skipped" in said
    assert ":2:" in said.replace("\n", "")


def test_empty_and_missing_files(write, tmp_path):
    with pytest.raises(BeagleError, match="holds no prompt"):
        read_prompts(write(""))
    with pytest.raises(BeagleError, match="holds no prompt"):
        read_prompts(write("{broken"), skip_bad_lines=True)
    with pytest.raises(BeagleError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(BeagleError, match="can't be read"):
        read_prompts(tmp_path)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "q.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 99)[:-9])
    for name in ("q.jsonl", "q.jsonl.gz", "cut.jsonl.gz"):
        with pytest.raises(BeagleError, match="can't be read"):
            read_prompts(tmp_path / name)


def test_damaged_gzip(tmp_path):
    content = bytearray(gzip.compress(json.dumps(GOOD).encode()))
    content[10:14] = b"\xff\xff\xff\xff"
    (tmp_path / "q.jsonl.gz").write_bytes(content)
    with pytest.raises(BeagleError, match="can't be read"):
        read_prompts(tmp_path / "q.jsonl.gz")
