"""Costs of passes that follow the machine while it decodes: its memory gets slower and faster within minutes."""

from __future__ import annotations

from dataclasses import dataclass, field

from beagle.decoding.costs import Costs

KEPT = 0.99  # weight of a pass after each later one, so that about the last hundred count
BEGIN = (1, 8, 16)  # tokens of the measured passes that the sums begin with
BEGIN_WEIGHT = 4.0  # of each of them, in passes
KNEE = 16  # tokens up to which a pass takes longer evenly
STEEPNESS = 30.0  # weight of the measured steepness, in passes times squared tokens: alike passes say nothing of it
FAR = 2.0  # times further from what is expected are taken for so many times it: an interrupted pass


@dataclass(frozen=True)
class LiveCosts(Costs):
    """Costs whose ``verify`` is a line through the times of the last passes; above ``KNEE`` as steep as was measured.

    Attributes:
        start: the costs as measured.
        sums: of the passes' weights, tokens, squared tokens, seconds, and tokens times seconds.
    """

    start: Costs = field(kw_only=True)
    sums: list[float] = field(default_factory=lambda: [0.0] * 5, kw_only=True)

    @classmethod
    def of(cls, costs: Costs) -> LiveCosts:
        """Costs that begin as these."""
        live = cls(
            list(costs.verify), costs.draft, costs.depth, costs.seconds_per_extra_context, costs.steady, start=costs
        )
        for tokens in BEGIN:
            if tokens < len(costs.verify):
                live._add(tokens, costs.verify[tokens], BEGIN_WEIGHT)
        return live

    def note(self, tokens: int, seconds: float) -> None:
        """Count a pass.

        Args:
            tokens: of the pass, its root included; those of large trees are not counted.
            seconds: that it took.
        """
        if tokens > min(KNEE, len(self.verify) - 1):
            return
        expected = self.verify[tokens]
        self.sums[:] = [KEPT * total for total in self.sums]
        self._add(tokens, min(max(seconds, expected / FAR), expected * FAR), 1.0)
        self._follow()

    def _add(self, tokens: int, seconds: float, weight: float) -> None:
        of_pass = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self.sums[:] = [total + weight * value for total, value in zip(self.sums, of_pass, strict=True)]

    def _follow(self) -> None:
        """Draw the line anew."""
        measured, last = self.start.verify, len(self.verify) - 1
        knee = min(KNEE, last)
        weight, tokens, squares, seconds, products = self.sums
        before = (measured[knee] - measured[1]) / max(1, knee - 1)
        spread = squares - tokens * tokens / weight
        together = products - tokens * seconds / weight
        slope = max(0.0, (together + STEEPNESS * before) / (spread + STEEPNESS))
        begin = max((seconds - slope * tokens) / weight, 0.0)
        for n in range(last + 1):
            above = n - knee
            line = begin + slope * min(n, knee)
            self.verify[n] = line + max(slope * above, measured[n] - measured[knee]) if above > 0 else line
