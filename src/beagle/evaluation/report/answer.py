"""A single answer, token by token, by where each came from: the target, or a depth of the draft."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from beagle.errors import BeagleError
from beagle.evaluation.records import Record

TERMINAL = ("", "black on #cfe3f5", "black on #9cc7ea", "black on #64a5da", "white on #2f7fbf", "white on #0f5a99")


def find_record(records: Sequence[Record], identity: str, mode: str | None = None) -> Record:
    """The record of a question (``ID``, or ``SET/ID`` where sets share ids), of a drafting mode unless named.

    Raises:
        BeagleError: there is none, or several sets have one.
    """
    found = [r for r in records if not r.repeat and identity in (r.id, f"{r.set}/{r.id}")]
    if not found:
        ids = list(dict.fromkeys(r.id for r in records))
        some = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise BeagleError(f"question '{identity}' is not in the result; it holds {some}")
    sets = list(dict.fromkeys(r.set for r in found))
    if len(sets) > 1:
        raise BeagleError(f"question '{identity}' is in several sets; name it {sets[0]}/{identity} or so")
    by_mode = {r.mode: r for r in found}
    if mode is None:
        mode = next(
            (m for m in by_mode if m != "plain" and any(any(t.stats.accepted) for t in by_mode[m].turns)), found[0].mode
        )
    if mode not in by_mode:
        raise BeagleError(f"mode '{mode}' did not answer question '{identity}'; use {', '.join(by_mode)}")
    return by_mode[mode]


def coloured_turns(record: Record) -> list[Text]:
    """Each turn's answer for a terminal: the deeper in the draft, the darker its ground."""
    turns = []
    for turn in record.turns:
        text = Text()
        for piece, depth in zip(turn.pieces, turn.origins(), strict=True):
            text.append(piece, TERMINAL[min(depth, len(TERMINAL) - 1)])
        turns.append(text)
    return turns


def legend() -> Text:
    text = Text("the target's own ")
    for depth, style in enumerate(TERMINAL[1:], 1):
        text.append(f" {depth}{'+' if depth == len(TERMINAL) - 1 else ''} ", style)
    return text.append(" accepted at this depth of the draft")
