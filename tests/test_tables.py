"""Prompts and dialogues in Parquet and Arrow files, and in folders of the library ``datasets``, which the extra brings."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import pytest

from beagle.errors import BeagleError
from beagle.training.prompts import read_prompts

CALL = {"id": None, "function": {"name": "find"}}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "a", "tool_calls": None},
            {"role": "assistant", "content": "b", "tool_calls": None},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "c", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ]
    },
]


@pytest.fixture(autouse=True)
def own_cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save(folder: Path, form: str) -> Path:
    rows = datasets.Dataset.from_list(ROWS)
    if form == "parquet":
        rows.to_parquet(folder / "d.parquet")
        return folder / "d.parquet"
    rows.save_to_disk(folder / "saved")
    return folder / "saved" if form == "folder" else next((folder / "saved").glob("*.arrow"))


@pytest.mark.parametrize("form", ["parquet", "arrow", "folder"])
def test_rows_of_tables(tmp_path, form):
    path = save(tmp_path, form)
    one, other = read_prompts(path, given=True)
    assert one.given() == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert other.given()[1] == {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find"}}]}
    assert (one.id, one.source) == ("1", f"{path}: row 1")
    assert len(read_prompts(path, limit=1)) == 1


def test_bad_rows_are_named(tmp_path, capsys):
    datasets.Dataset.from_list([{"prompt": "a", "messages": None}, {"prompt": None, "messages": None}]).to_parquet(
        tmp_path / "d.parquet"
    )
    with pytest.raises(
        BeagleError, match=r"d\.parquet: row 2: none of .* is there, only nothing; mend the line or pass"
    ):
        read_prompts(tmp_path / "d.parquet")
    assert [p.turns for p in read_prompts(tmp_path / "d.parquet", skip_bad_lines=True)] == [("a",)]
    assert "skipped" in capsys.readouterr().err


def test_splits_are_named(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(BeagleError, match=r"holds the splits train, test; give one of them: .*saved/train$"):
        read_prompts(tmp_path / "saved")
    assert len(read_prompts(tmp_path / "saved" / "test", given=True)) == 1


def test_damaged_and_missing_tables(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BeagleError, match=r"d\.parquet' can't be read: .*; copy or download it again") as caught:
        read_prompts(tmp_path / "d.parquet")
    assert "\n" not in str(caught.value)
    with pytest.raises(BeagleError, match=r"none\.parquet' can't be read: No such file; check the path"):
        read_prompts(tmp_path / "none.parquet")


@pytest.mark.parametrize("form", ["parquet", "arrow", "folder"])
def test_without_the_library_one_line_says_what_installs_it(tmp_path, form, monkeypatch):
    path = save(tmp_path, form)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BeagleError, match=r"needs the library `datasets`: pip install 'beagle-decoding\[data\]'"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["none.parquet", "none.arrow"])
def test_a_missing_table_is_named_before_the_library(tmp_path, name, monkeypatch):
    """Nobody installs a package for a file that isn't there."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BeagleError, match=rf"{name}' can't be read: No such file; check the path$"):
        read_prompts(tmp_path / name)
