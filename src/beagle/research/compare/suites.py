"""Comparisons with a name: the baselines, the memory of simulated steps, and the paper's ablations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from beagle.errors import BeagleError
from beagle.research.compare.results import Entry, growth, reached

Entries = dict[str, Entry]


@dataclass(frozen=True)
class Finding:
    """A claim, what the paper says of it, what was found, and whether the two agree."""

    claim: str
    paper: str
    found: str
    agrees: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Suite:
    """
    Attributes:
        variants: as ``parse_list`` reads them.
        ordered: they are values of one parameter.
        trees: kinds of tree to decode with; empty: what the command line says.
        short: meant to be run so shortly that acceptance says nothing; only what training costs is drawn.
    """

    title: str
    variants: str
    judge: Callable[[Entries], list[Finding]]
    ordered: bool = False
    trees: tuple[str, ...] = ()
    short: bool = False


def listed(entries: Entries, value: Callable[[Entry], float], digits: int = 2) -> str:
    return ", ".join(f"{name} {value(entry):.{digits}f}" for name, entry in entries.items())


def measure(entries: Entries) -> str:
    """What ``Entry.acceptance`` is here."""
    return "τ" if next(iter(entries.values())).decoding else "expected acceptance length"


def depth(*entries: Entry) -> int:
    """Positions that enough drafts reached in all of them; two at least."""
    return max(2, min(entry.depth for entry in entries))


def named(last: int) -> str:
    return "α_2" if last == 2 else f"α_2 … α_{last}"


def baselines(e: Entries) -> list[Finding]:
    ours, theirs, early = e["beagle"], e["eagle"], e["beagle-early"]
    ratio = ours.acceptance / theirs.acceptance
    last = depth(ours, theirs)
    later = [a - b for a, b in zip(ours.step_alpha[1:last], theirs.step_alpha[1:last], strict=True)]
    pace = [x.stage("early", "tokens_per_second") or 0.0 for x in (early, theirs)]
    when = reached(ours, theirs.length, "seconds")
    spent = fmean(r["seconds"] for r in theirs.records)
    share = None if when is None else when / spent
    return [
        Finding("Beagle accepts as much as EAGLE (at least 0.97 times)", "on a par: τ 4.1 to 4.0 on MT-Bench, 7B",
                f"{measure(e)} {ours.acceptance:.2f} to {theirs.acceptance:.2f}: {ratio:.2f} times", ratio >= 0.97),
        Finding(f"Beagle's {named(last)} are above EAGLE's single step's", "Figure 3: above at every step but the first",
                "difference by step " + " ".join(f"{d:+.2f}" for d in later), min(later) > 0),
        Finding("Beagle's early stage trains at least as fast", "higher training efficiency",
                f"{pace[0]:.0f} to {pace[1]:.0f} tokens/s", pace[0] >= pace[1]),
        Finding("Beagle reaches EAGLE's final expected length in less time", "higher training efficiency",
                "not reached" if share is None else f"in {share:.2f} of EAGLE's training time", share is not None and share < 1),
        Finding("Beagle has fewer parameters", "no fusing layer",
                f"{ours.parameters:,} to {theirs.parameters:,}", ours.parameters < theirs.parameters),
    ]  # fmt: skip


def memory(e: Entries) -> list[Finding]:
    flat, grows = ([x.memory_mb() for name, x in e.items() if name.startswith(kind)] for kind in ("beagle", "eagle"))
    return [
        Finding("memory of Beagle's late stage does not grow with s (s = 8 over s = 1 at most 1.05)", "constant in s",
                f"{growth(flat):.2f} times", growth(flat) <= 1.05),
        Finding("memory of the unrolled EAGLE grows (8 steps over 1 more than 1.5)", "linear in the steps",
                f"{growth(grows):.2f} times", growth(grows) > 1.5),
    ]  # fmt: skip


def fig3(e: Entries) -> list[Finding]:
    """Also of the validations on the way, as the figure is of the course of training."""
    ours, theirs = e["beagle-early"], e["eagle"]
    last = depth(ours, theirs)
    gain = [a - b for a, b in zip(ours.step_alpha[:last], theirs.step_alpha[:last], strict=True)]
    pairs = [
        pair
        for a, b in zip(ours.records, theirs.records, strict=True)
        for pair in zip(a["curve"], b["curve"], strict=False)
    ]
    above = sum(
        all(x > y for x, y in zip(a["step_alpha"][1:last], b["step_alpha"][1:last], strict=True)) for a, b in pairs
    )
    return [
        Finding("Beagle's early stage is above EAGLE at every step but the first", "Figure 3: above at α_2 … α_5",
                f"difference at the end, α_1 and {named(last)}: " + " ".join(f"{g:+.2f}" for g in gain)
                + f"; above at {above} of {len(pairs)} validations", min(gain[1:]) > 0),
        Finding("the two meet at the first step (within 0.05)", "Figure 3: the first step's curves meet",
                f"α_1 {ours.step_alpha[0]:.2f} to {theirs.step_alpha[0]:.2f}", abs(gain[0]) <= 0.05),
    ]  # fmt: skip


def fig4(e: Entries) -> list[Finding]:
    best = max(e, key=lambda name: e[name].decoded("tokens_per_second") or e[name].acceptance)
    what = "speed" if measure(e) == "τ" else "expected acceptance length (no questions were decoded)"
    last = depth(*e.values())
    tails = {name: fmean(x.step_alpha[1:last]) for name, x in e.items()}
    narrow = tails["beagle-early-k1"]
    return [
        Finding("windows of k > 1 raise the later steps", "Figure 4: k > 1 bends the decline of step-α",
                f"{'mean of ' * (last > 2)}{named(last)}: " + ", ".join(f"{name} {x:.2f}" for name, x in tails.items()),
                all(x > narrow for name, x in tails.items() if name != "beagle-early-k1")),
        Finding("k = 3 is best", "Figure 4: best speed at k = 3", f"best {what}: {best.split('-')[-1]}", best.endswith("k3")),
    ]  # fmt: skip


def fig5(e: Entries) -> list[Finding]:
    early, late = e["beagle-early"], e["beagle"]
    last = depth(early, late)
    gain = [b - a for a, b in zip(early.step_alpha[:last], late.step_alpha[:last], strict=True)]
    return [
        Finding("in the second half the late loss improves all steps, the early loss stalls",
                "Figure 5: better at all steps", f"late minus early, α_1 and {named(last)}: " + " ".join(f"{g:+.3f}" for g in gain),
                min(gain) > 0),
    ]  # fmt: skip


def fig6(e: Entries) -> list[Finding]:
    lengths = [x.acceptance for x in e.values()]
    return [
        Finding("batches of 4 to 32 sequences converge alike (within 5%)", "Figures 6, 7: alike",
                f"{measure(e)} " + listed(e, lambda x: x.acceptance), max(lengths) / min(lengths) <= 1.05),
    ]  # fmt: skip


def fig7(e: Entries) -> list[Finding]:
    blocks, mixed, bare, experts = (e[f"beagle-early{word}"] for word in ("", "-random", "-noreg", "-moe"))
    pace = [x.stage("early", "tokens_per_second") or 0.0 for x in (blocks, experts)]
    return [
        Finding("inverse blocks beat random masks", "Figure 7: random masks lose",
                f"{measure(e)} {blocks.acceptance:.3f} to {mixed.acceptance:.3f}", blocks.acceptance > mixed.acceptance),
        Finding("the regression loss helps", "Figures 6, 7: without it training degrades at the end",
                f"with {blocks.acceptance:.3f}, without {bare.acceptance:.3f}", blocks.acceptance > bare.acceptance),
        Finding("a mixture of MLPs accepts more, and is slower", "Figures 6, 7: better acceptance, slower",
                f"{measure(e)} {experts.acceptance:.3f} to {blocks.acceptance:.3f}, trains at {pace[1] / (pace[0] or 1):.2f} times the pace",
                experts.acceptance > blocks.acceptance and pace[1] < pace[0]),
    ]  # fmt: skip


def fig10(e: Entries) -> list[Finding]:
    single, early, late = e["beagle-early-k1"], e["beagle-early-k5"], e["beagle-k5-s4"]
    steps = [e[f"beagle-k5-s{s}"].acceptance for s in range(1, 5)]
    return [
        Finding("each stage adds to acceptance", "each about +0.3 τ: single token, early, late",
                f"{measure(e)} {single.acceptance:.2f}, {early.acceptance:.2f}, {late.acceptance:.2f}",
                single.acceptance < early.acceptance < late.acceptance),
        Finding("more simulated steps are better", "Figure 10: s = 1 … 4", " ".join(f"{x:.3f}" for x in steps),
                steps[-1] > steps[0]),
    ]  # fmt: skip


def fig11(e: Entries) -> list[Finding]:
    on, off = e["beagle"], e["beagle-noconcat"]
    if not on.decoding:
        raise BeagleError("suite 'fig11' is about the time of decoding; give it question files")
    found = []
    for tree in on.decoding:
        ratio = (off.decoded("tokens_per_second", tree) or 0) / (on.decoded("tokens_per_second", tree) or 1)
        found.append(
            Finding(
                f"no concatenation costs little speed, {tree} tree", "at most 3%", f"{ratio - 1:+.1%}", ratio >= 0.97
            )
        )
    return found


def fig12(e: Entries) -> list[Finding]:
    return better_than(
        e,
        {
            "beagle-window": (
                "the next token alone (l = i) beats all of the window (l = k)",
                "Figure 12: l = i is better",
            ),
            "beagle-noreg": ("the regression loss helps", "kept: without it training degrades at the end"),
        },
    )


def block(e: Entries) -> list[Finding]:
    what = {
        "beagle-nonewest": "the newest state in the residual helps (ours; the paper's block has none)",
        "beagle-notoken": "the token in the MLP's input helps (ours; the paper's block has none)",
        "beagle-onewindow": "a window of the early stage's own helps (ours; the paper has one for both stages)",
    }
    return better_than(e, {name: (claim, "not tried") for name, claim in what.items()})


def better_than(e: Entries, others: dict[str, tuple[str, str]]) -> list[Finding]:
    """Beagle accepts more than each of some variants, of which the claim and what the paper says are given."""
    base = e["beagle"].acceptance
    return [
        Finding(claim, paper, f"{measure(e)} {base:.3f} to {e[name].acceptance:.3f}", base > e[name].acceptance)
        for name, (claim, paper) in others.items()
    ]


LATE_ONLY = ",".join([f"beagle-late-k{s}-s{s}" for s in range(1, 9)] + ["eagle-late-u1..u8"])
SUITES = {
    "baselines": Suite("Beagle and EAGLE-v2", "beagle-early,beagle,eagle,eagle-unrolled", baselines),
    "memory": Suite("Memory of simulated steps", LATE_ONLY, memory, short=True),
    "fig3": Suite("Step-α over the early stage (Figure 3)", "beagle-early,eagle", fig3),
    "fig4": Suite("Window of the early stage (Figure 4)", "beagle-early-k1..k5", fig4, ordered=True),
    "fig5": Suite("Late or early loss in the second half (Figure 5)", "beagle-early,beagle", fig5),
    "fig6": Suite("Batch size (Figures 6, 7)", "beagle-early-b4,beagle-early-b16,beagle-early-b32", fig6, ordered=True),
    "fig7": Suite("Masks, regression and experts of the early stage (Figures 6, 7)",
                  "beagle-early,beagle-early-random,beagle-early-noreg,beagle-early-moe", fig7),
    "fig10": Suite("Simulated steps of the late stage (Figure 10)",
                   "beagle-early-k1,beagle-early-k5,beagle-k5-s1..s4", fig10, ordered=True),
    "fig11": Suite("Concatenation and trees (Figure 11)", "beagle,beagle-noconcat", fig11, trees=("static", "dynamic")),
    "fig12": Suite("Loss of the late stage (Figure 12)",
                   "beagle,beagle-window,beagle-noreg,beagle-window-noreg", fig12),
    "block": Suite("What ours adds to the paper's block and stages",
                   "beagle,beagle-notoken,beagle-nonewest,beagle-linear,beagle-onewindow", block),
}  # fmt: skip


def find_suite(name: str) -> Suite:
    """
    Raises:
        BeagleError: there is none of this name.
    """
    if name not in SUITES:
        raise BeagleError(f"suite '{name}' is unknown; use one of {', '.join(SUITES)}")
    return SUITES[name]
