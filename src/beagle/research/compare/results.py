"""What a comparison has found, by variant: means over seeds, and their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

ALPHAS = 5  # steps that validation simulates
OFTEN = 50  # drafts: a share of fewer says nothing


@dataclass(frozen=True)
class Entry:
    """One variant: the record of each seed, and its decoding figures by tree and seed."""

    name: str
    records: list[dict[str, Any]]
    decoding: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def step_alpha(self) -> list[float]:
        """α_1 … α_5 on validation answers, mean over seeds."""
        return [fmean(column) for column in zip(*(r["step_alpha"] for r in self.records), strict=True)]

    @property
    def depth(self) -> int:
        """How many of α_1 … α_5 are shares of ``OFTEN`` drafts at least, for every seed; one at least."""
        tried = [r.get("tried", [OFTEN] * len(r["step_alpha"])) for r in self.records]
        return max(1, sum(min(column) >= OFTEN for column in zip(*tried, strict=True)))

    @property
    def alphas(self) -> str:
        """α_1 … α_5 in a table's cell, a dash for those of too few drafts."""
        return " ".join(f"{a:.2f}" if j < self.depth else "-" for j, a in enumerate(self.step_alpha))

    @property
    def length(self) -> float:
        """Expected acceptance length of chain drafts, mean over seeds."""
        return fmean(r["expected_length"] for r in self.records)

    @property
    def parameters(self) -> int:
        return int(self.records[0]["parameters"])

    def stage(self, stage: str, figure: str) -> float | None:
        """A figure of one stage, mean over seeds; None if the variant lacks the stage."""
        found = [r["stages"][stage][figure] for r in self.records if stage in r["stages"]]
        return fmean(found) if found else None

    def memory_mb(self) -> float:
        """Peak above the process before training, whatever the stage; the median of the seeds, as runs differ by 10%."""
        return median(max(s["memory_mb"] for s in r["stages"].values()) for r in self.records)

    def decoded(self, figure: str, tree: str | None = None) -> float | None:
        """A decoding figure under a tree (default: the first), mean over seeds; None: nothing was decoded."""
        if not self.decoding:
            return None
        return fmean(f[figure] for f in self.decoding[tree or next(iter(self.decoding))])

    @property
    def acceptance(self) -> float:
        """τ where something was decoded, else the expected acceptance length."""
        tau = self.decoded("tau")
        return self.length if tau is None else tau


def entries(records: list[dict[str, Any]], decoding: dict[str, Any]) -> dict[str, Entry]:
    """By variant, in the order of the records.

    ``decoding``: figures by tree, then by ``variant/seedN``.
    """
    out: dict[str, Entry] = {}
    for name in dict.fromkeys(r["variant"] for r in records):
        mine = [r for r in records if r["variant"] == name]
        trees = {
            tree: [figures[f"{name}/seed{r['seed']}"] for r in mine]
            for tree, figures in decoding.items()
            if tree != "plain"
        }
        out[name] = Entry(name, mine, trees)
    return out


def growth(values: Sequence[float]) -> float:
    """The last of some peaks over the first, in MB; what is below 1 MB is the measurement's own."""
    return max(values[-1], 1.0) / max(values[0], 1.0)


def reached(entry: Entry, length: float, axis: str) -> float | None:
    """``seconds`` or ``tokens`` of training until the expected length is ``length`` (linear between
    validations), mean over seeds; None if some seed never gets there."""
    found = []
    for record in entry.records:
        before = (0.0, 1.0)
        for point in record["curve"]:
            now = (float(point[axis]), float(point["expected_length"]))
            if now[1] >= length:
                share = (length - before[1]) / (now[1] - before[1]) if now[1] > before[1] else 1.0
                found.append(before[0] + max(0.0, share) * (now[0] - before[0]))
                break
            before = now
        else:
            return None
    return fmean(found)
