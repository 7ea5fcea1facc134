"""Fill the tables of README.md and docs/ from the files in results/.

A table stands between two comments. The first names a kind of table and its files:

    <!-- modes: results/bench_bf16_compiled.json -->
    <!-- end of modes -->

The kinds are the keys of ``KINDS``. A ``facts`` table is named by a key of ``figure_facts.FACTS`` instead of by files.

    python tools/readme_figures.py            # rewrites the pages
    python tools/readme_figures.py --check    # exit code 1 if a page would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # also where this file is loaded by its path

from family_table import families
from figure_facts import FACTS, Result

from beagle.evaluation.figures import speed_up_text
from beagle.evaluation.records import read_result
from beagle.evaluation.report.table import Table
from beagle.evaluation.report.tables import (
    DTYPES,
    costs,
    details,
    heading,
    machine,
    over_plain,
    overview,
    parts_table,
    questions,
)
from beagle.research.compare.report import claims as claims_table
from beagle.research.compare.report import results_table
from beagle.research.compare.results import entries
from beagle.research.compare.suites import Finding

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- (\w+): (\S+) -->\n).*?(<!-- end of \2 -->)", re.S)
ENGINES = {"transformers": "transformers' `generate`", "plain": "Beagle, no drafts", "beagle": "Beagle, drafts"}
LOSSES = {"paper": "the recipe's", "tvce": "0.9 total variation, 0.1 cross-entropy", "lk": "LK"}
DRAFTED = {"beagle": "", "chain": ", chain", "head": ", head alone"}  # modes with a line of their own, and its name


def table(header: list[str], rows: list[list[str]]) -> str:
    return Table("", header, rows).markdown().strip()


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def modes(results: list[Result]) -> str:
    """One run of one file: transformers' ``generate``, plain decoding and Beagle."""
    (result,) = results
    rows = []
    for mode, name in ENGINES.items():
        figures = result["modes"][mode]
        stock = "1" if mode == "transformers" else speed_up_text(result["ratios"][f"{mode}/transformers"])
        plain = "1" if mode == "plain" else speed_up_text(over_plain(result, mode))
        rows.append([name, f"{figures['tokens_per_second']:.1f}", stock, plain, f"{figures['tau']:.2f}"])
    header = ["engine", "tokens/s", "over transformers", "over no drafts", "τ"]
    return f"{table(header, rows)}\n\n{heading(result)}; {machine(result)}.\n"


def benches(results: list[Result]) -> str:
    """A line for each file and drafting mode."""
    rows = []
    for result in results:
        for mode, words in DRAFTED.items():
            if mode not in result["modes"]:
                continue
            speeds = [
                f"{result['modes'][m]['tokens_per_second']:.1f}" if m in result["modes"] else "-"
                for m in ("plain", mode)
            ]
            stock = speed_up_text(result["ratios"].get(f"{mode}/transformers", {}) if mode == "beagle" else {})
            label = f"{mode_name(result['meta'])}{words} ({questions(result)} questions)"
            rows.append([label, *speeds, *received(result, mode), stock])
    header = ["mode", "plain, tokens/s", "drafted, tokens/s", "drafted / plain", "τ", "identical",
              "drafted / transformers' generate"]  # fmt: skip
    return table(header, rows) + "\n"


def sets(results: list[Result]) -> str:
    """A line for each question set of each file."""
    rows = []
    for result in results:
        for name, part in result["sets"].items():
            speed_up, tau, same = received(part)
            alphas = " ".join(f"{alpha:.2f}" for alpha in part["modes"].get("beagle", {}).get("step_alpha", [])[:5])
            label = name if len(results) == 1 else f"{name} ({mode_name(result['meta'])})"
            rows.append([label, speed_up, tau, alphas or "-", same])
    return table(["set", "drafted / plain", "τ", "step-α 1…5", "identical"], rows) + "\n"


def suites(results: list[Result]) -> str:
    """A section for each file: what was run, and its tables."""
    parts = []
    for result in results:
        suite, meta = result["meta"]["arguments"].get("suite"), result["meta"]
        interrupted = " **Interrupted: these are the questions finished by then.**" if meta.get("interrupted") else ""
        parts += [
            f"### {suite or 'questions'}: {heading(result)}", f"{machine(result)}.{interrupted}", f"`{meta['command']}`",
            *(part.markdown().strip() for part in (overview(result), details(result), costs(result))),
        ]  # fmt: skip
    return "\n" + "\n\n".join(parts or ["No results are stored yet."]) + "\n\n"


def claims(results: list[Result]) -> str:
    """What the paper says of training, and what the stored runs found."""
    found = [Finding(**finding) for result in results for finding in result["findings"]]
    return claims_table(found).markdown()


def trainings(results: list[Result]) -> str:
    """A section for each comparison of `beagle research compare`: every variant's figures."""
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
            f"`{meta['command']}`", results_table(entries(result["runs"], result["decoding"])).markdown().strip(),
        ]  # fmt: skip
    return "\n" + "\n\n".join(parts) + "\n\n"


def engines(results: list[Result]) -> str:
    """Every engine of a run of ``benchmarks/side_by_side.py`` that was measured."""
    (result,) = results
    rows = []
    for mode, label in result["labels"].items():
        if mode not in result["modes"]:
            continue
        figures, over = result["modes"][mode], result["over_transformers"][mode]
        ratio = "1" if mode == "transformers" else speed_up_text(over)
        rows.append([label, f"{figures['tokens_per_second']:.1f}", ratio, f"{figures['tau']:.2f}"])
    return table(["engine", "tokens/s", "over transformers' generate", "τ"], rows) + f"\n\n{machine(result)}.\n"


def clients(results: list[Result]) -> str:
    """Throughput of vLLM by number of clients, and its ratio over no drafts."""
    names = list(dict.fromkeys(entry["mode"] for result in results for entry in result["table"]))
    rows = []
    for result in results:
        figures = {(entry["concurrency"], entry["mode"]): entry for entry in result["table"]}
        for count in sorted({count for count, _ in figures}):
            found = [figures.get((count, name)) for name in names]
            cells = [f"{f['tokens_per_second']:.1f} ({f['ratio']:.2f}×)" if f else "-" for f in found]
            rows.append([str(count), str(result["questions"]), *cells])
    return table(["clients", "questions", *names], rows) + f"\n\n{machine(results[0])}.\n"


def variants(results: list[Result]) -> str:
    """Head variants of one ablation."""
    (result,) = results
    rows = []
    for name, figures in result["variants"].items():
        alphas = " ".join(f"{alpha:.2f}" for alpha in figures["step_alpha"][:3])
        rows.append([name, f"{figures['parameters']:,}", alphas, f"{figures['seconds']:.0f}"])
    return table(["variant", "parameters", "step-α 1…3", "seconds"], rows) + f"\n\n{machine(result)}.\n"


def scaling(results: list[Result]) -> str:
    """Every head of ``benchmarks/scaling.py``: its data, its loss, and its acceptance."""
    (result,) = results
    rows = []
    for run in sorted(result["runs"], key=lambda run: run["answer_tokens"]):
        rows.append([f"{run['answer_tokens'] / 1e6:.2f}", LOSSES[run["loss"]], f"{run['passes']:g}", *accepted(run)])
    whole = result["whole"]
    rows.append([f"{whole['answer_tokens'] / 1e6:.2f}", "the recipe's, the whole store", "1.9", *accepted(whole)])
    header = ["million tokens", "loss", "passes", "step-α 1…5", "expected length"]
    return table(header, rows) + f"\n\n{machine(result)}.\n"


def accepted(run: Result) -> list[str]:
    return [" ".join(f"{alpha:.2f}" for alpha in run["step_alpha"]), f"{run['expected_length']:.2f}"]


def parts(results: list[Result]) -> str:
    """A native pass by its parts, milliseconds."""
    (result,) = results
    if not result.get("parts"):
        return f"{machine(result)}: this run did not take passes apart.\n"
    return f"{table(*parts_table(result['parts']))}\n\nMilliseconds; {machine(result)}.\n"


KINDS: dict[str, Callable[[list[Result]], str]] = {
    "modes": modes, "benches": benches, "sets": sets, "suites": suites, "claims": claims, "trainings": trainings,
    "engines": engines, "clients": clients, "variants": variants, "families": families, "parts": parts,
    "scaling": scaling,
}  # fmt: skip
OF_EVALUATION = {"modes", "benches", "sets", "suites"}  # files that `beagle eval` writes


def received(part: Result, mode: str = "beagle") -> list[str]:
    """Speed-up, τ and share of identical answers."""
    if mode not in part["modes"]:
        return ["-"] * 3
    m = part["modes"][mode]
    identical = "-" if m["identical"] is None else f"{m['identical']:.0%}"
    return [speed_up_text(over_plain(part, mode)), f"{m['tau']:.2f}", identical]


def mode_name(meta: Result) -> str:
    dtype, arguments = meta["target"]["dtype"], meta["arguments"]
    words = [DTYPES.get(dtype, dtype)]
    if dtype != "float32":
        words.append("`--exact`" if arguments["exact"] else "fast")
    if meta["target"].get("compiled") or meta["target"].get("native"):
        words.append("compiled")
    words.append({"auto": "head + lookup", "head": "head alone"}.get(arguments["draft"], arguments["draft"]))
    if arguments["tree"] != "dynamic":
        words.append(arguments["tree"])
    if arguments["temperature"]:
        words.append(f"temperature {arguments['temperature']:g}")
    return ", ".join(words)


def read(path: Path) -> Result:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def facts(name: str) -> str:
    """Single figures, each with its file."""
    rows = []
    for fact in FACTS[name]:
        values = fact.text(*(read(ROOT / "results" / file) for file in fact.files))
        rows.append([fact.label, values, ", ".join(f"`results/{file}`" for file in fact.files)])
    return table(["what", "figure", "file"], rows) + "\n"


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def block(found: re.Match[str]) -> str:
        opening, kind, pattern, closing = found.groups()
        if kind == "facts":
            return opening + "\n" + facts(pattern) + "\n" + closing
        paths = sorted(ROOT.glob(pattern))
        if not paths and kind != "suites":
            raise SystemExit(f"'{pattern}' names no file; correct the comment or add the results")
        results = [read_result(path) if kind in OF_EVALUATION else read(path) for path in paths]
        return opening + "\n" + KINDS[kind](results).strip("\n") + "\n\n" + closing

    return BLOCK.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if arguments.check and after != before:
            sys.exit(f"{page.name} and results/ are out of step; run python tools/readme_figures.py")
        if not arguments.check:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
