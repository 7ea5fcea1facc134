"""What the experiments run on: prompts that the target answers, and questions that the heads decode."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from beagle.evaluation.suites import load_suite, unique
from beagle.research.compare.train_variant import quiet
from beagle.targets.loading import load_target
from beagle.training.make_answers import make_answers
from beagle.training.prompts import Prompt, read_prompts
from beagle.training.recipe import AnswerConfig

PAPERS_SETS = ("mt_bench", "gsm8k_200", "cnn_dm")
HELD_OUT = 3  # every third of the packaged questions is decoded, the others are trained on
COPIES = 60  # sampled answers to each of them


@dataclass(frozen=True)
class Material:
    """
    Attributes:
        prompts: to train on; empty where answers are given.
        sets: questions by name.
        note: what a reader must know.
        sampled: whether all answers are sampled, as prompts repeat.
    """

    prompts: list[Prompt]
    sets: dict[str, list[Prompt]]
    note: str = ""
    sampled: bool = False


def find_material(prompts: Path | None, with_answers: bool, count: int | None, questions: int | None) -> Material:
    """Prompts of a file, of ``$BEAGLE_DATA/train``, or the package's own; questions of the paper's sets, or its own.

    Args:
        with_answers: answers are there already, and no prompts needed.
        count: of prompts, drawn with a fixed seed.
        questions: of each set.
    Raises:
        BeagleError: a file is missing or can't be read.
    """
    root = os.environ.get("BEAGLE_DATA")
    own = load_suite("quick")["quick"]
    if root:
        paper = load_suite("paper", questions)
        sets = {name: paper[name] for name in PAPERS_SETS}
    else:
        sets = {"quick": [prompt for i, prompt in enumerate(own) if i % HELD_OUT == 0][:questions]}
    sets = {name: unique(few) for name, few in sets.items()}
    notes = [] if root else ["decoded: questions that ship with the package, as BEAGLE_DATA is not set"]
    if with_answers:
        return Material([], sets, "; ".join(notes))
    found = Path(root) / "train" / "prompts.jsonl.gz" if root else None
    path = prompts or (found if found and found.is_file() else None)
    if path is not None:
        read = unique(read_prompts(path, skip_bad_lines=None))
        random.Random(0).shuffle(read)
        return Material(read[:count], sets, "; ".join(notes))
    few = [prompt for i, prompt in enumerate(own) if i % HELD_OUT]
    copied = [replace(prompt, id=f"{prompt.id} ({n})") for n in range(COPIES) for prompt in few]
    notes.append(
        f"trained on {COPIES} sampled answers to each of {len(few)} questions of the package, so step-α is that of "
        "familiar questions; give prompts of your own"
    )
    return Material(copied[:count], sets, "; ".join(notes), sampled=True)


def answer(target: dict[str, Any], prompts: list[Prompt], folder: Path, config: AnswerConfig) -> int:
    """The target's answers and true states in ``folder``; how many tokens. Goes on where it was stopped.

    Raises:
        BeagleError: no prompt could be answered.
    """
    quiet()
    return make_answers(load_target(**target), prompts, folder, config, Console(stderr=True), None).tokens()
