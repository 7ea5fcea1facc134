"""The table of families, from what ``family_sweep.py`` has found."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

Result = dict[str, Any]


def families(results: list[Result]) -> str:
    """The families of one sweep by what came of them, in Markdown, and a line that counts them."""
    (result,) = results
    groups: dict[str, list[str]] = defaultdict(list)
    variants: dict[bool, int] = defaultdict(int)
    for found in result["families"]:
        if "@" in found["family"]:
            variants[found["outcome"] == "identical"] += 1
        else:
            groups[in_words(found)].append(found["family"])
    order = sorted(groups, key=lambda words: (not words.startswith("identical"), -len(groups[words]), words))
    lines = ["| number | what came of it | families |", "| --- | --- | --- |"]
    lines += [f"| {len(groups[words])} | {words} | {', '.join(groups[words])} |" for words in order]
    same = sum(len(names) for words, names in groups.items() if words.startswith("identical"))
    versions = result["meta"]["versions"]
    counted = f"{same} of the {sum(map(len, groups.values()))} families of transformers {versions['transformers']} are served."
    if variants:
        counted += f" So are {variants[True]} of {sum(variants.values())} variants of their settings."
    about = f"Revision {result['meta']['revision']}, torch {versions['torch']}, {result['meta']['date'][:10]}."
    return "\n".join([*lines, "", counted, about]) + "\n"


def in_words(found: Result) -> str:
    """What came of a family, without what differs among families of one reason: numbers, and names in brackets."""
    result = found["outcome"]
    if result == "identical":
        refused = [way for way, of in found["ways"].items() if of != "identical"]
        without = f", but for {' and '.join(refused)}" if refused else ""
        if "equal to" in found:
            without += " to transformers without a KV cache; with one it gives others"
        return f"identical{without}" + ("" if found["trains"] == "yes" else "; no head")
    if result == "unbuilt":
        return "transformers makes or runs no tiny model of it"
    why = re.sub(r"; (choose|correct|load) .*", "", found["why"])
    why = re.sub(r" ?\([^()]*\)", "", why)
    return f"{result}: {re.sub(r'[0-9]+ of its [0-9]+ layers', 'some layers', why)}"
