"""A side-by-side run and its file: written as the answers come, and continued where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beagle.decoding.costs import Costs
from beagle.evaluation.figures import figures
from beagle.evaluation.modes import Options, System
from beagle.evaluation.records import Record, write_result
from beagle.evaluation.run import Sets, run

SHOWN = 600  # characters of a question that are kept for whoever looks at its answer


@dataclass
class Session:
    """One run.

    Attributes:
        meta: machine, versions, command and arguments.
        path: the file; None: nothing is stored.
        records: answers of an earlier part of the run; those to come are added.
        costs: measured costs by mode, for the expected speed-ups.
    """

    systems: Sequence[System]
    sets: Sets
    options: Options
    meta: Mapping[str, Any]
    path: Path | None = None
    records: list[Record] = field(default_factory=list)
    costs: Mapping[str, Costs] = field(default_factory=dict)
    repeats: int = 1

    @property
    def total(self) -> int:
        return sum(map(len, self.sets.values()))

    @property
    def done(self) -> set[tuple[str, str]]:
        """Set and id of the questions that every mode has answered."""
        return {(record.set, record.id) for record in self.records}

    def run(self) -> Iterator[list[Record]]:
        """Answer what isn't answered yet; a question's records as soon as they are stored.

        Raises:
            BeagleError: a question can't be answered, or the file can't be written.
        """
        pieces = self.path is not None
        parts = run(self.systems, self.sets, self.options, repeats=self.repeats, done=self.done, pieces=pieces)
        for part in parts:
            self.records += part
            if self.path is not None:
                write_result(self.path, self.result(), self.records)
            yield part

    def result(self) -> dict[str, Any]:
        """All figures so far, what they are of, and the questions."""
        weights = {system.mode: system.weights_mb for system in self.systems}
        finished = len(self.done)
        state = {"finished_questions": finished, "interrupted": finished < self.total}
        asked = [
            {"set": name, "id": p.id, "category": p.category, "turns": [_cut(turn) for turn in p.turns]}
            for name, prompts in self.sets.items()
            for p in prompts
        ]
        found = figures(self.records, self.costs, weights, greedy=not self.options.temperature)
        return found | {"meta": {**self.meta, **state}, "questions": asked}


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
