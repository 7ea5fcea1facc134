"""Training on answers that exist: those that a target made once, or those that dialogues bring. Nothing is generated.

The hidden states come from one pass of the target over prompt and answer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import Tensor

from beagle.errors import BeagleError
from beagle.targets.chat import encode
from beagle.targets.target import Target
from beagle.training.answer_files import AnswerFolder, prompt_key
from beagle.training.answers import Sample, refuse_not_finite
from beagle.training.data import padded, padded_tokens
from beagle.training.dialogues import InseparableError, answered, last_answer
from beagle.training.prompts import Prompt, has_template, reject
from beagle.training.recipe import AnswerConfig
from beagle.training.states import StateStore
from beagle.training.vllm_states import VllmStates

PASS_TOKENS = 4096  # padded tokens of a pass, where one text isn't longer
TOGETHER = 1024  # texts among which those of similar length share passes


class TextReader:
    """Prompts with answers as samples without states, in the order of their files.

    Attributes:
        left_out: what was passed over, a line each.
    """

    def __init__(self, target: Target, config: AnswerConfig) -> None:
        self.target, self.config = target, config
        self.max_turns = config.max_turns if has_template(target) else 1
        self.left_out: list[str] = []
        self.too_long = self.cut = 0

    def stored(self, folder: AnswerFolder, prompts: Iterable[Prompt]) -> Iterator[Sample]:
        """Answers of a folder to these prompts, each with the history that it was made with.

        Raises:
            BeagleError: the answers are not the target's, or not to these prompts as it encodes them (named).
        """
        folder.refuse_other_target(self.target)
        asked: dict[str, Prompt] = {}
        for prompt in prompts:
            asked.setdefault(prompt_key(prompt), prompt)
        answers = folder.read()
        answered = {answer.prompt for answer in answers}
        histories: dict[str, list[str]] = {key: [] for key in asked.keys() & answered}
        if not histories:
            raise BeagleError(
                f"'{folder.folder}' answers none of the {len(asked)} prompts; give the prompts that its answers were made "
                "from"
            )
        if more := len(answered) - len(histories):
            self.left_out.append(f"{more} prompts of '{folder.folder}' are not among the given ones, and are left out")
        if less := len(asked) - len(histories):
            self.left_out.append(f"{less} given prompts have no answer in '{folder.folder}', and are left out")
        for answer in answers:
            if (history := histories.get(answer.prompt)) is None:
                continue
            prompt = asked[answer.prompt]
            if len(history) != answer.turn:
                raise BeagleError(
                    f"{prompt.name}: '{folder.folder}' lacks the answer to turn {len(history) + 1}; copy or download it "
                    "again"
                )
            if answer.turn < self.max_turns:
                ids = prompt.encode(self.target, history)
                if len(ids) != answer.prompt_tokens:
                    raise BeagleError(
                        f"{prompt.name}: turn {answer.turn + 1} has {len(ids)} tokens with what comes before it, but had "
                        f"{answer.prompt_tokens} when '{folder.folder}' was made; give the tokenizer that it was made with"
                    )
                yield from self._sample(prompt, answer.turn, ids, answer.tokens[:-1])  # the last was never run
            history.append(self.target.tokenizer.decode(answer.text_ids, skip_special_tokens=True))

    def given(self, prompts: Sequence[Prompt], skip_bad_lines: bool | None = False) -> Iterator[Sample]:
        """Dialogues with the answers that they bring, each a sample, and texts without turns.

        Args:
            skip_bad_lines: leave out what the tokenizer or its template refuses; as of ``reject``.
        Raises:
            BeagleError: none brings an answer, or one is refused (named); or the chat template doesn't show of any
                which tokens are the answer's.
        """
        without = usable = 0
        hidden: list[str] = []
        for prompt in prompts:
            try:
                turns = list(self._given(prompt))
            except InseparableError as error:
                hidden.append(f"{prompt.name}: {error}")
                continue
            except (BeagleError, TypeError, ValueError) as error:  # half a surrogate pair, say
                reject(f"{prompt.name}: {error}", error, skip_bad_lines)
                continue
            without += not turns
            usable += bool(turns)
            for turn, (ids, answer) in enumerate(turns):
                yield from self._sample(prompt, turn, ids, torch.tensor(answer, dtype=torch.long))
        if not usable and hidden:
            raise BeagleError(hidden[0])
        if not usable and without < len(prompts):
            raise BeagleError(f"{self.target.name} takes none of the {len(prompts)} prompts; give others")
        if not usable:
            raise BeagleError(
                "none of the prompts brings an answer, and answers.source: given trains on those; give dialogues with "
                "turns of the assistant, or let the target answer (answers.source: target)"
            )
        if without:
            self.left_out.append(f"{without} prompts bring no answer to their first turn, and are left out")
        if hidden:
            self.left_out.append(f"{len(hidden)} dialogues are left out; {hidden[0]}")

    def _given(self, prompt: Prompt) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids before each answer, and the answer's."""
        if prompt.text:
            ids = encode(self.target, prompt.text, raw=True)
            yield ids[:1], ids[1:]
        elif has_template(self.target):
            for dialogue in islice(answered(prompt.given()), self.max_turns):
                yield last_answer(self.target, dialogue)
        elif prompt.answers:
            answer = self.target.tokenizer(prompt.answers[0], add_special_tokens=False)["input_ids"]
            yield encode(self.target, prompt.turns[0]), answer

    def _sample(self, prompt: Prompt, turn: int, ids: list[int], answer: Tensor) -> Iterator[Sample]:
        """One sample, or none where the prompt is too long or the answer is empty."""
        if len(ids) > min(self.config.max_prompt_tokens, self.target.context_limit - 1):
            self.too_long += 1
            return
        most = min(self.config.max_new_tokens, self.target.context_limit - len(ids))
        self.cut += len(answer) > most
        answer = answer[:most]
        if len(answer):
            tokens = torch.cat([torch.tensor(ids), answer])
            yield Sample(f"{prompt.key}/{turn}", tokens, None, len(ids) - 1)


def store_texts(
    target: Target,
    texts: Iterable[Sample],
    store: StateStore,
    console: Console,
    *,
    max_tokens: int | None,
    seed: int,
    served: VllmStates | None = None,
) -> None:
    """Fill a store with texts and their states; run again after an interruption, it goes on.

    Args:
        texts: samples without states. The first are taken, so that fewer tokens are always a part of more.
        max_tokens: take no more texts after this many tokens, prompts included.
        seed: of the order in which passes are made.
        served: a server that gives the states; None: the target does.
    Raises:
        BeagleError: the disk is too small, the server gives no states of the target, or the states are not finite.
    """
    done = store.done_ids()
    todo: list[Sample] = []
    total = have = 0
    with console.status("encoding the texts"):
        for text in texts:
            total += len(text.tokens)
            if text.id in done:
                have += len(text.tokens)
            else:
                todo.append(text)
            if max_tokens and total >= max_tokens:
                break
    if not todo:
        return
    store.refuse_if_full(total - have)
    if served and store.with_states:
        served.trial(todo)
    started, made = time.perf_counter(), 0
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task("states" if store.with_states else "texts", total=total, completed=have, note="")

        def counted() -> Iterator[Sample]:
            nonlocal made
            for sample in with_states(target, todo, seed, served) if store.with_states else todo:
                made += len(sample.tokens)
                speed = made / (time.perf_counter() - started)
                progress.update(task, completed=have + made, note=f"{have + made:,} tokens, {speed:,.0f} tokens/s")
                yield sample

        store.write(counted())


def with_states(
    target: Target, texts: Sequence[Sample], seed: int, served: VllmStates | None = None
) -> Iterator[Sample]:
    """Samples with the states that one pass of the target over each gives; texts of similar length share passes.

    Args:
        seed: of the order of the passes.
        served: a server that makes the passes; None: the target does.
    Raises:
        BeagleError: the states are not finite, or the server gives none.
    """
    groups = _groups(texts, seed)
    if served is None:
        for group in groups:
            yield from _one_pass(target, group)
        return
    for group in served.ahead(groups):
        for sample in served(group):
            yield replace(sample, states=sample.states.bfloat16()) if sample.states is not None else sample


def _groups(texts: Sequence[Sample], seed: int) -> Iterator[list[Sample]]:
    """What shares a pass, in a random order: shards of all lengths."""
    shuffle = random.Random(seed)
    for at in range(0, len(texts), TOGETHER):
        groups: list[list[Sample]] = [[]]
        for text in sorted(texts[at : at + TOGETHER], key=lambda text: len(text.tokens)):
            if groups[-1] and (len(groups[-1]) + 1) * len(text.tokens) > PASS_TOKENS:
                groups.append([])
            groups[-1].append(text)
        shuffle.shuffle(groups)
        yield from groups


def _one_pass(target: Target, group: list[Sample]) -> Iterator[Sample]:
    """The group, padded to one length: no token sees those after it."""
    n = padded_tokens(group, target)
    tokens = padded(group, n, target.device)
    states = target.prefill(tokens, target.new_cache(len(group), n)).to("cpu", torch.bfloat16)
    for row, text in zip(states, group, strict=True):
        own = row[: len(text.tokens)].clone()
        refuse_not_finite(own, target, f"the answer to prompt {text.id}")
        yield replace(text, states=own)
