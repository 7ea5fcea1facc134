"""What result files say about how they were made."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

from beagle import meta
from conftest import tiny_target


def test_a_source_tree_that_is_not_installed(monkeypatch):
    def not_installed(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(meta, "version", not_installed)
    assert meta.describe()["versions"]["beagle-decoding"] is None


def test_no_folder_of_this_machine_in_a_targets_name():
    target = tiny_target()
    target.name = "/home/someone/models/tiny.gguf"
    assert meta.describe(target)["target"]["name"] == "tiny.gguf"
