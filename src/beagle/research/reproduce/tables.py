"""The paper's tables: Beagle, EAGLE-v2 and what needs no training, side by side on the question sets."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from beagle.drafters.base import TreePlan
from beagle.drafters.checkpoint import weight_files
from beagle.errors import BeagleError
from beagle.evaluation.figures import ratio, resolved, speed_up_text
from beagle.evaluation.modes import Drafts, Options, load_systems
from beagle.evaluation.records import Record, read_records, read_result
from beagle.evaluation.report.table import Table
from beagle.evaluation.report.tables import over_plain
from beagle.evaluation.session import Session
from beagle.files import first_change
from beagle.meta import describe
from beagle.research.compare.suites import Finding
from beagle.research.compare.train_variant import quiet
from beagle.targets.loading import load_target
from beagle.training.prompts import Prompt

MODES = ["plain", "beagle", "eagle", "lookup", "transformers", "prompt-lookup"]
# speed-up and τ on MT-Bench, GSM8K, CNN-DailyMail, and peak memory in GiB on MT-Bench (paper, Tables 1 and 2)
PAPER = {
    ("Vicuna 7B", "none"): ("1 / 1 / 1", "1 / 1 / 1", "13.7"),
    ("Vicuna 7B", "EAGLE-v2"): ("2.9 / 3.4 / 2.6", "4.0 / 4.6 / 3.6", "14.5"),
    ("Vicuna 7B", "Beagle"): ("3.0 / 3.1 / 2.4", "4.1 / 4.3 / 3.4", "13.5"),
    ("Llama-2 7B", "EAGLE-v2"): ("3.0 / 3.2 / 2.6", "4.0 / 4.4 / 3.7", "15.5"),
    ("Llama-2 7B", "Beagle"): ("3.0 / 3.2 / 2.5", "4.1 / 4.5 / 3.6", "13.5"),
    ("Llama-3 8B", "EAGLE-v2"): ("2.5 / 2.6 / 2.1", "3.6 / 3.9 / 3.4", "17.8"),
    ("Llama-3 8B", "Beagle"): ("2.5 / 2.6 / 2.0", "3.5 / 4.0 / 3.2", "15.7"),
}


@dataclass(frozen=True)
class Job:
    """What the process that measures needs.

    Attributes:
        target: arguments of ``load_target``.
        beagle: folder of Beagle's draft checkpoint.
        eagle: folder of EAGLE's.
        sets: the questions by set.
        tree: of every drafting mode.
        max_new_tokens: of each answer.
        out: the file of figures and answers.
        command: that repeats all of it.
        scale: its name.
    """

    target: dict[str, Any]
    beagle: Path
    eagle: Path
    sets: dict[str, list[Prompt]]
    tree: TreePlan
    max_new_tokens: int
    out: Path
    command: str
    scale: str

    def arguments(self) -> dict[str, Any]:
        return {
            "suite": f"reproduce, {self.scale}", "max_new_tokens": self.max_new_tokens, "modes": MODES,
            "temperature": 0.0, "exact": False, "seed": 0, "draft": "head", "tree": self.tree.kind,
            "depth": self.tree.depth, "top_k": self.tree.top_k, "nodes": self.tree.nodes,
            "heads": [weight_files(folder)[0].stat().st_mtime for folder in (self.beagle, self.eagle)],
        }  # fmt: skip


def measure(job: Job) -> dict[str, Any]:
    """All modes on all questions, written to ``job.out`` as they come; goes on with what is there."""
    quiet()
    engine = {name: value for name, value in job.target.items() if name != "name"}
    target = load_target(**job.target)
    arguments = job.arguments()
    records = _earlier(job.out, arguments)
    systems = load_systems(target, MODES, Drafts(str(job.beagle), str(job.eagle)), job.tree, **engine)
    sets = job.sets
    if not getattr(target.tokenizer, "chat_template", None):  # later turns can't be told what was answered
        sets = {name: [replace(p, turns=p.turns[:1], system="") for p in prompts] for name, prompts in sets.items()}
    meta = {**describe(target), "command": job.command, "arguments": arguments}
    session = Session(systems, sets, Options(job.max_new_tokens), meta, job.out, records)
    for _ in session.run():
        print(f"answered {len(session.done)} of {session.total} questions in all modes", flush=True)
    return read_result(job.out)


def _earlier(path: Path, arguments: dict[str, Any]) -> list[Record]:
    """Answers of the same run, as far as it came."""
    with suppress(BeagleError):  # none yet, or half a file: made anew
        content = read_result(path)
        if first_change(content["meta"]["arguments"], arguments) is None:
            return read_records(path, content)
    return []


def judge(result: dict[str, Any], records: list[Record]) -> list[Finding]:
    """The tables' claims. What counts as on a par is the paper's own worst set: 0.93 times EAGLE's τ, 0.92 its speed."""
    ours, theirs = result["modes"]["beagle"], result["modes"]["eagle"]
    gain, tau = over_plain(result, "beagle"), ours["tau"] / theirs["tau"]
    pace = ratio(*([r for r in records if r.mode == mode] for mode in ("beagle", "eagle")))
    extra = [m["memory_above_target_mb"] for m in (ours, theirs)]
    same = [result["modes"][mode]["identical"] + result["modes"][mode]["near_ties"] for mode in ("beagle", "eagle")]
    by_set = " / ".join(f"{part['modes']['beagle']['tau']:.2f}" for part in result["sets"].values())
    return [
        Finding("Beagle is faster than the target alone", "2.0 to 3.2 times (Tables 1 and 2)", speed_up_text(gain),
                resolved(gain) and gain["pooled"] > 1),
        Finding("Beagle accepts as much as EAGLE-v2", "τ 3.2 to 4.5, 0.93 to 1.03 times EAGLE-v2's",
                f"τ {ours['tau']:.2f} ({by_set}) to {theirs['tau']:.2f}: {tau:.2f} times", tau >= 0.93),
        Finding("Beagle is as fast as EAGLE-v2", "0.92 to 1.01 times its speed",
                f"{pace['pooled']:.2f} times ({pace['low']:.2f} to {pace['high']:.2f})" if pace else "-",
                bool(pace) and pace["pooled"] >= 0.92),
        Finding("Beagle needs less memory than EAGLE-v2", "1.0 to 2.1 GiB less at its peak",
                f"{extra[0]:.0f} to {extra[1]:.0f} MB above the target", extra[0] < extra[1]),
        Finding("the answers are the target's own", "lossless", f"identical or near a tie: {same[0]:.0%} and {same[1]:.0%}",
                min(same) > 0.999),
    ]  # fmt: skip


def papers_table() -> Table:
    rows = [[target, draft, *values] for (target, draft), values in PAPER.items()]
    header = ["target", "draft", "speed-up", "τ", "peak memory on MT-Bench, GiB"]
    return Table("The paper's: MT-Bench / GSM8K / CNN-DailyMail", header, rows, "One A6000 Ada, bf16, greedy, batch 1.")
