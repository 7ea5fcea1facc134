"""Fill the tables of README.md and docs/results.md from the files in results/.

A table stands between two comments, the first of which names its kind and its files:

    <!-- figures: results/bench_*.json -->
    <!-- end of figures -->

Kinds: ``figures`` (a row a file), ``sets`` (a row a set of each file), ``suites`` (a section a file, in the
order of their names; none is needed).

    python scripts/readme_figures.py            # rewrites both
    python scripts/readme_figures.py --check    # exit code 1 if one would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from beagle.evaluation.compare.report import results_table
from beagle.evaluation.compare.results import entries
from beagle.evaluation.figures import speed_up_text
from beagle.evaluation.records import read_result
from beagle.evaluation.report.tables import DTYPES, costs, details, heading, machine, over_plain, overview, questions

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results.md")
BLOCK = re.compile(r"(<!-- (figures|sets|suites|claims|trainings): (\S+) -->\n).*?(<!-- end of \2 -->)", re.S)
HEAD = "beagle"  # the mode whose figures the tables by set show
DRAFTED = {"beagle": "", "chain": ", chain", "head": ", head alone"}  # modes with a row of their own, and its name


def figures(results: list[dict[str, Any]]) -> list[list[str]]:
    """A row a file: plain decoding, Beagle, and transformers' own decoding."""
    rows = [
        [
            "mode",
            "plain",
            "Beagle",
            "Beagle / plain",
            "τ",
            "identical",
            "plain / transformers' generate",
            "Beagle / transformers' generate",
        ]
    ]
    names = {result["meta"]["target"]["name"] for result in results}
    for result in results:
        modes = result["modes"]
        name = mode_name(result["meta"])
        if len(names) > 1:
            name = f"{result['meta']['target']['name']}, {name}"
        for mode, words in DRAFTED.items():
            if mode not in modes:
                continue
            stock = [
                speed_up_text(result["ratios"].get(f"{m}/transformers", {}) if mode == HEAD else {})
                for m in ("plain", mode)
            ]
            speeds = [f"{modes[m]['tokens_per_second']:.1f}" if m in modes else "-" for m in ("plain", mode)]
            label = f"{name}{words} ({questions(result)} questions)"
            rows.append([label, *speeds, *received(result, mode), *stock])
    return rows


def sets(results: list[dict[str, Any]]) -> list[list[str]]:
    """A row a set of each file."""
    rows = [["set", "Beagle / plain", "τ", "step-α 1…5", "identical"]]
    for result in results:
        for name, part in result["sets"].items():
            speed_up, tau, same = received(part)
            alphas = " ".join(f"{alpha:.2f}" for alpha in part["modes"].get(HEAD, {}).get("step_alpha", [])[:5])
            label = (
                name
                if len(results) == 1
                else f"{name} ({result['meta']['target']['name']}, {mode_name(result['meta'])})"
            )
            rows.append([label, speed_up, tau, alphas or "-", same])
    return rows


def suites(results: list[dict[str, Any]]) -> str:
    """A section a file: what was run, all modes, the sets beside each other and below each other."""
    parts = []
    for result in results:
        suite, meta = result["meta"]["arguments"].get("suite"), result["meta"]
        interrupted = " **Interrupted: these are the questions finished by then.**" if meta.get("interrupted") else ""
        parts += [
            f"### {suite or 'questions'}: {heading(result)}", f"{machine(result)}.{interrupted}", f"`{meta['command']}`",
            *(table.markdown().strip() for table in (overview(result), details(result), costs(result))),
        ]  # fmt: skip
    return "\n\n".join(parts or ["No results are stored yet."]) + "\n\n"


def claims(results: list[dict[str, Any]]) -> list[list[str]]:
    """What the paper says of training, and what was found."""
    found = [finding for result in results for finding in result["findings"]]
    return [
        ["claim", "the paper", "found", ""],
        *([f["claim"], f["paper"], f["found"], "agrees" if f["agrees"] else "**differs**"] for f in found),
    ]


def trainings(results: list[dict[str, Any]]) -> str:
    """A section a comparison of `beagle compare-training`: every variant's figures."""
    parts = []
    for result in results:
        meta = result["meta"]
        seeds = len(meta["arguments"]["seeds"])
        first = result["runs"][0]
        seconds = first["settings"].get("seconds")  # the budget, if it was one of time
        budget = f"{seconds:.0f} s of training" if seconds else f"{first['tokens']:,} tokens"
        budget += f" each, {seeds} seed{'s' * (seeds > 1)}"
        parts += [
            f"### {meta['arguments']['suite'] or 'variants'}: {meta['target']['name']}, {budget}", f"{machine(result)}.",
            f"`{meta['command']}`", results_table(entries(result["runs"], result["decoding"])),
        ]  # fmt: skip
    return "\n\n".join(parts) + "\n\n"


def received(part: dict[str, Any], mode: str = HEAD) -> list[str]:
    if mode not in part["modes"]:
        return ["-"] * 3
    m = part["modes"][mode]
    return [
        speed_up_text(over_plain(part, mode)),
        f"{m['tau']:.2f}",
        "-" if m["identical"] is None else f"{m['identical']:.0%}",
    ]


def mode_name(meta: dict[str, Any]) -> str:
    dtype, arguments = meta["target"]["dtype"], meta["arguments"]
    words = [DTYPES.get(dtype, dtype)]
    if dtype != "float32":
        words.append("`--exact`" if arguments["exact"] else "fast")
    if meta["target"].get("compiled"):
        words.append("compiled")
    words.append({"auto": "head + lookup", "head": "head alone"}.get(arguments["draft"], arguments["draft"]))
    if arguments["tree"] != "dynamic":
        words.append(arguments["tree"])
    if arguments["temperature"]:
        words.append(f"temperature {arguments['temperature']:g}")
    return ", ".join(words)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def table(block: re.Match[str]) -> str:
        opening, kind, pattern, closing = block.groups()
        paths = sorted(ROOT.glob(pattern))
        results = [read_result(path) if kind in ("figures", "sets", "suites") else read(path) for path in paths]
        if kind == "suites":
            return f"{opening}\n{suites(results)}{closing}"
        if not paths:
            raise SystemExit(f"'{pattern}' names no file; correct the comment or add the results")
        if kind == "trainings":
            return f"{opening}\n{trainings(results)}{closing}"
        header, *rows = {"figures": figures, "sets": sets, "claims": claims}[kind](results)
        lines = [header, ["---"] * len(header), *rows]
        return opening + "".join(f"| {' | '.join(line)} |\n" for line in lines) + closing

    return BLOCK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for page in (ROOT / name for name in PAGES):
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if arguments.check and after != before:
            sys.exit(f"{page.name} and results/ are out of step; run python scripts/readme_figures.py")
        if not arguments.check:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
