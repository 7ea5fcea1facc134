"""More prompts out of a collection of prompts: questions behind retrieved passages, and other system messages.

python tools/more_prompts.py prompts.jsonl.gz --passages 7000 --systems 13000 --out more.jsonl.gz

Prompts with passages are rare in collections, and short. Here each question gets those passages of the collection that
share the rarest words with it, and its own ones if it had any, up to a thousand tokens in all. The same file gives the same
prompts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beagle.errors import BeagleError, run_script
from beagle.files import writing_to
from beagle.training.prompts import Prompt, read_prompts

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer in a few sentences.",
    "You are a careful assistant. Think step by step before you answer.",
    "Answer the user's question truthfully. If you don't know the answer, say so.",
    "You are an expert in many fields who explains things in plain words.",
    "You are a friendly tutor. Give an example where it helps.",
    "Be brief and to the point.",
    "You write clear, well-structured answers with headings and lists where they help.",
)
FORMS = (
    "{passages}\n{question}",
    "{passages}\n{question}",
    "Use the following passages to answer the question at the end.\n\n{numbered}\n\nQuestion: {question}",
    "Context:\n{passages}\n\nQuestion: {question}\nAnswer:",
    "{question}\n\nHere are search results that may help:\n\n{numbered}",
)
WORDS, LONGEST = 100, 750  # of a passage, and of all passages of a prompt
COMMON = 0.05  # a word that stands in such a share of the passages says little


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def question_of(row: Prompt) -> str | None:
    """The question that a prompt asks, without what it is asked about."""
    text = row.turns[0].strip()
    if row.category == "qa" and len(text) < 250 and text.endswith("?"):
        return str(text)
    if row.category == "rag" and (found := re.search(r"Question: ([^\n]{10,250}\?)\s*$", text)):
        return found[1]
    return None


def passages_of(row: Prompt) -> Iterator[str]:
    """Passages of about a hundred words in a prompt's first turn."""
    if row.category not in ("rag", "summarization"):
        return
    for paragraph in row.turns[0].split("\n\n")[1:]:
        words = re.sub(r"^\[\d+\] |^- |^Question: .*", "", paragraph.strip()).split()
        for at in range(0, len(words), WORDS):
            if len(words) - at >= WORDS // 2:
                yield " ".join(words[at : at + WORDS])


class Passages:
    """A pool of passages, found by the rare words that they share with a question."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.places: dict[str, set[int]] = defaultdict(set)
        for at, text in enumerate(texts):
            for word in words_of(text):
                self.places[word].add(at)

    def near(self, text: str, count: int) -> list[str]:
        """The ``count`` passages that share most with a text, rare words counting most."""
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(set(words_of(text))):
            places = self.places.get(word, ())
            if 0 < len(places) < COMMON * len(self.texts):
                for at in places:
                    scores[at] += math.log(len(self.texts) / len(places))
        return [self.texts[at] for at, _ in sorted(scores.items(), key=lambda found: (-found[1], found[0]))[:count]]


def with_passages(rows: list[Prompt], count: int) -> Iterator[dict[str, Any]]:
    """Questions of the rows, each behind passages that fit it.

    Raises:
        BeagleError: there is no question.
    """
    pool = Passages(sorted({passage for row in rows for passage in passages_of(row)}))
    asked = [(row, question) for row in rows if (question := question_of(row))]
    if count and not asked:
        raise BeagleError("no prompt asks a question (category qa or rag); give others, or --passages 0")
    for number in range(count):
        row, question = asked[number % len(asked)]
        draw = random.Random(f"{number}/{question}")
        own = list(passages_of(row))
        room = draw.randint(LONGEST // 3, LONGEST)
        found: list[str] = []
        for passage in own + [p for p in pool.near(question, draw.choice((8, 12, 16))) if p not in own]:
            if sum(len(p.split()) for p in found) + len(passage.split()) <= room:
                found.append(passage)
        draw.shuffle(found)
        numbered = "\n\n".join(f"[{at}] {passage}" for at, passage in enumerate(found, 1))
        text = draw.choice(FORMS).format(passages="\n".join(found), numbered=numbered, question=question)
        yield {"id": f"passages-{number}", "category": "rag", "turns": [text]}


def with_systems(rows: list[Prompt], count: int) -> Iterator[dict[str, Any]]:
    """Prompts of one turn under another system message, all those with a text to work on among them."""
    single = [row for row in rows if len(row.turns) == 1]
    single.sort(key=lambda row: (row.category != "summarization", random.Random(row.id).random()))
    for row in single[:count]:
        system = random.Random(f"system/{row.id}").choice(SYSTEMS)
        yield {"id": f"system-{row.id}", "category": row.category, "system": system, "turns": row.turns}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="JSON lines with id, category and turns")
    parser.add_argument("--passages", type=int, default=7000, help="questions behind passages")
    parser.add_argument("--systems", type=int, default=13000, help="prompts with a system message")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    rows = read_prompts(args.prompts)
    made = [*with_passages(rows, args.passages), *with_systems(rows, args.systems)]
    with writing_to(args.out), gzip.GzipFile(args.out, "wb", mtime=0) as packed:
        for row in made:
            packed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    run_script(main)
