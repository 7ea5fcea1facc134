"""Samples on disk: bounded safetensors shards, written atomically, resumed, never mixed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from beagle.training.answers import Sample

SHARD_TOKENS = 65_536
SHARDS = "shard-*.safetensors"


@dataclass(frozen=True)
class Fingerprint:
    """What stored states depend on; a folder never holds two kinds. ``target`` alone is a name, which may change.

    Attributes:
        source: where the answers come from: ``files``, ``given`` (see ``training.texts``) or a share of them; None: the
            target made them.
    """

    target: str
    weights: str
    hidden_size: int
    vocab_size: int
    layers: int
    template: str
    max_prompt_tokens: int
    max_new_tokens: int
    quantize: str | None = None
    state_layers: tuple[int, ...] = ()
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_layers", tuple(self.state_layers))  # a manifest has a list

    @property
    def state_size(self) -> int:
        return self.hidden_size * (len(self.state_layers) + 1)

    @classmethod
    def of(cls, target: Target, max_prompt_tokens: int, max_new_tokens: int, source: str | None = None) -> Fingerprint:
        return cls(
            target.name,
            target.digest,
            target.hidden_size,
            target.vocab_size,
            target.layer_count,
            template_digest(target),
            max_prompt_tokens,
            max_new_tokens,
            target.quantize,
            target.state_layers,
            source,
        )


def template_digest(target: Target) -> str:
    """16 hexadecimal digits that tell chat templates apart."""
    template = str(getattr(target.tokenizer, "chat_template", None))
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def key_of(sample_id: str) -> str:
    """The prompt's key in a sample's id; the number of the turn stands behind it."""
    return sample_id.partition("/")[0]


class StateStore:
    """A folder of shards: ``tokens [n]``, ``states [n, state_size]`` bf16, ``offsets``, ``answer_from``."""

    def __init__(self, folder: str | Path, fingerprint: Fingerprint, *, with_states: bool = True) -> None:
        """
        Args:
            with_states: False stores tokens alone (states are then computed live, in training).
        Raises:
            BeagleError: the folder holds states of another target, template or length, or of nobody knows which.
        """
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.with_states = with_states
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            found, wanted = self._manifest(self.folder), asdict(fingerprint)
            if found is None:
                write_json(self.folder / "manifest.json", wanted)
            elif key := first_change(found, {key: value for key, value in wanted.items() if key != "target"}):
                raise BeagleError(
                    f"{self.folder} holds states of {found.get('target')} made with {key} {found.get(key)!r}, "
                    f"not {wanted[key]!r}; choose another folder or delete this one"
                )

    @classmethod
    def existing(cls, folder: Path) -> StateStore:
        """What a run has left in ``folder``, whatever target it is of.

        Raises:
            BeagleError: there are no answers.
        """
        refuse_without_answers(folder)
        try:
            fingerprint = Fingerprint(**(cls._manifest(folder) or {}))
        except TypeError as error:
            raise BeagleError(f"{folder}/manifest.json is damaged ({error}); delete {folder}, make it again") from error
        return cls(folder, fingerprint)

    @staticmethod
    def _manifest(folder: Path) -> dict[str, Any] | None:
        found = read_json(folder / "manifest.json", "delete its folder and run the same command again")
        if found is None and any(folder.glob(SHARDS)):
            raise BeagleError(
                f"'{folder}' holds answers, but no manifest.json says of which target; put it back or choose another "
                "folder"
            )
        return found

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob(SHARDS))

    def done_ids(self) -> set[str]:
        done: set[str] = set()
        for shard in self.shards():
            done.update(shard_ids(shard))
        return done

    def answered(self) -> set[str]:
        """Keys of the prompts that need not be answered again."""
        return {key_of(name) for name in self.done_ids()}

    def tokens(self) -> int:
        """Tokens on disk, prompts included."""
        total = 0
        for shard in self.shards():
            with open_shard(shard) as file:
                total += file.get_slice("tokens").get_shape()[0]
        return total

    def refuse_if_full(self, tokens: int) -> None:
        """Refuse before the work begins, not after hours of it.

        Raises:
            BeagleError: ``tokens`` more tokens would not leave 1 GB of the disk free.
        """
        need = tokens * (2 * self.fingerprint.state_size * self.with_states + 8)
        free = shutil.disk_usage(self.folder).free
        if need + 1_000_000_000 > free:
            raise BeagleError(
                f"{self.folder}: up to {need / 1e9:.1f} GB of states may be needed and {free / 1e9:.1f} GB are free; "
                "use fewer prompts (answers.max_tokens) or a folder on another disk"
            )

    def write(self, samples: Iterable[Sample]) -> None:
        """Append samples, a shard at a time; what is on disk when interrupted stays valid."""
        waiting: list[Sample] = []
        try:
            for sample in samples:
                waiting.append(sample)
                if sum(len(s.tokens) for s in waiting) >= SHARD_TOKENS:
                    self._write_shard(waiting)
                    waiting = []
        finally:
            if waiting:
                self._write_shard(waiting)

    def _write_shard(self, samples: list[Sample]) -> None:
        lengths = torch.tensor([len(s.tokens) for s in samples])
        tensors = {
            "tokens": torch.cat([s.tokens for s in samples]).to(torch.int32),
            "offsets": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
            "answer_from": torch.tensor([s.answer_from for s in samples]),
        }
        if self.with_states:
            tensors["states"] = torch.cat([s.states for s in samples if s.states is not None])
        existing = self.shards()
        number = int(existing[-1].stem.split("-")[1]) + 1 if existing else 0
        path = self.folder / f"shard-{number:05d}.safetensors"
        with writing_to(path, "free space, then run the same command again"), replacing(path) as partial:
            save_file(tensors, partial, metadata={"ids": json.dumps([s.id for s in samples])})


def shard_ids(path: Path) -> list[str]:
    """Ids of a shard's samples, in order.

    Raises:
        BeagleError: the file is damaged.
    """
    with open_shard(path) as file:
        return list(json.loads(file.metadata()["ids"]))


def read_shard(path: Path, *, with_states: bool = True) -> dict[str, Tensor]:
    """Tensors of one shard (``states`` only where they are stored).

    Args:
        with_states: False leaves the states on disk; they are nearly all of it.
    Raises:
        BeagleError: the file is damaged, or its states are no numbers.
    """
    with open_shard(path) as file:
        content = {key: file.get_tensor(key) for key in file.keys() if with_states or key != "states"}  # noqa: SIM118
    if "states" in content and not _are_finite(content["states"]):
        raise BeagleError(
            f"{path} holds NaN or infinite hidden states, on which nothing can be trained; delete it and run the same "
            "command again, with the target in float32"
        )
    return content


def _are_finite(states: Tensor) -> bool:
    """Whether all are numbers. Their sum says so in one pass; only where it doesn't, each is looked at."""
    return bool(states.sum(dtype=torch.float32).isfinite()) or bool(states.isfinite().all())


def refuse_without_answers(folder: Path) -> None:
    if not any(folder.glob(SHARDS)):
        raise BeagleError(f"'{folder}' holds no answers; make some with `beagle train --prompts FILE --data {folder}`")


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A shard's safetensors handle.

    Raises:
        BeagleError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise BeagleError(f"{path} is damaged ({error}); delete it and run the same command again") from error
