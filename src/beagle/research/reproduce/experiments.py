"""The paper's tables and figures by name, each with the comparison that answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from beagle.errors import BeagleError
from beagle.research.compare.suites import SUITES, Suite
from beagle.research.compare.variants import Variant, parse_list


@dataclass(frozen=True)
class Item:
    """One of the paper's experiments.

    Attributes:
        variants: heads that it trains.
        suite: what judges them; None: the side-by-side run of the tables.
        decodes: whether questions are answered with the heads.
    """

    name: str
    title: str
    variants: str
    suite: Suite | None = None
    decodes: bool = False

    def heads(self) -> list[Variant]:
        return parse_list(self.variants)


def _of_suite(name: str, decodes: bool) -> Item:
    suite = SUITES[name]
    return Item(name, suite.title, suite.variants, suite, decodes)


DECODED = {"fig3": False, "fig4": True, "fig5": False, "fig6": False, "fig7": False, "fig10": True, "fig11": True,
           "fig12": False, "memory": False}  # fmt: skip
TABLES = Item("table1", "Speed, speed-up, τ and memory (Tables 1 and 2)", "beagle,eagle", decodes=True)
ITEMS = {TABLES.name: TABLES} | {name: _of_suite(name, decodes) for name, decodes in DECODED.items()}
ALIASES = {"table2": "table1"}  # the same measurement of other targets: run it with another --target
NOT_HERE = ("fig1", "fig2", "fig8", "fig9")


def find_items(names: Sequence[str]) -> list[Item]:
    """Items in the paper's order, each once; ``all`` is every one.

    Raises:
        BeagleError: one is unknown, or none is named.
    """
    wanted = set()
    for name in names:
        if name in NOT_HERE:
            raise BeagleError(f"item '{name}' is none of the experiments repeated here; use {_known()}")
        if name != "all" and name not in ITEMS and name not in ALIASES:
            raise BeagleError(f"item '{name}' is unknown; use {_known()}")
        wanted |= set(ITEMS) if name == "all" else {ALIASES.get(name, name)}
    if not wanted:
        raise BeagleError(f"name what to reproduce: {_known()}")
    return [item for name, item in ITEMS.items() if name in wanted]


def _known() -> str:
    return ", ".join(["all", "table1", "table2", *list(ITEMS)[1:]])
