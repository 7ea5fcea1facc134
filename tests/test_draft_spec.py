"""The names of drafts: what each stands for, and what is refused before anything is loaded."""

from __future__ import annotations

import pytest

from beagle.drafters.load import DraftSpec, resolve_draft
from beagle.errors import BeagleError

NAMES = {
    "none": DraftSpec(),
    "lookup": DraftSpec(lookup=True),
    "head": DraftSpec(head="head"),
    "head+lookup": DraftSpec(head="head", lookup=True),
    "runs/mine": DraftSpec(head="runs/mine"),
    "runs/mine+lookup": DraftSpec(head="runs/mine", lookup=True),
    "model:small": DraftSpec(model="small"),
    "model:small+lookup": DraftSpec(model="small", lookup=True),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_apart_and_put_together(name):
    assert DraftSpec.parse(name, "tiny") == NAMES[name]
    assert str(NAMES[name]) == name


def test_auto_is_what_ships_for_the_target():
    assert str(DraftSpec.parse("auto", "smollm2-135m")) == "head+lookup"
    assert (
        DraftSpec.parse("auto", "tiny")
        == DraftSpec.parse(None, "tiny")
        == DraftSpec.parse(False, "tiny")
        == DraftSpec()
    )


@pytest.mark.parametrize("name", ["nowhere", "nowhere+lookup", "", "none+lookup", "lookup+lookup", "auto+lookup"])
def test_heads_that_are_not_there_are_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BeagleError, match=f"draft '{name.removesuffix('+lookup')}': no such folder"):
        resolve_draft(name, "tiny")


def test_what_is_no_name_is_refused():
    with pytest.raises(BeagleError, match=r"^draft True is no text; give auto, head"):
        resolve_draft(True, "tiny")
