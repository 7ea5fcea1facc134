"""What can be compared, by name: an architecture, its stages, and what it changes of the recipe.

beagle                    early stage, then late stage, as the recipe says
beagle-early-k1           the early stage alone, for the whole budget, window 1
beagle-s8                 8 simulated steps (and a window of 8 where the recipe's is smaller)
beagle-late-k8-s8         the late stage alone
eagle, eagle-unrolled     single step; single step, then unrolled with the recipe's steps
eagle-u8, eagle-late-u8   unrolled over 8 steps
eagle3, eagle3-u7         unrolled for the whole budget, over the recipe's steps or 7 (as published)
beagle-kv3, beagle-linear with 3 KV heads; with the newest state through a matrix
beagle-moe                with four MLPs in place of one
eagle3-m20                with an MLP of 20 times 128 channels, so that heads of two architectures have as many weights
beagle-b4                 batches of 4 where the recipe's count as 16 (the paper's)
beagle-lk, eagle-tvce     with another loss; beagle-dpace: with D-PACE's weights
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from beagle.drafters.block import HEADS
from beagle.errors import BeagleError
from beagle.research.ablations import AblatedHead
from beagle.training.config import TrainConfig
from beagle.training.recipe import Recipe

PAPERS_BATCH = 16
MLP_UNIT = 128  # channels, of the word mN
ONE_WINDOW = {"early_window": None}  # both stages have the recipe's ``window``
# what a word of a name changes of the recipe: the training section, and the head's
TRAIN: dict[str, dict[str, Any]] = {
    "random": ONE_WINDOW,  # in a window of 1 nothing could be hidden
    "onewindow": ONE_WINDOW,
    "noreg": {"regression": 0.0},
    "window": {"dpace": False},  # which weighs chains, and l = k has more slots a step than chains
    "tv": {"loss": "total_variation", "cross_entropy_share": 0.0},
    "tvce": {"loss": "total_variation", "cross_entropy_share": 0.1},
    "lk": {"loss": "lk", "cross_entropy_share": 0.0},
    "logacc": {"loss": "log_acceptance", "cross_entropy_share": 0.0},
    "dpace": {"dpace": True},
}
# what is published of an architecture that has no recipe of its own here: tokens alone are what EAGLE-3 learns from
PUBLISHED: dict[str, dict[str, Any]] = {"eagle3": {"regression": 0.0, "noise": 0.0, "step_decay": 0.8}}
HEAD: dict[str, dict[str, Any]] = {
    "nonewest": {"newest_state": "none"},
    "notoken": {"token_in_mlp": False},
}
ABLATED: dict[str, dict[str, Any]] = {  # of ``research.ablations``
    "random": {"early_mask": "random"},
    "window": {"late_loss": "window"},
    "noconcat": {"concat": False},
    "linear": {"newest_through_matrix": True},
    "moe": {"experts": 4},
}
OF_ALL = "kvN, mN, bN, noreg, tv, tvce, lk, logacc, dpace"
WORDS = {
    "beagle": f"early, late, kN, sN, {OF_ALL}, random, window, onewindow, noconcat, nonewest, notoken, linear, moe",
    "eagle": f"unrolled, late, uN, {OF_ALL}",
    "eagle3": f"uN, {OF_ALL}",
}


@dataclass(frozen=True)
class Variant:
    """One way to train a head.

    Attributes:
        early: whether it has the early stage; the recipe's epochs say how both share the budget.
        late: whether it has the late stage.
        window: k of both stages; None: the recipe's.
        steps: s; None: the recipe's.
        batch: its size, the recipe's being 16.
    """

    name: str
    architecture: str
    early: bool
    late: bool
    window: int | None = None
    steps: int | None = None
    batch: int = PAPERS_BATCH
    train: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)

    def settings(self, recipe: Recipe, seed: int) -> tuple[TrainConfig, dict[str, Any]]:
        """The recipe's training section and head options as this variant has them.

        ``early_epochs`` and ``late_epochs`` become shares of the budget, adding up to 1.
        """
        base = recipe.train
        window = self.window or max(base.window, self.steps or 1)
        steps = min(self.steps or base.steps, window)
        both = base.early_epochs + base.late_epochs
        early_window = None if self.window else base.early_window
        early = base.early_epochs / both if self.early and self.late and both else float(self.early)
        train = replace(
            base, seed=seed, window=window, early_window=early_window, steps=steps, early_epochs=early,
            late_epochs=1 - early, batch_tokens=max(1, base.batch_tokens * self.batch // PAPERS_BATCH),
        )  # fmt: skip
        train = replace(train, **self.train)
        known = {f.name for f in fields(HEADS[self.architecture].config_class)}
        head = {k: v for k, v in recipe.head.items() if k in known}  # what both kinds of head have is shared
        if self.architecture == "eagle3":  # whatever ours reads: the layers that were published
            head.pop("kv_layers", None)
        head |= self.head
        if head.get("newest_through_matrix"):  # whatever the recipe's head does
            head["newest_state"] = "scale"
        return train, {**head, "architecture": AblatedHead.architecture if self.ablated else self.architecture}

    @property
    def ablated(self) -> bool:
        """Whether something is done that only ``research.ablations`` does."""
        return any(word in ABLATED for word in self.name.split("-"))

    def plain_name(self, recipe: Recipe) -> str:
        """Without the words that say what the recipe says: names of one training have one folder."""
        of_recipe = (f"k{recipe.train.window}", f"s{recipe.train.steps}", f"u{recipe.train.steps}", f"b{PAPERS_BATCH}")
        words = [word for word in self.name.split("-") if word not in of_recipe]
        plain = "-".join(words)
        same = parse(plain).settings(recipe, 0) == self.settings(recipe, 0)
        return plain if same else self.name


def parse(name: str) -> Variant:
    """
    Raises:
        BeagleError: no such architecture, or a word it doesn't know.
    """
    architecture, *words = name.split("-")
    if architecture not in WORDS:
        raise BeagleError(f"variant '{name}' is unknown; begin with {' or '.join(WORDS)}, then -{{{WORDS['beagle']}}}")
    numbers: dict[str, int] = {}
    train: dict[str, Any] = {**PUBLISHED.get(architecture, {})}
    head: dict[str, Any] = {}
    for word in words:
        number = re.fullmatch(r"(k|s|u|kv|m|b)([1-9]\d?)", word)
        letters = ("k", "s", "kv", "m", "b") if architecture == "beagle" else ("u", "kv", "m", "b")
        if number and number[1] in letters and number[1] not in numbers:
            numbers[number[1]] = int(number[2])
        elif word not in WORDS[architecture].split(", ") or words.count(word) > 1 or word.endswith("N"):
            raise BeagleError(f"variant '{name}': '{word}' is unknown; {architecture} takes {WORDS[architecture]}")
        changed = TRAIN.get(word, {})
        if any(train.get(key, value) != value for key, value in changed.items()):
            raise BeagleError(f"variant '{name}': '{word}' contradicts a word before it; leave one of them out")
        train |= changed
        head |= HEAD.get(word, {}) | ABLATED.get(word, {})
    if "kv" in numbers:
        head["num_kv_heads"] = numbers["kv"]
    if "m" in numbers:
        head["intermediate_size"] = MLP_UNIT * numbers["m"]
    window, steps = numbers.get("k"), numbers.get("s", numbers.get("u"))
    batch = numbers.get("b", PAPERS_BATCH)
    if window and steps and steps > window:
        raise BeagleError(f"variant '{name}' simulates {steps} steps in a window of {window}; make k at least as large")
    only_early = "early" in words or (architecture == "eagle" and not {"unrolled", "late"} & set(words) and not steps)
    if "late" in words and "early" in words:
        raise BeagleError(f"variant '{name}' is both early and late alone; leave both words out for both stages")
    early = architecture != "eagle3" and "late" not in words
    return Variant(name, architecture, early, not only_early, window, steps, batch, train, head)


def parse_list(text: str) -> list[Variant]:
    """``a,b-s1..s4``: names and ranges, each once.

    Raises:
        BeagleError: a name is unknown, given twice, or there is none.
    """
    names: list[str] = []
    for word in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"(.*-)([ksu])([1-9])\.\.\2([1-9])", word)
        names += [f"{span[1]}{span[2]}{i}" for i in range(int(span[3]), int(span[4]) + 1)] if span else [word]
    names = [name for name in names if name]
    if not names:
        raise BeagleError("variants is empty; try beagle,eagle")
    if twice := [name for name in names if names.count(name) > 1]:
        raise BeagleError(f"variant '{twice[0]}' is given twice; name each once")
    return [parse(name) for name in names]
