"""Check a folder of answers, and add those of a generator: full files stay as they are.

python tools/collect_answers.py answers/smollm2-135m-instruct --target smollm2-135m [--raw FOLDER]

The raw folder holds safetensors with `tokens`, `lengths` and metadata `samples`, a JSON list of prompt, id, turn,
temperature and prompt_tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from beagle.errors import run_script
from beagle.targets.loading import load_target
from beagle.training.answer_files import AnswerFolder, AnswersManifest, StoredAnswer

SAMPLING = {
    "dtype": "bfloat16",
    "max_prompt_tokens": 1600,
    "max_new_tokens": 320,
    "max_turns": 4,
    "temperature": "0.0 for 6 prompts of 10, 0.7 for 2, 1.0 for 2, by the prompt's key; no top-k, no top-p",
}


def raw_answers(folder: Path, end_tokens: list[int]) -> Iterator[StoredAnswer]:
    """Answers of all files, by the files' names."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["samples"])
            parts = file.get_tensor("tokens").long().split(file.get_tensor("lengths").tolist())
        for one, tokens in zip(about, parts, strict=True):
            yield StoredAnswer(**one, ended=int(tokens[-1]) in end_tokens, tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--raw", type=Path)
    args = parser.parse_args()
    target = load_target(args.target, dtype="bfloat16", device="cpu")
    folder = AnswerFolder.create(args.folder, AnswersManifest.of(target, SAMPLING))
    if args.raw:
        print(folder.append(raw_answers(args.raw, folder.manifest.end_tokens)), "new answers")
    folder.refuse_other_target(target)
    answers = folder.read()
    tokens, ended = sum(len(answer.tokens) for answer in answers), sum(answer.ended for answer in answers)
    prompts = len({answer.prompt for answer in answers})
    print(f"{len(answers):,} answers to {prompts:,} prompts, {tokens:,} tokens, {ended:,} ended by the target")


if __name__ == "__main__":
    run_script(main)
