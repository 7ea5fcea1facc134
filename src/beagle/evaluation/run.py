"""The side-by-side run: every mode on every question, interleaved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from beagle.errors import BeagleError
from beagle.evaluation.first_divergence import first_divergence
from beagle.evaluation.modes import Options, System
from beagle.evaluation.peak_memory import peak_memory_mb, reset_peak_memory
from beagle.evaluation.records import Record, Turn
from beagle.memory import finish_huge_pages
from beagle.targets.chat import Message, encode
from beagle.targets.target import Target
from beagle.training.prompts import Prompt

Sets = Mapping[str, Sequence[Prompt]]
WARM_UP = Prompt("warm-up", ("Say hello.",))


def run(
    systems: Sequence[System],
    sets: Sets,
    options: Options,
    *,
    repeats: int = 1,
    done: Collection[tuple[str, str]] = (),
    pieces: bool = False,
) -> Iterator[list[Record]]:
    """Every mode on every question, in an order that rotates with question and repeat.

    All modes get the same seed for the same question and repeat. Yields the records of a question
    as soon as every mode has answered it, so that whoever stores them loses less than a question.
    A question that can't be answered ends the run with a BeagleError that names it.
    """
    refuse_turns_without_template(systems, sets)
    if all((name, prompt.id) in done for name, prompts in sets.items() for prompt in prompts):
        return
    finish_huge_pages()
    for system in systems:
        ask(system, "", WARM_UP, replace(options, max_new_tokens=8, temperature=0.0), 0)
    for name, prompts in sets.items():
        for i, prompt in enumerate(prompts):
            if (name, prompt.id) in done:
                continue
            records = []
            for repeat in range(repeats):
                for j in range(len(systems)):
                    system = systems[(i + repeat + j) % len(systems)]
                    try:
                        records.append(ask(system, name, prompt, options, repeat))
                    except BeagleError as error:
                        raise BeagleError(f"question '{prompt.id}' of {name}: {error}") from error
            order = [system.mode for system in systems]
            records.sort(key=lambda record: (record.repeat, order.index(record.mode)))
            target = systems[0].model.target
            if not options.temperature:
                records = compared(target, prompt, records)
            if pieces:  # repeats say the same, or are there for their times
                records = [record if record.repeat else with_pieces(target, record) for record in records]
            yield records


def ask(system: System, name: str, prompt: Prompt, options: Options, repeat: int) -> Record:
    """One mode's answers to all turns of a question; its own answers stand between them."""
    turns: list[Turn] = []
    before = reset_peak_memory()
    for n in range(len(prompt.turns)):
        asked = next_question(system.model.target, prompt, turns[:n])
        turns.append(Turn(*system.answer(asked, options, options.seed + repeat)))
    peak = peak_memory_mb()
    growth = max(0.0, peak - before)
    return Record(name, prompt.id, prompt.category, system.mode, repeat, turns, round(peak, 1), round(growth, 1))


def next_question(target: Target, prompt: Prompt, answered: Sequence[Turn]) -> str | list[Message]:
    """The turn that comes after those answered, with all that stands before it."""
    if not answered and not prompt.system:
        return prompt.turns[0]
    return prompt.messages([str(target.tokenizer.decode(turn.ids, skip_special_tokens=True)) for turn in answered])


def compared(target: Target, prompt: Prompt, records: list[Record]) -> list[Record]:
    """The records with their first difference from plain decoding; later turns' contexts differ after it."""
    plain = {record.repeat: record for record in records if record.mode == "plain"}
    out = []
    for record in records:
        reference = plain.get(record.repeat)
        difference: dict[str, Any] | None = None
        for n, turn in enumerate(record.turns if reference else ()):
            assert reference is not None
            if turn.ids == reference.turns[n].ids:
                continue
            asked = encode(target, next_question(target, prompt, record.turns[:n]))
            found = first_divergence(target, asked, turn.ids, reference.turns[n].ids)
            difference = {"turn": n, **(found or {})}
            break
        out.append(replace(record, difference=difference))
    return out


def with_pieces(target: Target, record: Record) -> Record:
    """The record with each token's text; what completes a character of several tokens goes to its last one."""
    turns = []
    for turn in record.turns:
        pieces, shown = [], 0
        for n in range(1, len(turn.ids) + 1):
            text = str(target.tokenizer.decode(turn.ids[:n], skip_special_tokens=True))
            end = len(text) if n == len(turn.ids) else len(text.rstrip("\ufffd"))
            pieces.append(text[shown:end])
            shown = max(shown, end)
        turns.append(replace(turn, pieces=pieces))
    return replace(record, turns=turns)


def refuse_turns_without_template(systems: Sequence[System], sets: Sets) -> None:
    """Refuse second turns and system messages where the target has no form for them."""
    target = systems[0].model.target
    if getattr(target.tokenizer, "chat_template", None):
        return
    for name, prompts in sets.items():
        for prompt in prompts:
            if len(prompt.turns) > 1 or prompt.system:
                what = "several turns" if len(prompt.turns) > 1 else "a system message"
                raise BeagleError(
                    f"question '{prompt.id}' of {name} has {what}, but the tokenizer of {target.name} has no "
                    "chat template; choose an instruction-tuned target or questions of one turn"
                )
