"""The trained heads at work: the same engine, the same trees, the same questions, interleaved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beagle.drafters.base import TreePlan
from beagle.drafters.checkpoint import load_head
from beagle.evaluation import bench
from beagle.evaluation.compare.one import quiet
from beagle.model import DRAFTERS, Model
from beagle.targets.loading import load_target
from beagle.training.prompts import Prompt
from beagle.training.states import write_json

PLAIN = "plain"


@dataclass(frozen=True)
class Work:
    """What to decode, and how.

    Attributes:
        heads: folder of each draft checkpoint by run, ``variant/seed0``. target: arguments of ``load_target``.
        sets: prompts by name of their file. plans: trees by name.
    """

    heads: dict[str, Path]
    target: dict[str, Any]
    sets: dict[str, list[Prompt]]
    plans: dict[str, TreePlan]
    max_new_tokens: int = 128

    def identity(self) -> dict[str, Any]:
        """What a stored result must have in common with this work to stand for it."""
        about = {
            "heads": {name: (folder / "model.safetensors").stat().st_mtime for name, folder in self.heads.items()},
            "sets": {name: [p.turns[0] for p in prompts] for name, prompts in self.sets.items()},
            "plans": {name: asdict(plan) for name, plan in self.plans.items()},
            "target": self.target,
            "max_new_tokens": self.max_new_tokens,
        }
        return dict(json.loads(json.dumps(about)))


def decode(work: Work) -> dict[str, Any]:
    """Figures (see ``bench.summary``) by tree, then by run: over all sets, and ``sets`` by name.

    Modes take turns question by question, so that a change of the machine's pace meets all of them.
    """
    quiet()
    target = load_target(**work.target)
    drafters = {}
    for name, folder in work.heads.items():
        head = load_head(folder, target)
        drafters[name] = DRAFTERS[head.architecture](target, head)
    plain = Model(target)
    modes = {
        (tree, name): Model(target, drafter, plan)
        for tree, plan in work.plans.items()
        for name, drafter in drafters.items()
    }
    modes[PLAIN, PLAIN] = plain
    runs: dict[str, dict[tuple[str, str], bench.ModeRun]] = {
        name: {mode: bench.ModeRun() for mode in modes} for name in work.sets
    }
    order = list(modes)
    for mode in order:  # kernels and caches are warm before anything counts
        bench.answer(
            modes[mode], PLAIN if mode[0] == PLAIN else "beagle", Prompt("", ("Say hello.",)), bench.Options(4)
        )
    for name, prompts in work.sets.items():
        for i, prompt in enumerate(prompts):
            for j in range(len(order)):
                mode = order[(i + j) % len(order)]
                kind = PLAIN if mode[0] == PLAIN else "beagle"
                ids, stats = bench.answer(modes[mode], kind, prompt, bench.Options(work.max_new_tokens))
                runs[name][mode].answers.append(ids)
                runs[name][mode].stats.append(stats)
        print(f"decoded {name}: {len(prompts)} questions", flush=True)
    out: dict[str, Any] = {}
    for tree, name in order:
        mine = {f: {PLAIN: by_mode[PLAIN, PLAIN], name: by_mode[tree, name]} for f, by_mode in runs.items()}
        figures = bench.summary(bench.merge(mine))["modes"][name]
        figures["sets"] = {f: bench.summary(pair)["modes"][name] for f, pair in mine.items()}
        del figures["peak_memory_mb"]  # all heads share this process
        base = bench.merge(mine)[PLAIN].pooled().tokens_per_second
        figures["speedup"] = round(figures["tokens_per_second"] / base, 4) if base else 1.0
        out.setdefault(tree, {})[name] = figures
    return out


def decode_once(work: Work, path: Path, run: Any) -> dict[str, Any]:
    """``run(decode, work)``, unless ``path`` holds the result of the same work already."""
    identity = work.identity()
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["work"] == identity:
                return dict(stored["figures"])
        except (ValueError, KeyError, TypeError):
            pass  # decoded again: cheap beside the training
    figures = run(decode, work)
    write_json(path, {"work": identity, "figures": figures})
    return dict(figures)
