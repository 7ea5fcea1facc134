"""The recipes of docs/extending.md, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from beagle.drafters.base import TreePlan
from beagle.drafters.block import HEADS
from beagle.drafters.checkpoint import load_head, save_head
from beagle.drafters.head_drafter import HeadDrafter
from beagle.model import Model
from beagle.training.config import TrainConfig
from beagle.training.stages import STAGES, stage_loss
from beagle.training.windows import Batch
from conftest import tiny_target

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
PROMPT = [3, 4, 5, 3, 4]


def recipe(title: str, **given):
    """The names that a section's code makes."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    code = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)
    names = {"__name__": "recipe", **given}
    exec(compile(code[1], title, "exec", dont_inherit=True), names)
    return names


def lossless(model: Model, exact: bool) -> int:
    """Drafted tokens of answers that are those of plain decoding."""
    plain = Model(tiny_target())
    drafted = 0
    for ids in (PROMPT, [9, 8, 7]):
        answer = model.generate(ids, max_new_tokens=40, exact=exact)
        assert answer.token_ids == plain.generate(ids, max_new_tokens=40, exact=exact).token_ids
        drafted += answer.stats.drafted
    several = model.generate_batch([PROMPT, [9, 8, 7]], max_new_tokens=40)
    assert [answer.token_ids for answer in several] == [
        plain.generate(ids, max_new_tokens=40).token_ids for ids in (PROMPT, [9, 8, 7])
    ]
    return drafted


@pytest.mark.parametrize("exact", [False, True])
def test_a_drafter(target, exact):
    model = recipe("Add a drafter", target=target)["model"]
    model.plan = TreePlan(nodes=8)
    assert lossless(model, exact) > 0


@pytest.fixture
def head_class(monkeypatch):
    for registered in (HEADS, STAGES):
        for name, value in list(registered.items()):
            monkeypatch.setitem(registered, name, value)  # so that what the recipe adds goes again
    found = recipe("Add a draft head")["ResidualHead"]
    yield found
    del HEADS["residual"], STAGES[found]


@pytest.mark.parametrize("exact", [False, True])
def test_a_draft_head_drafts(target, tmp_path, head_class, exact):
    torch.manual_seed(0)
    head = head_class(head_class.config_class.for_target(target))
    save_head(head, tmp_path, target="tiny", dtype=torch.float32, meta={})
    drafter = HeadDrafter(target, load_head(tmp_path, target))
    assert lossless(Model(target, drafter, TreePlan(nodes=8, depth=3)), exact) > 0


@pytest.mark.parametrize("stage", ["early", "late"])
def test_a_draft_head_is_trained(target, head_class, stage):
    torch.manual_seed(0)
    head = head_class(head_class.config_class.for_target(target))
    embeddings, states = torch.randn(2, 1, 40, target.hidden_size)
    batch = Batch(embeddings, states, torch.tensor([2]), torch.tensor([37]))
    loss, _ = stage_loss(
        head, batch, target.head_rows(), TrainConfig(), stage=stage, offset=0, noise=torch.zeros_like(states)
    )
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_a_runner(target, monkeypatch):
    runner = recipe("Add a runner", target=target)["InferenceRunner"]
    ran = []
    run = runner.__call__
    monkeypatch.setattr(runner, "__call__", lambda self, tokens, plan: ran.append(plan.kind) or run(self, tokens, plan))
    model = recipe("Add a drafter", target=target)["model"]
    model.plan = TreePlan(nodes=8)
    assert lossless(model, exact=False) > 0
    assert set(ran) == {"tree", "trees"}
