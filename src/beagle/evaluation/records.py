"""One mode's answer to one question, and the file that holds them all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beagle.decoding.stats import Stats, pooled
from beagle.errors import BeagleError
from beagle.files import write_text, writing_to


@dataclass(frozen=True)
class Turn:
    """The answer to one turn of a question.

    Attributes:
        pieces: the text of each token, for viewers that have no tokenizer.
    """

    ids: list[int]
    stats: Stats
    pieces: list[str] = field(default_factory=list)

    def origins(self) -> list[int]:
        """Depth in the draft tree of each token, 0 where it is the target's own."""
        origins = [0] * (self.stats.tokens - self.stats.passed_tokens)  # prefill's
        for accepted in self.stats.accepted:
            origins += [*range(1, accepted + 1), 0]
        return origins[: len(self.ids)]


@dataclass(frozen=True)
class Record:
    """One mode's answer to a whole question, turn by turn, in one of the repeats.

    Attributes:
        peak_memory_mb: of the process, or of the GPU.
        growth_mb: how much of it came while answering.
        difference: where it leaves plain decoding's answer, if it does and both are greedy:
            ``turn``, ``position`` and ``gap`` (see ``first_divergence``).
    """

    set: str
    id: str
    category: str
    mode: str
    repeat: int
    turns: list[Turn]
    peak_memory_mb: float = 0.0
    growth_mb: float = 0.0
    difference: dict[str, Any] | None = None

    @property
    def stats(self) -> Stats:
        return pooled(turn.stats for turn in self.turns)

    @property
    def answers(self) -> list[list[int]]:
        return [turn.ids for turn in self.turns]

    def as_dict(self) -> dict[str, Any]:
        row = {name: value for name, value in vars(self).items() if name != "turns"}
        row["turns"] = []
        for turn in self.turns:
            stats = {
                name: round(value, 6)
                for name, value in asdict(turn.stats).items()
                if not isinstance(value, dict | list)
            }
            row["turns"].append({"ids": turn.ids, "pieces": turn.pieces, "accepted": turn.stats.accepted, **stats})
        return row

    @staticmethod
    def from_dict(row: dict[str, Any]) -> Record:
        turns = []
        for turn in row["turns"]:
            stats = {name: value for name, value in turn.items() if name not in ("ids", "pieces")}
            turns.append(Turn(turn["ids"], Stats(**stats, accepted_at=dict(Counter(turn["accepted"]))), turn["pieces"]))
        return Record(**{**row, "turns": turns})


def write_result(path: Path, result: dict[str, Any], records: Iterable[Record]) -> None:
    """Write figures and raw answers, an answer a line, so that a reader never sees half a file.

    Raises:
        BeagleError: it can't be written.
    """
    rows = ",\n".join("  " + json.dumps(record.as_dict(), ensure_ascii=False) for record in records)
    head = json.dumps(result, indent=1, ensure_ascii=False).removesuffix("\n}")
    with writing_to(path, "free space or choose another file"):
        write_text(path, f'{head},\n "records": [\n{rows}\n ]\n}}\n')


def read_result(path: Path) -> dict[str, Any]:
    """A result file as ``beagle eval`` wrote it.

    Raises:
        BeagleError: it can't be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BeagleError(f"result file '{path}' can't be read: {reason}; check the path") from error
    if not isinstance(content, dict) or not {"modes", "ratios", "meta"} <= set(content):
        raise BeagleError(f"'{path}' holds no side-by-side run; give a file that `beagle eval --json` wrote")
    arguments = content["meta"].get("arguments", {})
    if "beam" in arguments:  # the name of earlier versions
        arguments["top_k"] = arguments.pop("beam")
    return content


def read_records(path: Path, content: dict[str, Any]) -> list[Record]:
    """The single answers of a result; refuses damaged ones."""
    try:
        records = [Record.from_dict(row) for row in content["records"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BeagleError(
            f"'{path}' holds no readable single answers ({error}); give a file that `beagle eval --json` wrote"
        ) from error
    return records
