"""The trained heads at work: the same engine, the same trees, the same questions, interleaved."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beagle.drafters import captured
from beagle.drafters.base import TreePlan
from beagle.drafters.checkpoint import kv_layers, load_head, weight_files
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import BeagleError
from beagle.evaluation.figures import by, summary
from beagle.evaluation.modes import Options, System
from beagle.evaluation.records import Record
from beagle.evaluation.run import run as side_by_side
from beagle.evaluation.suites import first_turns, unique
from beagle.files import first_change, read_json, write_json
from beagle.model import Model
from beagle.research.compare.train_variant import quiet
from beagle.targets.loading import load_target
from beagle.training.prompts import Prompt

PLAIN = "plain"


@dataclass(frozen=True)
class Work:
    """What to decode, and how.

    Attributes:
        heads: folder of each draft checkpoint by run, ``variant/seed0``.
        target: arguments of ``load_target``.
        sets: prompts by name of their file.
        plans: trees by name.
    """

    heads: dict[str, Path]
    target: dict[str, Any]
    sets: dict[str, list[Prompt]]
    plans: dict[str, TreePlan]
    max_new_tokens: int = 128

    def identity(self) -> dict[str, Any]:
        """What a stored result must have in common with this work to stand for it."""
        return {
            "heads": {name: weight_files(folder)[0].stat().st_mtime for name, folder in self.heads.items()},
            "sets": {name: [p.turns[0] for p in prompts] for name, prompts in self.sets.items()},
            "plans": {name: asdict(plan) for name, plan in self.plans.items()},
            "target": self.target,
            "max_new_tokens": self.max_new_tokens,
        }


def decode(work: Work) -> dict[str, Any]:
    """Figures (see ``figures.summary``) by tree, then by run: over all sets, and ``sets`` by name.

    Modes take turns question by question, so that a change of the machine's pace meets all of them.
    First turns only: later ones would ask each head about its own answers.
    """
    quiet()
    layers = sorted({layer for folder in work.heads.values() for layer in kv_layers(folder)})
    target = load_target(**work.target, state_layers=layers)
    drafters = {}
    for name, folder in work.heads.items():
        head = load_head(folder, target)
        drafters[name] = HeadDrafter(target, head)
        captured.capture_drafts(drafters[name])
    places = {f"{tree} {name}": (tree, name) for tree in work.plans for name in drafters}
    systems = [System(mode, Model(target, drafters[name], work.plans[tree])) for mode, (tree, name) in places.items()]
    places[PLAIN] = PLAIN, PLAIN
    systems.append(System(PLAIN, Model(target)))
    sets = first_turns({name: unique(prompts) for name, prompts in work.sets.items()})
    records: list[Record] = []
    for name, prompts in sets.items():
        for part in side_by_side(systems, {name: prompts}, Options(work.max_new_tokens)):
            records += part
        print(f"decoded {name}: {len(prompts)} questions", flush=True)
    out: dict[str, Any] = {}
    whole = _summary(records)
    parts = {name: _summary(part) for name, part in by(records, "set").items()}
    base = whole[PLAIN]["tokens_per_second"]
    for mode, (tree, name) in places.items():
        figures = whole[mode] | {"sets": {set_name: part[mode] for set_name, part in parts.items()}}
        figures["speedup"] = round(figures["tokens_per_second"] / base, 4) if base else 1.0
        out.setdefault(tree, {})[name] = figures
    return out


def _summary(records: list[Record]) -> dict[str, Any]:
    """Figures by mode; no memory, as all heads share this process."""
    return {
        mode: {name: value for name, value in found.items() if name != "peak_memory_mb"}
        for mode, found in summary(records)["modes"].items()
    }


def decode_once(work: Work, path: Path, run: Any) -> dict[str, Any]:
    """``run(decode, work)``, unless ``path`` holds the result of the same work already."""
    identity = work.identity()
    with suppress(BeagleError, KeyError):  # damaged: decoded again, which is cheap beside the training
        stored = read_json(path, "delete it")
        if stored is not None and first_change(stored["work"], identity) is None:
            return dict(stored["figures"])
    figures = run(decode, work)
    write_json(path, {"work": identity, "figures": figures})
    return dict(figures)
