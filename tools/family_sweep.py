"""Every family of causal language models that transformers knows, as a tiny random model: served as transformers does?

Each family's answers are compared with transformers' own greedy decoding in float32: plain, drafted as trees by the answer
itself and by a draft head, in exact mode, several at once, and sampled with a seed (drafted against plain).
The outcome of a family is one of:

    identical   all that is offered gives transformers' own tokens
    refused     a BeagleError of one line says why
    differs     some way gives other tokens
    crashes     some way ends in another error
    unbuilt     transformers itself can't make or run the tiny model

    python tools/family_sweep.py --json results/family_sweep.json     # about 10 minutes on one core
    python tools/family_sweep.py --only llama,bloom                   # some families
    python tools/family_sweep.py --variants                           # settings that defaults don't show

``tools/readme_figures.py`` writes the table of docs/families.md from the file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BEAGLE_HUGE_PAGES", "0")

import torch
from tiny_families import VARIANTS, VOCABULARY, config_of, enliven, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from beagle.drafters.base import Draft, DraftContext, Drafter, TreePlan
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import BeagleError
from beagle.files import write_json
from beagle.meta import command_line, describe
from beagle.model import Model
from beagle.targets.loading import load_target
from beagle.targets.target import Target
from beagle.training.config import TrainConfig
from beagle.training.stages import lm_head_rows, stage_loss
from beagle.training.trainer import new_head
from beagle.training.windows import Batch

NEW = 16  # tokens of an answer
PLAN = TreePlan("dynamic", depth=4, top_k=6, nodes=14)
SEED = 0
NEAR = 1e-4  # logits closer than this are a tie, which rounding may decide either way


class Counted(DraftContext):
    """How long the prompt was, and how long the text is now."""

    def __init__(self) -> None:
        self.prompt = self.length = 0

    def extend(self, tokens: list[int], states: Tensor) -> None:
        self.prompt = self.prompt or len(tokens)
        self.length += len(tokens)


class Knowing(Drafter[Counted]):
    """Drafts what is likely to be the answer, among wrong candidates, as a tree."""

    name = "knowing"

    def __init__(self) -> None:
        self.answer: list[int] = []

    def context(self) -> Counted:
        return Counted()

    def draft(self, contexts: Any, roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0) -> list[Draft]:
        return [self._candidates(context, plan) for context in contexts]

    def _candidates(self, context: Counted, plan: TreePlan) -> Draft:
        at = context.length - context.prompt + 1
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for right in self.answer[at : at + plan.depth]:
            wrong = [] if plan.kind == "chain" else [(right + 1) % VOCABULARY]
            tokens += [*wrong, right]
            parents += [parent] * (len(wrong) + 1)
            parent = len(tokens) - 1
        return Draft(tokens, parents, [-0.01 * i for i in range(len(tokens))])


def prompts() -> list[list[int]]:
    """Ids of three texts: short and long ones, one a single token again and again."""
    seeded = torch.Generator().manual_seed(7)
    pieces = ((5, 4), (37, 1), (1, 6))  # tokens, and how often they come
    return [torch.randint(6, VOCABULARY, (n,), generator=seeded).tolist() * times for n, times in pieces]


def build(name: str, folder: Path) -> None:
    """A tiny random model and its tokenizer in a folder."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config_of(name)).eval()
    enliven(model, SEED)
    generation = model.generation_config
    generation.eos_token_id, generation.bos_token_id, generation.pad_token_id = 2, 1, 0
    generation.forced_eos_token_id = generation.forced_bos_token_id = generation.max_length = None
    generation.no_repeat_ngram_size = generation.encoder_no_repeat_ngram_size = generation.min_length = 0
    generation.num_beams, generation.do_sample = 1, False
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@torch.no_grad()
def own_answers(folder: Path) -> tuple[list[list[list[int]]], list[float]]:
    """transformers' own greedy answers to each prompt.

    Returns:
        For each prompt the answer with a KV cache and the one without, where each can be had (at least one); and the least
        gap between the two best logits of each answer.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[list[list[int]]] = []
    gaps: list[float] = []
    for ids in prompts():
        answers, gap, failure = [], float("inf"), None
        given = torch.tensor([ids])
        try:
            out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False)
            answers.append(out[0, len(ids) :].tolist())
        except Exception as error:  # a family whose own cache fails
            failure = error
        try:
            made, gap = without_cache(model, ids, answers[0] if answers else [])
            answers.append(made)
        except Exception:
            if failure is not None:
                raise
        found.append(answers)
        gaps.append(gap)
    return found, gaps


def without_cache(model: Any, ids: list[int], likely: list[int]) -> tuple[list[int], float]:
    """transformers' greedy answer by whole passes, and the least gap between the two best logits.

    Args:
        model: of transformers.
        ids: the prompt.
        likely: an answer that one pass is enough for, if it is right; or nothing.
    """

    def logits_of(tokens: list[int]) -> Tensor:
        found: Tensor = model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0].float()
        return found

    if likely:
        logits = logits_of(likely)[len(ids) - 1 : -1]
        if logits.argmax(-1).tolist() == likely:
            best = logits.topk(2).values
            return likely, float((best[:, 0] - best[:, 1]).min())
    made: list[int] = []
    gap = float("inf")
    while len(made) < NEW and 2 not in made:
        logits = logits_of(made)[-1]
        best = logits.topk(2).values
        gap = min(gap, float(best[0] - best[1]))
        made.append(int(logits.argmax()))
    return made, gap


def answers(target: Target, own: list[list[int]]) -> dict[str, str]:
    """What each way of decoding gives: "identical", "refused: …", "differs: …" or "crashes: …".

    Args:
        own: transformers' answers, to draft.
    """
    knowing, given = Knowing(), prompts()
    tree, plain = Model(target, knowing, PLAN), Model(target)
    headed: Model | None = None

    def each(model: Model, drafts: list[list[int]], **options: Any) -> list[list[int]]:
        found = []
        for ids, answer in zip(given, drafts, strict=True):
            knowing.answer = answer
            found.append(model.generate(ids, max_new_tokens=NEW, **options).token_ids)
        return found

    def with_head() -> list[list[int]]:
        nonlocal headed
        headed = headed or Model(target, HeadDrafter(target, head_of(target)), PLAN)
        return each(headed, own)

    def batch() -> list[list[int]]:
        knowing.answer = own[0]
        return [answer.token_ids for answer in tree.generate_batch(given, rows=3, max_new_tokens=NEW)]

    def sampled() -> list[list[int]]:
        return each(tree, alone, temperature=1.0, seed=3)

    alone: list[list[int]] = []

    def sampled_alone() -> list[list[int]]:
        alone[:] = each(plain, own, temperature=1.0, seed=3)
        return alone

    ways: dict[str, tuple[Callable[[], list[list[int]]], list[list[int]]]] = {
        "plain": (lambda: each(plain, own), own),
        "tree": (lambda: each(tree, own), own),
        "head": (with_head, own),
        "exact": (lambda: each(tree, own, exact=True), own),
        "batch": (batch, own),
        "sampled, plain": (sampled_alone, alone),
        "sampled": (sampled, alone),
    }
    return {name: outcome(run, expected) for name, (run, expected) in ways.items()}


def outcome(run: Callable[[], list[list[int]]], expected: list[list[int]]) -> str:
    """What a way of decoding gives, in a line."""
    try:
        found = run()
    except BeagleError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"crashes: {where(error)}"
    wrong = [i for i, (ours, own) in enumerate(zip(found, expected, strict=True)) if ours != own]
    return f"differs: answers {', '.join(map(str, wrong))}" if wrong else "identical"


def head_of(target: Target) -> Any:
    """A random head that attends."""
    torch.manual_seed(SEED)
    head = new_head(target, TrainConfig(), {}).to(target.dtype)
    for parameter in head.parameters():
        parameter.data.mul_(15.0 if parameter.ndim == 2 else 1.0)
    return head.eval().requires_grad_(False)


def trains(target: Target) -> str:
    """Whether a head's first step of training lowers its loss on one batch: "yes", or why not."""
    try:
        torch.manual_seed(SEED)
        config = TrainConfig(dropout=0.0)
        head = new_head(target, config, {}).float()
        ids = torch.tensor([prompts()[1]])
        states = target.prefill(ids, target.new_cache(1, ids.shape[1])).float()
        first = torch.zeros(1, dtype=torch.long)
        batch = Batch(target.embed(ids).float(), states, first, first + ids.shape[1] - 2)
        optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
        losses = []
        for _ in range(2):
            found = stage_loss(
                head, batch, lm_head_rows(target, head.draft_vocab), config, stage="early", offset=0,
                noise=torch.zeros_like(states),
            )  # fmt: skip
            loss = found[0] if isinstance(found, tuple) else found
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return "yes" if losses[1] < losses[0] else f"its loss went from {losses[0]:.4g} to {losses[1]:.4g}"
    except Exception as error:
        return where(error)


def where(error: BaseException) -> str:
    """An error's first line, and the last line of code that it passed."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = (str(error).strip().split("\n") or [""])[0][:300]
    return f"{type(error).__name__}: {line} ({Path(last.filename).name}:{last.lineno})"


def family(name: str) -> dict[str, Any]:
    """The outcome of one family or variant; whatever goes wrong is part of it."""
    found: dict[str, Any] = {"family": name}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="family-") as scratch:
        folder = Path(scratch)
        try:
            build(name, folder)
            own, gaps = own_answers(folder)
        except Exception as error:
            return found | {"outcome": "unbuilt", "why": where(error)}
        found |= judged(folder, own, gaps)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def judged(folder: Path, own: list[list[list[int]]], gaps: list[float]) -> dict[str, Any]:
    """The outcome of a family whose own answers are known.

    Args:
        folder: the model.
        own: as of ``own_answers``.
        gaps: as of ``own_answers``.
    """
    try:
        target = load_target(str(folder), dtype="float32", device="cpu")
    except BeagleError as error:
        return {"outcome": "refused", "why": str(error).replace(str(folder), "it").removeprefix("it: ")}
    except Exception as error:
        return {"outcome": "crashes", "why": where(error)}
    ways = answers(target, [cached for cached, *_ in own])
    found: dict[str, Any] = {}
    if all(len(each) == 2 for each in own) and any(cached != whole for cached, whole in own):
        found["own"] = "transformers' own answers with a KV cache are others than without"
        if "differs" in " ".join(ways.values()):
            without = answers(target, [whole for _, whole in own])
            if "differs" not in " ".join(without.values()):
                ways, found["equal to"] = without, "those without"
    found |= {"ways": ways, "trains": trains(target), "layers": target.layer_count}
    ways = found["ways"] = {name: way.replace(str(folder), "it") for name, way in ways.items()}
    kinds = {way.split(":")[0] for way in ways.values()}
    result = next((kind for kind in ("crashes", "differs") if kind in kinds), "identical")
    if result == "identical" and ways["plain"] != "identical":
        result = "refused"
    if result != "identical":
        bad = {name: way for name, way in ways.items() if way != "identical"}
        found["why"] = "; ".join(f"{name}: {way}" for name, way in bad.items())[:400]
        if min(gaps) < NEAR:
            found["near tie"] = min(gaps)
    return {"outcome": result} | found


def sweep(names: list[str], path: Path | None) -> None:
    """Run the families, a line for each; the file is written after each of them, beside those that it holds of others."""
    about = describe() | {"command": command_line("python tools/family_sweep.py"), "seed": SEED, "new_tokens": NEW}
    done: dict[str, Any] = {}
    for name in names:
        found = family(name)
        if path is not None and path.exists():  # read anew, since parts may run side by side
            done |= {other["family"]: other for other in json.loads(path.read_text(encoding="utf-8"))["families"]}
        done[name] = found
        line = f"{name:28} {found['outcome']:10} {found.get('why', '')}"
        if found["outcome"] == "identical":
            ways: dict[str, str] = found["ways"]
            refused = [way for way, of in ways.items() if of != "identical"]
            line += f"a head trains: {found['trains']}" + (f"; refused: {', '.join(refused)}" if refused else "")
        print(line, flush=True)
        if path is not None:
            write_json(path, {"families": [done[key] for key in sorted(done)], "meta": about})
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[done[name]["outcome"]] += 1
    print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())), f"of {len(names)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of families or variants, with commas between them")
    parser.add_argument("--variants", action="store_true", help="variants of settings, instead of all families")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="the I-th of N parts of the names, from 0 on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results go, beside what the file holds")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="only write the table of docs/families.md from a result"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    torch.set_num_threads(1)
    names = sorted(VARIANTS if args.variants else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if args.only:
        names = args.only.split(",")
    part, parts = map(int, args.part.split("/"))
    sweep(names[part::parts], args.json)


if __name__ == "__main__":
    main()
