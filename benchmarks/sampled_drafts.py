"""What drafts gain under sampling by knowing the sampler's noise: tokens per pass, by temperature, chains and trees.

python benchmarks/sampled_drafts.py --questions $BEAGLE_DATA/eval/mt_bench.jsonl --limit 16 --json results/sampled_drafts.json

``likeliest`` drafts the draft head's likeliest tokens, ``shared noise`` the winners of its logits and the target's noise,
both verified by the same sampler with the same seeds. Of a chain's first candidate, ``rejection`` is what rejection sampling
of a drawn candidate would accept there, the sum over min(p, q). Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.decoding.sequence import Step
from beagle.decoding.stats import Stats
from beagle.drafters.base import Draft, TreePlan
from beagle.drafters.block import Block
from beagle.drafters.checkpoint import find_head, kv_layers, load_head
from beagle.drafters.context import HeadContext
from beagle.drafters.grow import Beams, EagerLevels, LevelOutput
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import run_script
from beagle.files import write_json
from beagle.meta import command_line, describe
from beagle.model import Model
from beagle.targets.loading import load_target
from beagle.targets.target import Target
from beagle.training.prompts import read_prompts


class RootLogits(EagerLevels):
    """Keeps the logits of the root's level.

    Attributes:
        kept: ``[draft vocabulary]`` of the last draft; None: nothing was drafted.
    """

    kept: Tensor | None = None

    def __call__(self, beams: Beams, tokens: Tensor, newest: Tensor) -> LevelOutput:
        states, logits, sums = super().__call__(beams, tokens, newest)
        if beams.level == 1:
            self.kept = logits[0].clone()
        return states, logits, sums


class Observed(HeadDrafter):
    """A head's drafts, with the noise or without it.

    Attributes:
        knows_noise: whether drafts use it.
        root: logits of the root's level.
    """

    def __init__(self, target: Target, head: Block) -> None:
        super().__init__(target, head)
        self.knows_noise = True
        self.eager = self.root = RootLogits(head, target.embed, self.eager.logits)

    def draft(
        self, contexts: Sequence[HeadContext], roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0
    ) -> list[Draft]:
        self.root.kept = None
        if not self.knows_noise:
            for context in contexts:
                context.noise = None
        return super().draft(contexts, roots, plan, min_expected_tokens)


def answer(model: Model, prompt: str, sampling: SamplingParams) -> tuple[Stats, list[float]]:
    """What the passes accepted, and the sum over min(p, q) at the root of each."""
    drafter, stats, overlaps = model.drafter, Stats(), []
    assert isinstance(drafter, Observed)
    sampler = Sampler(sampling)

    def watch(step: Step) -> None:
        if drafter.root.kept is not None and len(step.tokens) > 1:
            p = sampler.probabilities(step.logits[0].float())[drafter.head.draft_vocab]
            overlaps.append(float(torch.minimum(p, sampler.probabilities(drafter.root.kept)).sum()))

    for _ in model.stream(prompt, sampling, stats=stats, watch=watch):
        pass
    return stats, overlaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, action="append", required=True)
    parser.add_argument("--limit", type=int, default=16, help="questions of each file")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="head")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--temperature", type=float, action="append", help="by default 0.7 and 1.0")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("-n", "--max-new-tokens", type=int, default=96)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    folder = find_head(given.draft, given.target)
    target = load_target(given.target, dtype=given.dtype, state_layers=kv_layers(folder))
    drafter = Observed(target, load_head(folder, target))
    prompts = [p.turns[0] for path in given.questions for p in read_prompts(path, limit=given.limit)]
    plans = {"chain": TreePlan("chain", given.depth), "tree": TreePlan("dynamic", given.depth, nodes=given.nodes)}
    rows = []
    for temperature in given.temperature or (0.7, 1.0):
        for shape, plan in plans.items():
            for rule in ("likeliest", "shared noise"):
                drafter.knows_noise = rule == "shared noise"
                pooled, overlaps = Stats(), []
                for seed, prompt in enumerate(prompts):
                    sampling = SamplingParams(given.max_new_tokens, temperature, top_p=given.top_p, seed=seed)
                    stats, found = answer(Model(target, drafter, plan), prompt, sampling)
                    pooled.add(stats)
                    overlaps += found
                first = pooled.step_alpha[0] if pooled.step_alpha else 0.0
                row = {"temperature": temperature, "shape": shape, "rule": rule, "tau": round(pooled.tau, 3)}
                rows.append({**row, "first": round(first, 3), "rejection": round(mean(overlaps), 3)})
                print(rows[-1], flush=True)
    table = Table(
        "temperature", "shape", "drafts", "tokens per pass", "first level right", "rejection, first candidate"
    )
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    command = command_line("python benchmarks/sampled_drafts.py")
    write_json(given.json, {"rows": rows, "meta": {**describe(target), "command": command}})


if __name__ == "__main__":
    run_script(main)
