"""Answers of a target as files of token ids, without their prompts: safetensors and a manifest.

Whoever has the prompts can train from them, and the target needs not answer again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from beagle.errors import BeagleError
from beagle.files import first_change, read_json, replacing, write_json, writing_to
from beagle.targets.target import Target
from beagle.training.prompts import Prompt
from beagle.training.states import template_digest

FILES = "answers-*.safetensors"
FILE_TOKENS = 2_000_000  # about 4 MB of two bytes each
COLUMNS = ("prompt", "id", "turn", "temperature", "ended", "prompt_tokens")


@dataclass(frozen=True)
class StoredAnswer:
    """The answer to one turn of a prompt.

    Attributes:
        prompt: key of the prompt (see ``prompt_key``).
        id: the prompt's id in the file that it came from, to be shown.
        turn: number of the turn, from 0; earlier turns were answered first, with the answers that are stored here.
        temperature: it was sampled at; 0 is greedy.
        ended: whether the target ended it; the others were cut at the most tokens of an answer.
        prompt_tokens: number of tokens before the answer: chat template, earlier turns and their answers.
        tokens: ``[n]`` int64: the answer, with the token that ends it where it ended.
    """

    prompt: str
    id: str
    turn: int
    temperature: float
    ended: bool
    prompt_tokens: int
    tokens: Tensor

    @property
    def text_ids(self) -> list[int]:
        """The answer without the token that ends it."""
        return [int(token) for token in (self.tokens[:-1] if self.ended else self.tokens)]


@dataclass(frozen=True)
class AnswersManifest:
    """Whose answers a folder holds, and how they were made.

    Attributes:
        weights: digest of its weights, in whatever dtype it is loaded.
        vocab_size: number of its tokens; up to 65,536 they are stored as uint16, else as int32.
        sampling: how the answers were made, to be read by people.
    """

    target: str
    weights: str
    template: str
    vocab_size: int
    end_tokens: list[int]
    sampling: dict[str, Any]

    @classmethod
    def of(cls, target: Target, sampling: dict[str, Any]) -> AnswersManifest:
        ends = sorted(target.eos_ids)
        return cls(target.name, target.digest, template_digest(target), target.vocab_size, ends, sampling)


def prompt_key(prompt: Prompt) -> str:
    """16 hexadecimal digits of the SHA-256 of the JSON list of user turns, ``{"system": text}`` before them if any."""
    content: list[Any] = [{"system": prompt.system}] if prompt.system else []
    text = json.dumps([*content, *prompt.turns], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class AnswerFolder:
    """A folder of answers of one target."""

    def __init__(self, folder: str | Path, manifest: AnswersManifest) -> None:
        self.folder, self.manifest = Path(folder), manifest

    @classmethod
    def open(cls, folder: str | Path) -> AnswerFolder:
        """The answers of a folder; refuses one without them."""
        path = Path(folder) / "manifest.json"
        remedy = "copy or download the folder again"
        found = read_json(path, remedy)
        if found is None:
            raise BeagleError(f"'{folder}' is no folder of answers: it holds no manifest.json; check the path")
        try:
            manifest = AnswersManifest(**found)
        except TypeError as error:
            raise BeagleError(f"'{path}' is damaged ({error}); {remedy}") from error
        return cls(folder, manifest)

    @classmethod
    def create(cls, folder: str | Path, manifest: AnswersManifest) -> AnswerFolder:
        """A folder to append to, new or of the same target and settings.

        Raises:
            BeagleError: it holds answers that were made otherwise.
        """
        path = Path(folder) / "manifest.json"
        found = read_json(path, "choose another folder")
        if found is None:
            with writing_to(folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, asdict(manifest))
        elif name := first_change(found, asdict(manifest)):
            raise BeagleError(f"'{folder}' holds answers of another {name}; choose another folder")
        return cls(folder, manifest)

    def refuse_other_target(self, target: Target) -> None:
        """Refuse a target whose answers these are not."""
        own = asdict(AnswersManifest.of(target, self.manifest.sampling))
        stored = asdict(self.manifest)
        if name := first_change(stored, {key: value for key, value in own.items() if key != "target"}):
            raise BeagleError(
                f"'{self.folder}' holds answers of {self.manifest.target} made with {name} {stored[name]!r}, and "
                f"{target.name} has {own[name]!r}; give that target, or let this one answer the prompts itself"
            )

    def files(self) -> list[Path]:
        """Files of answers, the oldest first."""
        return sorted(self.folder.glob(FILES))

    def read(self) -> list[StoredAnswer]:
        """All answers, in the order in which they were appended.

        Raises:
            BeagleError: a file is damaged.
        """
        return [answer for path in self.files() for answer in self._read(path)]

    def append(self, answers: Iterable[StoredAnswer]) -> int:
        """Add those that are not there yet. Full files stay as they are, and the last one is filled up.

        Returns:
            How many were new.
        Raises:
            BeagleError: they can't be written; what was there is still there.
        """
        known = {(answer.prompt, answer.turn) for answer in self.read()}
        new: list[StoredAnswer] = []
        for answer in answers:
            if (answer.prompt, answer.turn) not in known:
                known.add((answer.prompt, answer.turn))
                new.append(answer)
        if not new:
            return 0
        files = self.files()
        number = len(files)
        waiting: list[StoredAnswer] = []
        if files:
            last = self._read(files[-1])
            if sum(len(answer.tokens) for answer in last) < FILE_TOKENS:
                number, waiting = number - 1, last
        tokens = sum(len(answer.tokens) for answer in waiting)
        for answer in new:
            if waiting and tokens + len(answer.tokens) > FILE_TOKENS:
                self._write(number, waiting)
                number, waiting, tokens = number + 1, [], 0
            waiting.append(answer)
            tokens += len(answer.tokens)
        self._write(number, waiting)
        return len(new)

    def _write(self, number: int, answers: list[StoredAnswer]) -> None:
        dtype = torch.uint16 if self.manifest.vocab_size <= 65_536 else torch.int32
        tensors = {
            "tokens": torch.cat([answer.tokens for answer in answers]).to(dtype),
            "lengths": torch.tensor([len(answer.tokens) for answer in answers], dtype=torch.int32),
        }
        columns = {name: [getattr(answer, name) for answer in answers] for name in COLUMNS}
        text = json.dumps(columns, separators=(",", ":"))
        path = self.folder / f"answers-{number:05d}.safetensors"
        with writing_to(path, "free space, then run the same command again"), replacing(path) as partial:
            save_file(tensors, partial, metadata={"answers": text})

    def _read(self, path: Path) -> list[StoredAnswer]:
        try:
            with safe_open(path, framework="pt") as file:
                columns = json.loads(file.metadata()["answers"])
                tokens, lengths = file.get_tensor("tokens").long(), file.get_tensor("lengths").tolist()
            rows = zip(*(columns[name] for name in COLUMNS), tokens.split(lengths), strict=True)
            answers = [StoredAnswer(*row) for row in rows]
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
            raise BeagleError(f"'{path}' is damaged ({error}); copy or download it again") from error
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.manifest.vocab_size:
            raise BeagleError(
                f"'{path}' is damaged: it holds token {int(tokens.max())} of a vocabulary of "
                f"{self.manifest.vocab_size}; copy or download it again"
            )
        return answers
