"""All that was asked for, one item after the other; what is finished is kept, what is trained is shared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from beagle.errors import BeagleError
from beagle.evaluation.records import read_records
from beagle.evaluation.report.plots import plots
from beagle.evaluation.report.style import has_matplotlib
from beagle.evaluation.report.tables import details
from beagle.files import first_change, read_json, write_json
from beagle.meta import describe
from beagle.research.compare import run_variants
from beagle.research.compare.decoding import Work, decode_once
from beagle.research.compare.report import write_csv
from beagle.research.compare.suites import Finding
from beagle.research.compare.train_variant import Spec
from beagle.research.compare.write import write_comparison
from beagle.research.reproduce import tables
from beagle.research.reproduce.data import Material, answer
from beagle.research.reproduce.experiments import Item
from beagle.research.reproduce.scales import Scale
from beagle.training.prompts import Prompt
from beagle.training.recipe import Recipe
from beagle.training.states import StateStore

SEED = 0


@dataclass(frozen=True)
class Session:
    """One scale and one target in one folder.

    Attributes:
        target: arguments of ``load_target`` for training; ``decode_dtype`` replaces its dtype in decoding.
        data: a folder of answers that are there already; None: they are made.
        command: that repeats all of it.
        say: takes a line on what is going on.
    """

    out: Path
    scale_name: str
    scale: Scale
    target: dict[str, Any]
    decode_dtype: str
    material: Material
    data: Path | None
    command: str
    say: Callable[[str], None]

    def open(self) -> None:
        """
        Raises:
            BeagleError: the folder belongs to another scale, target or questions.
        """
        about = {
            "scale": self.scale_name, "budgets": self.scale.budgets(), "target": self.target["name"],
            "dtype": self.target["dtype"], "decode_dtype": self.decode_dtype,
            "answers": "given" if self.data else [len(self.material.prompts), self.material.prompts[0].turns[0]],
            "sets": {name: len(prompts) for name, prompts in self.material.sets.items()},
        }  # fmt: skip
        path = self.out / "reproduce.json"
        found = read_json(path, f"delete '{self.out}' and run again")
        if found is None:
            write_json(path, about)
        elif name := first_change(found, about):
            raise BeagleError(
                f"'{self.out}' was begun with other {name}; repeat its command, choose another folder, or delete it"
            )

    def answers(self) -> StateStore:
        """The store of answers, made if none was given."""
        if self.data:
            return StateStore.existing(self.data)
        folder, through = self.out / "data", self.out / "answers.json"
        if not through.is_file():
            config = self.scale.recipe.answers
            if self.material.sampled:  # prompts repeat: greedy answers to them would, too
                config = replace(config, sampled_share=1.0, temperature=1.0)
            self.say(f"the target answers {len(self.material.prompts)} prompts")
            tokens = run_variants.in_fresh_process(answer, self.target, self.material.prompts, folder, config)
            write_json(through, {"tokens": tokens})
        return StateStore.existing(folder)

    def forget(self, items: Sequence[Item]) -> None:
        """Delete the items' results and the heads trained for them."""
        recipe = self.scale.recipe
        for item in items:
            shutil.rmtree(self.out / item.name, ignore_errors=True)
            for variant in item.heads():
                shutil.rmtree(self.out / "runs" / variant.plain_name(recipe), ignore_errors=True)

    def run(self, item: Item) -> list[Finding]:
        """The item's findings; from its folder if it is through."""
        out = self.out / item.name
        kept = read_findings(out)
        if kept is not None:
            self.say(f"{item.name}: kept")
            return kept
        out.mkdir(parents=True, exist_ok=True)
        self.say(f"{item.name}: {item.title}")
        store = self.answers()
        planned = self.planned(item, store)
        records = run_variants.run_all(planned, self.say)
        heads = {spec.variant: spec.out / "head" for spec in planned}
        found = self._compared(item, out, store, records, heads) if item.suite else self._tables(out, heads)
        write_json(out / "findings.json", [finding.as_dict() for finding in found])
        return found

    def planned(self, item: Item, store: StateStore) -> list[Spec]:
        """A training for each head, whoever else needs the same one."""
        recipe = self.scale.recipe
        train = recipe.train
        rows = min(train.draft_vocab_size or store.fingerprint.vocab_size, store.fingerprint.vocab_size)
        train = replace(train, draft_vocab_size=rows if train.draft_vocab_size else None)
        tokens = self.scale.tokens or int((train.early_epochs + train.late_epochs) * store.tokens())
        if item.suite and item.suite.short:
            tokens, train = min(tokens, self.scale.memory_tokens), replace(train, validation_samples=1)
        return run_variants.specs(
            item.heads(), [SEED], store, Recipe(recipe.answers, train, recipe.head), run_variants.Budget(tokens),
            self.target, self.out,
        )  # fmt: skip

    def _compared(
        self, item: Item, out: Path, store: StateStore, records: list[dict[str, Any]], heads: dict[str, Path]
    ) -> list[Finding]:
        suite = item.suite
        assert suite is not None
        decoding = {}
        if item.decodes:
            tree = self.scale.tree
            plans = {kind: replace(tree, kind=kind) for kind in suite.trees or (tree.kind,)}  # type: ignore[arg-type]
            named = {f"{name}/seed{SEED}": folder for name, folder in heads.items()}
            target = {**self.target, "dtype": self.decode_dtype}
            work = Work(named, target, self.material.sets, plans, self.scale.max_new_tokens)
            decoding = decode_once(work, out / "decoding.json", run_variants.in_fresh_process)
        meta = {
            **describe(), "target": records[0]["meta"]["target"], "command": self.command,
            "arguments": {"item": item.name, "scale": self.scale_name, "variants": list(heads)},
            "data": {"tokens": store.tokens(), "note": self.material.note},
        }  # fmt: skip
        return write_comparison(out, records, decoding, suite, meta).findings

    def _tables(self, out: Path, heads: dict[str, Path]) -> list[Finding]:
        job = tables.Job(
            {**self.target, "dtype": self.decode_dtype}, heads["beagle"], heads["eagle"], self.material.sets,
            self.scale.tree, self.scale.max_new_tokens, out / "eval.json", self.command, self.scale_name,
        )  # fmt: skip
        result = run_variants.in_fresh_process(tables.measure, job)
        by_set = details(result)
        write_csv(out / "table.csv", [dict(zip(by_set.header, row, strict=True)) for row in by_set.rows])
        if has_matplotlib():
            plots(result, out)
        return tables.judge(result, read_records(job.out, result))


def read_findings(folder: Path) -> list[Finding] | None:
    """Of a finished item.

    Raises:
        BeagleError: they are damaged.
    """
    path = folder / "findings.json"
    if not path.is_file():
        return None
    try:
        return [Finding(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise BeagleError(f"{path} is damaged ({error}); delete it and run the same command again") from error


def budget(items: Sequence[Item], scale: Scale, sets: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """What the items take, in words."""
    recipe = scale.recipe
    names = {v.plain_name(recipe) for item in items if not (item.suite and item.suite.short) for v in item.heads()}
    short = {v.plain_name(recipe) for item in items if item.suite and item.suite.short for v in item.heads()}
    each = (
        f"{scale.tokens:,} tokens"
        if scale.tokens
        else f"{recipe.train.early_epochs + recipe.train.late_epochs:g} epochs"
    )
    lines = []
    if names:
        lines.append(f"trains {len(names)} heads on {each} each: {', '.join(sorted(names))}")
    if short:
        lines.append(f"trains {len(short)} heads on {scale.memory_tokens:,} tokens each, for their memory")
    if decoding := [item.name for item in items if item.decodes]:
        asked = ", ".join(f"{len(prompts)} of {name}" for name, prompts in sets.items())
        lines.append(f"decodes {scale.max_new_tokens} tokens a question for {', '.join(decoding)}: {asked}")
    return lines
