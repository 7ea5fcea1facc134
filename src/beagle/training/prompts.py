"""Question files: JSON lines or a JSON array in the formats people have, checked one by one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from beagle.errors import BeagleError
from beagle.targets.chat import Message, encode
from beagle.targets.target import Target

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PANDAS = "python -c \"import pandas; pandas.read_parquet('{0}').to_json('{0}.jsonl', orient='records', lines=True)\""
_OTHERS = {  # first bytes of files that are taken for question files, and what makes one of them
    b"PAR1": ("Parquet", _PANDAS),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -d '{0}'"),
    b"\xfd7zXZ": ("xz", "xz -dk '{0}'"),
    b"BZh": ("bzip2", "bzip2 -dk '{0}'"),
    b"PK\x03\x04": ("zip", "unzip '{0}'"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 '{0}' > '{0}.jsonl'"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 '{0}' > '{0}.jsonl'"),
}


@dataclass(frozen=True)
class Prompt:
    """User turns of one dialogue; the model's own answers go between them.

    Attributes:
        id: the file's own, else the number of its line: to be shown. What tells prompts apart is ``key``.
        system: the system message before the first turn; empty without one.
        repeat: how many prompts of the same content stand before it (see ``numbered``).
        source: the file and line that it comes from, if it comes from one.
        answers: what its file answers to the first turns, up to the first turn that it doesn't answer once.
    """

    id: str
    turns: tuple[str, ...]
    category: str = ""
    system: str = ""
    repeat: int = 0
    source: str = field(default="", compare=False)
    answers: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """The same for the same content (and repeat), whatever file it comes from: 24 hexadecimal digits."""
        content = json.dumps([self.system, *self.turns, self.repeat])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    @property
    def name(self) -> str:
        """For messages."""
        return self.source or f"prompt '{self.id}'"

    def encode(self, target: Target, answers: Sequence[str] = ()) -> list[int]:
        """Token ids of the dialogue up to the turn behind ``answers``; without a chat template the first turn as it is.

        Raises:
            BeagleError: the tokenizer or its template doesn't take it (the prompt is not named).
        """
        if not answers and not (self.system and has_template(target)):
            return encode(target, self.turns[0])
        return encode(target, self.messages(answers))

    def messages(self, answers: Sequence[str] = ()) -> list[Message]:
        """The dialogue up to the turn that comes after ``answers``, those between the turns before it."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]


def has_template(target: Target) -> bool:
    """Whether the tokenizer knows turns; a base model's doesn't."""
    return bool(getattr(target.tokenizer, "chat_template", None))


def answerable(target: Target, prompts: Sequence[Prompt], skip_bad_lines: bool | None = False) -> list[Prompt]:
    """Prompts all of whose turns the target's tokenizer and chat template take, found out before the first is answered.

    Args:
        skip_bad_lines: leave out the others, each with a line on stderr; None as of ``read_prompts``.
    Raises:
        BeagleError: one is not taken (its file and line are named), or none is left.
    """
    out = []
    for prompt in prompts:
        try:
            prompt.encode(target, ["..."] * (len(prompt.turns) - 1) if has_template(target) else ())
        except BeagleError as error:
            reject(f"{prompt.name}: {error}", error, skip_bad_lines)
        else:
            out.append(prompt)
    if prompts and not out:
        raise BeagleError(f"{target.name} takes none of the {len(prompts)} prompts; give others")
    return out


def numbered(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts, those that repeat an earlier one with its number: each has a key of its own."""
    seen: Counter[tuple[str, tuple[str, ...]]] = Counter()
    out = []
    for prompt in prompts:
        content = prompt.system, prompt.turns
        out.append(replace(prompt, repeat=seen[content]))
        seen[content] += 1
    return out


def read_prompts(path: str | Path, *, limit: int | None = None, skip_bad_lines: bool | None = False) -> list[Prompt]:
    """Read a file of prompts: JSON lines or one JSON array, in UTF-8, gzipped or not.

    A line (or an entry of the array) holds ``turns`` (FastChat, EAGLE, Spec-Bench), ``prompt`` or ``question``,
    ``messages`` (OpenAI) or ``conversations`` (ShareGPT). A system message stands first in the last two; the
    others may have a field ``system``.

    Args:
        limit: read no further than that many prompts.
        skip_bad_lines: leave out what is no prompt, each with a line on stderr. None is False without the option to
            name in an error.
    Raises:
        BeagleError: no such file, nothing in it, or a bad line (file and number named).
    """
    path = Path(path)
    prompts: list[Prompt] = []
    try:
        with path.open("rb") as file:
            packed = path.suffix == ".gz" or file.peek(2)[:2] == b"\x1f\x8b"
            for number, source, content in _rows(path, gzip.GzipFile(fileobj=file) if packed else file):
                if limit is not None and len(prompts) >= limit:
                    break
                try:
                    row = json.loads(content) if isinstance(content, str) else content
                    prompts.append(replace(parse_prompt(row, number), source=source))
                except (ValueError, RecursionError) as error:
                    what: Any = error
                    if isinstance(error, json.JSONDecodeError):
                        what = f"no JSON from column {error.colno} on"
                    elif isinstance(error, RecursionError):
                        what = "JSON nested too deeply"
                    reject(f"{source}: {what}", error, skip_bad_lines)
    except UnicodeDecodeError as error:
        raise BeagleError(f"question file '{path}' can't be read: {error}; save it in UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BeagleError(f"question file '{path}' can't be read: {error}; copy or compress it again") from error
    except OSError as error:
        raise BeagleError(f"question file '{path}' can't be read: {error.strerror or error}; check the path") from error
    if not prompts:
        raise BeagleError(
            f'question file \'{path}\' holds no prompt; give one JSON object a line with "turns" or "prompt"'
        )
    return prompts


def reject(message: str, error: Exception, skip: bool | None) -> None:
    """Pass over a bad prompt with a line on stderr, where that was asked for.

    Raises:
        BeagleError: it wasn't.
    """
    if not skip:
        raise BeagleError(
            f"{message}; mend the line or {'delete it' if skip is None else 'pass --skip-bad-lines'}"
        ) from error
    Console(stderr=True).print(f"[yellow]skipped {message}[/yellow]", highlight=False)


def _rows(path: Path, file: Any) -> Iterator[tuple[int, str, Any]]:
    """Number, source and content of every row: a line's text, or an entry of an array.

    Raises:
        BeagleError: the file is of another format, or an array that ends too soon.
    """
    start = file.peek(8)[:8]
    for magic, (name, command) in _OTHERS.items():
        if start.startswith(magic):
            raise BeagleError(
                f"question file '{path}' can't be read: it is {name}; convert it first: {command.format(path)}"
            )
    text: IO[str] = io.TextIOWrapper(file, encoding="utf-8-sig")
    number, first = next(((n, line) for n, line in enumerate(text, 1) if line.strip()), (1, ""))
    lines: Iterable[str] = text
    if first.lstrip().startswith("["):
        rest = text.read()
        try:
            entries = json.loads(first + rest)
        except (json.JSONDecodeError, RecursionError) as error:
            if not _is_json(first):
                where = f" from line {number - 1 + error.lineno} on" if isinstance(error, json.JSONDecodeError) else ""
                raise BeagleError(
                    f"question file '{path}' begins like a JSON array but is none{where}; copy or download it again"
                ) from error
            lines = rest.split("\n")
        else:
            for n, entry in enumerate(entries, 1):
                yield n, f"{path}: entry {n}", entry if isinstance(entry, dict) else []
            return
    for n, line in enumerate(chain([first], lines), number):
        if line.strip():
            yield n, f"{path}:{n}", line.strip()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse_prompt(row: Any, number: int) -> Prompt:
    """
    Raises:
        ValueError: the row holds no user turns in any known form.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    turns: Any
    answers: tuple[str, ...] = ()
    system: Any = [row["system"]] if row.get("system") else []
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
        talk: list[tuple[str, Any]] = []
        for message in dialogue:
            role = _ROLES.get(str(message.get("role") or message.get("from"))) if isinstance(message, dict) else None
            if role is None:
                raise ValueError("a message has no known role")
            content = message.get("content") or message.get("value")
            if role != "system":
                talk.append((role, content))
            if role == "user":
                turns.append(content)
            elif role == "system" and content:
                if turns:
                    raise ValueError("a system message stands behind a user's turn; it must be the first message")
                system.append(content)
        answers = _answers(talk)
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError("the user turns are not a list of non-empty texts")
    if not all(isinstance(text, str) for text in system):
        raise ValueError("the system message is not a text")
    identity = next((row[name] for name in ("id", "question_id") if row.get(name) is not None), number)
    joined = "\n\n".join(system)
    prompt = Prompt(str(identity), tuple(turns), str(row.get("category", "")), joined, answers=answers)
    try:
        "".join([prompt.id, prompt.category, prompt.system, *turns]).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a surrogate pair, which is no character") from error
    return prompt


def _answers(talk: list[tuple[str, Any]]) -> tuple[str, ...]:
    """Answers to the first turns of a dialogue of ``(role, content)``, as long as user and assistant take turns."""
    answers = []
    for (asks, _), (role, content) in zip(talk[::2], talk[1::2], strict=False):
        if (asks, role) != ("user", "assistant") or not isinstance(content, str) or not content.strip():
            break
        answers.append(content)
    return tuple(answers)
