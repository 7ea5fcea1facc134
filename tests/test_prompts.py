"""Question files in every accepted format, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json

import pytest

from beagle.errors import BeagleError
from beagle.training.prompts import numbered, read_prompts

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


def test_content_tells_prompts_apart_not_ids(write):
    one = read_prompts(write({"id": None, "prompt": "a"}, {"id": None, "prompt": "b"}, {"id": "x", "prompt": "a"}))
    other = read_prompts(write({"prompt": "b"}, name="other.jsonl"))
    assert [p.id for p in one] == ["1", "2", "x"]
    assert [p.key for p in numbered(one)][:2] == [p.key for p in one][:2]
    assert one[0].key == one[2].key != one[1].key == other[0].key
    assert len({p.key for p in numbered(one)}) == 3  # a repeated one is another
    system = read_prompts(write({"system": "s", "prompt": "b"}, name="system.jsonl"))
    assert system[0].key != other[0].key


def test_system_messages_are_kept(write):
    dialogue = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    share = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    rows = [{"messages": dialogue}, {"conversations": share}, {"system": "s", "turns": ["a", "b"]}]
    for prompt in read_prompts(write(*rows)):
        assert prompt.messages(["x"]) == [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "b"},
        ]
    with pytest.raises(BeagleError, match=r":1: a system message stands behind"):
        read_prompts(write({"messages": [*dialogue[1:2], *dialogue]}))


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ('{"prompt":"w5 \\ud83d w9"}', "surrogate"),
        ('{"prompt":"w5","id":"\\ud83d"}', "surrogate"),
        ('{"prompt":"w5","system":3}', "system message"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["turn", "id", "system", "deep"],
)
def test_lines_that_end_no_run(write, capsys, bad, word):
    path = write(GOOD, bad)
    with pytest.raises(BeagleError, match=rf":2: .*{word}.*--skip-bad-lines"):
        read_prompts(path)
    assert [p.turns for p in read_prompts(path, skip_bad_lines=True)] == [("one",)]
    assert ":2:" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_and_byte_order_marks(tmp_path, packed, mark, indent):
    rows = [{"conversations": [{"from": "human", "value": text}]} for text in ("a", "b\u2028c", "d")]
    for name, content in (
        ("array.json", json.dumps(rows, indent=indent)),
        ("lines.jsonl", "\n".join(json.dumps(row) for row in rows)),
    ):
        path = tmp_path / name
        data = mark + content.encode()
        path.write_bytes(gzip.compress(data) if packed else data)  # found by its first bytes, not by its name
        assert [(p.id, p.turns) for p in read_prompts(path, limit=2)] == [("1", ("a",)), ("2", ("b\u2028c",))]
        assert len(read_prompts(path)) == 3


def test_bad_arrays(tmp_path):
    path = tmp_path / "array.json"
    path.write_text('[\n{"prompt": "a"},\n{"text": "b"},\n"c"\n]')
    with pytest.raises(BeagleError, match=r"array\.json: entry 2: none of"):
        read_prompts(path)
    assert [p.turns for p in read_prompts(path, skip_bad_lines=True)] == [("a",)]
    path.write_text('[\n{"prompt": "a"},\n{"pro')
    with pytest.raises(BeagleError, match=r"array\.json' begins like a JSON array but is none from line 3 on; copy"):
        read_prompts(path)
    path.write_text('[1]\n{"prompt": "a"}\n')
    with pytest.raises(BeagleError, match=r"array\.json:1: not a JSON object"):
        read_prompts(path)
    assert [p.id for p in read_prompts(path, skip_bad_lines=True)] == ["2"]


@pytest.mark.parametrize(
    ("content", "name", "command"),
    [
        (b"PAR1\x15\x04", "Parquet", "to_json"),
        (b"\x28\xb5\x2f\xfd\x04", "Zstandard", "zstd -d"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16", "iconv"),
        (b"PK\x03\x04ab", "zip", "unzip"),
    ],
)
def test_other_formats_are_named_with_what_converts_them(tmp_path, content, name, command):
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(BeagleError, match=f"it is {name}; convert it first: .*{command}") as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert "check the path" not in str(caught.value)


def test_remedies_fit_what_is_wrong(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 99)[:-9])
    for name, remedy in (("latin.jsonl", "UTF-8"), ("cut.jsonl.gz", "compress it again"), ("none", "check the path")):
        with pytest.raises(BeagleError, match=remedy):
            read_prompts(tmp_path / name)


def test_a_command_without_the_option_does_not_name_it(write):
    with pytest.raises(BeagleError, match=r":2: no JSON from column 2 on; mend the line or delete it$"):
        read_prompts(write(GOOD, "{broken"), skip_bad_lines=None)
