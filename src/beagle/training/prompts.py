"""What a target is asked, and what dialogues bring: rows in the shapes people have, checked one by one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from beagle.errors import BeagleError
from beagle.targets.chat import Message, encode
from beagle.targets.target import Target
from beagle.training.prompt_files import rows

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_FIELDS = ("turns", "prompt", "question", "messages", "conversations")


@dataclass(frozen=True)
class Prompt:
    """User turns of one dialogue; the model's own answers go between them.

    Attributes:
        id: the file's own, else the number of its line: to be shown. What tells prompts apart is ``key``.
        system: the system message before the first turn; empty without one.
        repeat: how many prompts of the same content stand before it (see ``numbered``).
        source: the file and line that it comes from, if it comes from one.
        answers: what its file answers to the first turns, up to the first turn that it doesn't answer once.
        dialogue: the messages as they stand in its file, without the system's; empty where it holds questions alone.
        text: a text without turns, which nothing can be asked about.
    """

    id: str
    turns: tuple[str, ...]
    category: str = ""
    system: str = ""
    repeat: int = 0
    source: str = field(default="", compare=False)
    answers: tuple[str, ...] = field(default=(), compare=False)
    dialogue: tuple[Message, ...] = field(default=(), compare=False)
    text: str = ""

    @property
    def is_askable(self) -> bool:
        """Whether a model can answer its turns in place of the answers that it brings."""
        tools = any(message["role"] == "tool" or message.get("tool_calls") for message in self.dialogue)
        return bool(self.turns) and not tools

    @property
    def key(self) -> str:
        """The same for the same content (and repeat), whatever file it comes from: 24 hexadecimal digits."""
        content = json.dumps([self.system, *(self.turns or [self.text]), self.repeat])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    @property
    def name(self) -> str:
        return self.source or f"prompt '{self.id}'"

    def encode(self, target: Target, answers: Sequence[str] = ()) -> list[int]:
        """Token ids of the dialogue up to the turn behind ``answers``; without a chat template the first turn as it is.

        Raises:
            BeagleError: the tokenizer or its template doesn't take it; the prompt is named.
        """
        asked = self.messages(answers) if answers or (self.system and has_template(target)) else self.turns[0]
        try:
            return encode(target, asked)
        except BeagleError as error:
            raise BeagleError(f"{self.name}: {error}") from error

    def messages(self, answers: Sequence[str] = ()) -> list[Message]:
        """The dialogue up to the turn that comes after ``answers``, those between the turns before it."""
        return [*self._answered(answers), {"role": "user", "content": self.turns[len(answers)]}]

    def given(self) -> list[Message]:
        """The dialogue as its file has it, answers included."""
        return [*self._answered(()), *self.dialogue] if self.dialogue else self._answered(self.answers)

    def _answered(self, answers: Sequence[str]) -> list[Message]:
        """The system message, and the turns that these answers are to, each with its answer."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return messages


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
            reject(str(error), error, skip_bad_lines)
        else:
            out.append(prompt)
    if prompts and not out:
        raise BeagleError(f"{target.name} takes none of the {len(prompts)} prompts; give others")
    return out


def numbered(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts, those that repeat an earlier one with its number: each has a key of its own."""
    seen: Counter[tuple[str, tuple[str, ...], str]] = Counter()
    out = []
    for prompt in prompts:
        content = prompt.system, prompt.turns, prompt.text
        out.append(replace(prompt, repeat=seen[content]))
        seen[content] += 1
    return out


def read_prompts(
    path: str | Path, *, limit: int | None = None, skip_bad_lines: bool | None = False, given: bool = False
) -> list[Prompt]:
    """Read prompts: JSON lines or one JSON array, in UTF-8, gzipped or not; with ``datasets`` Parquet, Arrow and folders.

    A row holds ``turns`` (FastChat, EAGLE, Spec-Bench), ``prompt`` (with ``completion``) or ``question``, ``messages``
    (OpenAI) or ``conversations`` (ShareGPT). A system message stands first in the last two; the others may have a
    field ``system``.

    Args:
        limit: read no further than that many prompts.
        skip_bad_lines: leave out what is no prompt, each with a line on stderr. None is False without the option to
            name in an error.
    Raises:
        BeagleError: no such file, nothing in it, or a bad line (file and number named).
    """
    path = Path(path)
    prompts: list[Prompt] = []
    for number, source, content in rows(path):
        if limit is not None and len(prompts) >= limit:
            break
        try:
            row = json.loads(content) if isinstance(content, str) else content
            prompts.append(replace(parse_prompt(row, number, given=given), source=source))
        except (ValueError, RecursionError) as error:
            what: Any = error
            if isinstance(error, json.JSONDecodeError):
                what = f"no JSON from column {error.colno} on"
            elif isinstance(error, RecursionError):
                what = "JSON nested too deeply"
            reject(f"{source}: {what}", error, skip_bad_lines)
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


def parse_prompt(row: Any, number: int, *, given: bool = False) -> Prompt:
    """
    Args:
        number: of the row, in place of an id.
        given: take what brings its own answers first, and also what can't be asked: a ``text``, and dialogues with
            messages of tools.
    Raises:
        ValueError: the row is in no known shape.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    turns: Any = []
    talk: list[dict[str, Any]] = []
    text: Any = ""
    system: Any = [row["system"]] if row.get("system") else []
    dialogue = _dialogue(row)
    asked = next((row[name] for name in ("turns", "prompt", "question") if name in row), dialogue)
    if dialogue is not None and (given or asked is dialogue or _are_messages(asked)):
        talk, more = _talk(dialogue, tools=given)
        system += more
        turns = [message["content"] for message in talk if message["role"] == "user"]
    elif "turns" in row or asked is not None:
        turns = asked if isinstance(asked, list) or "turns" in row else [asked]
    elif given and isinstance(row.get("text"), str) and row["text"].strip():
        text = row["text"]
    else:
        takes = ", ".join(f'"{name}"' for name in (*_FIELDS, *(["text"] if given else [])))
        found = ", ".join(f'"{name}"' for name in row) or "nothing"
        raise ValueError(f"none of {takes} is there, only {found}")
    if not text and not (isinstance(turns, list) and turns and all(isinstance(t, str) and t.strip() for t in turns)):
        raise ValueError("the user turns are not a list of non-empty texts")
    if not all(isinstance(part, str) for part in system):
        raise ValueError("the system message is not a text")
    identity = next((row[name] for name in ("id", "question_id") if row.get(name) is not None), number)
    prompt = Prompt(
        str(identity), tuple(turns), str(row.get("category", "")), "\n\n".join(system),
        answers=_answers(talk), dialogue=tuple(talk), text=text,
    )  # fmt: skip
    try:
        "".join([prompt.id, prompt.category, prompt.system, *turns, text]).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a surrogate pair, which is no character") from error
    return prompt


def _dialogue(row: dict[str, Any]) -> list[Any] | None:
    """The messages of a row, a prompt and its completion among them; None: it has none."""
    found = row.get("messages") or row.get("conversations")
    if isinstance(found, list):
        return found
    prompt: Any = row.get("prompt")
    completion: Any = row.get("completion")
    asked: list[Any]
    if _are_messages(prompt):
        asked = prompt
    elif isinstance(prompt, str) and completion:
        asked = [{"role": "user", "content": prompt}]
    else:
        return None
    if not _are_messages(completion):
        completion = [{"role": "assistant", "content": completion}] if completion else []
    return [*asked, *completion]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _talk(dialogue: list[Any], *, tools: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages as chat templates have them, and the contents of the system's."""
    talk: list[dict[str, Any]] = []
    system = []
    for message in dialogue:
        if not isinstance(message, dict):
            raise ValueError("a message is no JSON object")
        named = message.get("role") or message.get("from")
        role = _ROLES.get(str(named))
        if role is None or (role == "tool" and not tools):
            known = sorted(name for name, of in _ROLES.items() if tools or of != "tool")
            raise ValueError(f"a message has no known role: {named!r} is none of {', '.join(known)}")
        content = message.get("content") or message.get("value")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if role == "system":
            if content and any(earlier["role"] == "user" for earlier in talk):
                raise ValueError("a system message stands behind a user's turn; it must be the first message")
            system += [content] if content else []
            continue
        more = {name: value for name, value in message.items() if name not in ("role", "from", "content", "value")}
        talk.append({**more, "role": role, "content": content})
    return talk, system


def _answers(talk: list[dict[str, Any]]) -> tuple[str, ...]:
    """Answers to the first turns of a dialogue, as long as user and assistant take turns."""
    answers = []
    for asks, answer in zip(talk[::2], talk[1::2], strict=False):
        content = answer["content"]
        if (
            (asks["role"], answer["role"]) != ("user", "assistant")
            or not isinstance(content, str)
            or not content.strip()
        ):
            break
        answers.append(content)
    return tuple(answers)
