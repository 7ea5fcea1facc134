"""Question files: JSON lines in the formats people have, checked line by line."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from beagle.errors import BeagleError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Prompt:
    """User turns of one dialogue; the model's own answers go between them."""

    id: str
    turns: tuple[str, ...]
    category: str = ""


def read_prompts(path: str | Path, *, limit: int | None = None, skip_bad_lines: bool = False) -> list[Prompt]:
    """Read a ``.jsonl`` or ``.jsonl.gz`` file of prompts.

    A line holds ``turns`` (FastChat, EAGLE, Spec-Bench), ``prompt`` or ``question``, ``messages``
    (OpenAI) or ``conversations`` (ShareGPT).

    Raises:
        BeagleError: no such file, nothing in it, or a bad line (file and number named).
    """
    path = Path(path)
    prompts: list[Prompt] = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(prompts) >= limit:
                    break
                if not line.strip():
                    continue
                try:
                    prompts.append(parse_prompt(json.loads(line.strip()), number))
                except ValueError as error:
                    what = f"no JSON from column {error.colno} on" if isinstance(error, json.JSONDecodeError) else error
                    message = f"{path}:{number}: {what}"
                    if not skip_bad_lines:
                        raise BeagleError(f"{message}; mend the line or pass --skip-bad-lines") from error
                    Console(stderr=True).print(f"[yellow]skipped {message}[/yellow]", highlight=False)
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise BeagleError(f"question file '{path}' can't be read: {reason}; check the path") from error
    if not prompts:
        raise BeagleError(
            f'question file \'{path}\' holds no prompt; give one JSON object a line with "turns" or "prompt"'
        )
    return prompts


def parse_prompt(row: Any, number: int) -> Prompt:
    """
    Raises:
        ValueError: the row holds no user turns in any known form.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "turns" in row:
        turns = row["turns"]
    elif "prompt" in row or "question" in row:
        asked = row.get("prompt", row.get("question"))
        turns = asked if isinstance(asked, list) else [asked]
    else:
        dialogue = row.get("messages") or row.get("conversations")
        if not isinstance(dialogue, list):
            raise ValueError('none of "turns", "prompt", "messages", "conversations" is there')
        turns = []
        for message in dialogue:
            role = _ROLES.get(str(message.get("role") or message.get("from"))) if isinstance(message, dict) else None
            if role is None:
                raise ValueError("a message has no known role")
            if role == "user":
                turns.append(message.get("content") or message.get("value"))
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError("the user turns are not a list of non-empty texts")
    identity = row.get("id", row.get("question_id", number))
    return Prompt(str(identity), tuple(turns), str(row.get("category", "")))
