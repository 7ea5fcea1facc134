"""Question sets: named suites, question files, data sets of the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from beagle.errors import BeagleError, first_line, required
from beagle.training.prompts import Prompt, parse_prompt, read_prompts

QUICK = Path(__file__).parent / "quick.jsonl"
SUITES = {
    "paper": ("mt_bench.jsonl", "gsm8k_200.jsonl", "cnn_dm.jsonl", "humaneval.jsonl"),
    "spec-bench": ("spec_bench.jsonl",),
    "quick": (),
}
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def load_suite(name: str, limit: int | None = None) -> dict[str, list[Prompt]]:
    """The sets of a suite; Spec-Bench's one file is six sets, its eight chat categories being MT-Bench.

    Raises:
        BeagleError: no such suite, or its files are not there.
    """
    if name not in SUITES:
        raise BeagleError(f"suite '{name}' is unknown; use {', '.join(SUITES)}, or question files of your own")
    if name == "quick":
        return {"quick": limit_by_category(read_prompts(QUICK), limit)}
    folder = data_folder(name)
    sets = {Path(file).stem: read_prompts(folder / file, skip_bad_lines=None) for file in SUITES[name]}
    if name == "spec-bench":
        parts: dict[str, list[Prompt]] = {}
        for prompt in sets["spec_bench"]:
            parts.setdefault("mt_bench" if prompt.category in MT_BENCH else prompt.category, []).append(prompt)
        sets = parts
    return {name: limit_by_category(prompts, limit) for name, prompts in sets.items()}


def data_folder(suite: str) -> Path:
    """Where the files of a suite are.

    Raises:
        BeagleError: one of them is missing there.
    """
    root = os.environ.get("BEAGLE_DATA")
    if not root:
        raise BeagleError(
            f"suite '{suite}' reads {', '.join(SUITES[suite])}; set BEAGLE_DATA to the folder whose eval/ holds them, "
            "or use suite 'quick', which needs no file"
        )
    folder = Path(root) / "eval"
    missing = [file for file in SUITES[suite] if not (folder / file).is_file()]
    if missing:
        raise BeagleError(
            f"suite '{suite}': '{folder}' lacks {', '.join(missing)}; set BEAGLE_DATA to the folder whose eval/ holds "
            "them, or use suite 'quick'"
        )
    return folder


def load_questions(
    names: Sequence[str], limit: int | None = None, skip_bad_lines: bool = False
) -> dict[str, list[Prompt]]:
    """Sets from files, named by them, or from data sets of the hub (``owner/name``).

    Raises:
        BeagleError: one can't be read, or two have the same name.
    """
    sets: dict[str, list[Prompt]] = {}
    for name in names:
        path = Path(name)
        hub = not path.suffix and not path.exists() and 1 <= name.partition(":")[0].count("/") <= 2 and name[0] != "/"
        label = name.partition(":")[0].split("/")[1] if hub else path.name.removesuffix(".gz").rpartition(".")[0]
        if label in sets:
            raise BeagleError(f"two question files are named '{label}'; rename one, names tell the sets apart")
        prompts = hub_prompts(name) if hub else read_prompts(path, skip_bad_lines=skip_bad_lines)
        sets[label] = limit_by_category(unique(prompts), limit)
    return sets


def limit_by_category(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first of each category in turn, so that a few questions are not all of one kind; in the file's order."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    seen: dict[str, int] = {}
    rounds = []
    for at, prompt in enumerate(prompts):
        seen[prompt.category] = seen.get(prompt.category, 0) + 1
        rounds.append((seen[prompt.category], at))
    return [prompts[at] for at in sorted(at for _, at in sorted(rounds)[:limit])]


def first_turns(sets: Mapping[str, Sequence[Prompt]]) -> dict[str, list[Prompt]]:
    """The questions without their later turns, which would ask each mode about its own answers."""
    return {name: [replace(prompt, turns=prompt.turns[:1]) for prompt in prompts] for name, prompts in sets.items()}


def unique(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Ids tell answers apart: a repeated one gets its number."""
    seen: dict[str, int] = {}
    out = []
    for prompt in prompts:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        out.append(prompt if seen[prompt.id] == 1 else replace(prompt, id=f"{prompt.id} ({seen[prompt.id]})"))
    return out


def hub_prompts(name: str) -> list[Prompt]:
    """Prompts of a hub data set, ``owner/name[/config][:split]``, the split being ``test`` unless named.

    Raises:
        BeagleError: the library ``datasets`` or the data set is not to be had, or holds no prompts.
    """
    datasets = required("datasets", "data", f"'{name}' is no file (correct the path), and as a data set of the hub it")
    where, _, split = name.partition(":")
    owner, repository, *config = where.split("/")
    try:
        rows = datasets.load_dataset(f"{owner}/{repository}", *config, split=split or "test")
        prompts = [
            replace(parse_prompt(dict(row), number), source=f"{name}: row {number}")
            for number, row in enumerate(rows, 1)
        ]
    except Exception as error:  # that library has many ways to fail
        raise BeagleError(
            f"data set '{name}' can't be used: {first_line(error)}; "
            "name it owner/name[/config][:split], with a column turns, prompt, question, messages or conversations"
        ) from error
    if not prompts:
        raise BeagleError(f"data set '{name}' is empty; choose another split")
    return prompts
