"""Files are replaced whole, or left alone."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from beagle.errors import BeagleError
from beagle.files import first_change, read_json, write_text


def test_links_and_devices_are_written_through(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(tmp_path / "pipe", "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_json_of_an_earlier_run(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path, "delete it") is None
    path.write_text('{"a": [1, 2]}')
    assert read_json(path, "delete it") == {"a": [1, 2]}
    for damaged in ("{", "[1]", "null"):
        path.write_text(damaged)
        with pytest.raises(BeagleError, match=r"a\.json' is damaged .*; delete it"):
            read_json(path, "delete it")


def test_what_a_run_has_in_common_with_an_earlier_one():
    stored = {"sizes": [1, 2], "name": "x", "more": 1}
    assert first_change(stored, {"name": "x", "sizes": (1, 2)}) is None  # tuples are lists in JSON
    assert first_change(stored, {"name": "x", "sizes": (1, 3)}) == "sizes"
    assert first_change(stored, {"new": None}) is None  # as if it had always been left out
    assert first_change(stored, {"new": 0}) == "new"
