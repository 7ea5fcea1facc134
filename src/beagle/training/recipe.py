"""The recipe of a run: what the target is asked, how the head is trained, and what the head is, from a YAML file."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from beagle.drafters.checkpoint import HEADS
from beagle.errors import BeagleError, first_line
from beagle.training.config import Positive, TrainConfig


@dataclass(frozen=True)
class AnswerConfig:
    """How the target's answers are made, or which answers are trained on instead.

    Attributes:
        source: ``target``: the target answers the prompts, or has answered them (see ``make_answers``); ``given``: the
            dialogues bring the answers, and nothing is generated; ``both``: a share of the dialogues keeps its answers.
        given_share: share of the dialogues that keep the answers that they bring, with source ``both``; the target
            answers the others.
        states: ``disk`` stores hidden states (2 bytes x hidden size a token); ``live`` stores tokens
            only and runs the target again in every epoch.
        max_tokens: stop after this many tokens, prompts included (None: all prompts).
        state_layers: numbers of layers, from 1 on, whose outputs are stored even if the head doesn't read them, for
            other heads that are trained on the same states.
    """

    rows: Positive = 96
    max_prompt_tokens: Positive = 288
    max_new_tokens: Annotated[int, Field(ge=2)] = 160
    max_turns: Positive = 2
    sampled_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    temperature: Annotated[float, Field(gt=0)] = 0.7
    max_tokens: Positive | None = None
    states: Literal["disk", "live"] = "disk"
    seed: int = 0
    source: Literal["target", "given", "both"] = "target"
    given_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    state_layers: tuple[Positive, ...] = ()

    def drawn(self, key: str, turn: int) -> tuple[float, int]:
        """Temperature and seed of an answer: they follow from the prompt's key, the number of the turn and the seed alone."""
        of_prompt = f"{self.seed}/{key}"
        sampled = random.Random(of_prompt).random() < self.sampled_share
        return self.temperature if sampled else 0.0, random.Random(f"{of_prompt}/{turn}").getrandbits(62)


@dataclass(frozen=True)
class Recipe:
    """A whole run: ``answers``, ``train`` and ``head`` sections of a YAML file.

    ``head`` holds ``architecture`` (default: beagle) and settings of that head's config.
    """

    answers: AnswerConfig = field(default_factory=AnswerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    head: dict[str, Any] = field(default_factory=dict)

    def state_layers(self, count: int) -> tuple[int, ...]:
        """The layers to load the target with: those that the head reads, and those that are to be stored."""
        return tuple(sorted({*head_layers(self.head, count), *self.answers.state_layers}))


def head_layers(options: dict[str, Any], count: int) -> tuple[int, ...]:
    """The layers that a head reads beside the top state."""
    return HEADS[options.get("architecture", "beagle")].config_class.layers_of(options, count)


def read_recipe(path: Path) -> Recipe:
    """A recipe's file; refuses a key or value that can't be, which it names."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BeagleError(f"recipe '{path}' can't be read: {first_line(error)}; see configs/") from error
    if not isinstance(content, dict) or set(content) - {"answers", "train", "head"}:
        raise BeagleError(f"recipe '{path}' is no mapping of answers, train and head; see configs/")
    train = checked(TrainConfig, content.get("train") or {}, path, "train")
    head = checked_head(content.get("head") or {}, path)
    return Recipe(checked(AnswerConfig, content.get("answers") or {}, path, "answers"), train, head)


def checked_head(settings: Any, path: Path) -> dict[str, Any]:
    """The head section, against the config of its architecture; what the target fixes can't be set."""
    name = settings.get("architecture", "beagle") if isinstance(settings, dict) else "beagle"
    if not isinstance(name, str) or name not in HEADS:
        raise BeagleError(f"recipe '{path}': head.architecture is one of {', '.join(HEADS)}, not {name!r}")
    config = HEADS[name].config_class
    hints = get_type_hints(config)
    kinds = {f.name: hints[f.name] for f in fields(config)} | {"kv_layers": tuple[Positive, ...] | Literal["auto"]}
    choices = sorted(set(kinds) - {"hidden_size", "target_vocab_size", "draft_vocab_size"})
    if not isinstance(settings, dict) or set(settings) - {"architecture", *choices}:
        raise BeagleError(
            f"recipe '{path}': head takes architecture and, for {name}, {', '.join(choices)} "
            "(the vocabulary is train's draft_vocab_size)"
        )
    return {k: v if k == "architecture" else checked(kinds[k], v, path, f"head.{k}") for k, v in settings.items()}


def checked(kind: Any, values: Any, path: Path, section: str) -> Any:
    if is_dataclass(kind) and isinstance(values, dict) and (unknown := set(values) - {f.name for f in fields(kind)}):
        known = ", ".join(f.name for f in fields(kind))
        raise BeagleError(f"recipe '{path}': unknown key {sorted(unknown)} in {section}; known are {known}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([section, *map(str, first["loc"])])
        raise BeagleError(
            f"recipe '{path}': {where}: {first['msg']}, not {first['input']!r}; correct the value"
        ) from error
