"""The target as it is, in int8 and in int4, plain and with drafts, side by side on the same questions.

python benchmarks/quantized.py --questions $BEAGLE_DATA/eval/mt_bench.jsonl --limit 20 --json results/quantized.json

Modes ``plain`` and ``beagle`` are the target as it is; ``plain int8`` and so on are quantised. Ratios are over
``plain``; ``lossless`` is the share of a kind's drafted answers that are its own plain ones, token for token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import beagle
from beagle.cli.tables import follow, show
from beagle.errors import run_script
from beagle.evaluation.figures import figures
from beagle.evaluation.modes import Options, System
from beagle.evaluation.records import Record
from beagle.evaluation.run import run
from beagle.evaluation.suites import first_turns, load_questions
from beagle.files import write_json
from beagle.meta import command_line, describe
from beagle.model import Model
from beagle.targets.linears.quantized import KINDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", action="append", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    systems = []
    for kind in (None, *KINDS):
        model = beagle.load(arguments.target, draft=arguments.draft, dtype=arguments.dtype, quantize=kind)
        for mode, one in (("plain", Model(model.target)), ("beagle", model)):
            systems.append(System(mode if kind is None else f"{mode} {kind}", one))
    sets = first_turns(load_questions(arguments.questions, arguments.limit))
    records: list[Record] = []
    for part in follow(
        run(systems, sets, Options(arguments.tokens, exact=arguments.exact)), sum(map(len, sets.values()))
    ):
        records += part
    result = figures(records)
    answers = {(r.mode, r.set, r.id): r.answers for r in records}
    for kind in KINDS:
        ours = [(r.answers, answers[f"plain {kind}", r.set, r.id]) for r in records if r.mode == f"beagle {kind}"]
        share = sum(drafted == plain for drafted, plain in ours) / len(ours)
        result["modes"][f"beagle {kind}"]["lossless"] = round(share, 4)
        print(f"{kind}: {share:.0%} of the drafted answers are its plain ones")
    command = command_line("python benchmarks/quantized.py")
    write_json(arguments.json, {**result, "meta": {**describe(systems[0].model.target), "command": command}})
    show(result)


if __name__ == "__main__":
    run_script(main)
