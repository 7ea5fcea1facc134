"""Where the answers of a dialogue stand among its tokens, whatever chat template renders it.

Each answer is taken in the dialogue that ends with it: so it stands behind what the model is asked with there, as a
template renders earlier turns then (without their thinking, say).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from beagle.errors import BeagleError
from beagle.targets.chat import Message, encode, encode_ended
from beagle.targets.target import Target


class InseparableError(BeagleError):
    """A chat template renders an answer in a way that hides which tokens are the answer's."""


def answered(dialogue: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The dialogue up to each answer that something was asked before."""
    asked = False
    for end, message in enumerate(dialogue, 1):
        if message["role"] == "assistant":
            if asked and (str(message.get("content") or "").strip() or message.get("tool_calls")):
                yield dialogue[:end]
        elif message["role"] != "system":
            asked = True


def last_answer(target: Target, dialogue: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of the last message, an answer of the assistant's, and of what comes before it.

    The answer begins where the prompt that asks for it ends, or, where the template says so, at its mark
    (``{% generation %}``). It ends before the first token that ends an answer.

    Returns:
        Ids before the answer, and the answer's, without the token that ends it.

    Raises:
        InseparableError: the template hides which tokens are the answer's.
        BeagleError: the template refuses the dialogue.
    """
    asked = encode(target, dialogue[:-1])
    whole, marked = encode_ended(target, dialogue)
    extends = whole[: len(asked)] == asked
    if marked is not None:
        start, end = _last_marked(target, dialogue, marked, len(asked) if extends else None)
    elif extends:
        start, end = len(asked), len(whole)
    else:
        raise _inseparable(target)
    before, answer = whole[:start], whole[start:end]
    ends = [at for at, token in enumerate(answer) if token in target.eos_ids]
    if ends or marked is not None:
        return before, answer[: ends[0]] if ends else answer
    if dialogue[-1].get("tool_calls"):
        raise _inseparable(target)
    cut = encode(target, dialogue, continue_final_message=True)  # the template ends answers with other words
    if cut[:start] != before:
        raise _inseparable(target)
    return before, cut[start:]


def _last_marked(target: Target, dialogue: Sequence[Message], marked: list[bool], asked: int | None) -> tuple[int, int]:
    """Where the marked tokens of the last message begin and end.

    Args:
        asked: number of tokens that ask for the last message, if it is rendered behind just these.
    """
    if asked is not None:
        found = [run for run in _runs(marked) if run[1] > asked]
        if len(found) == 1 and found[0][0] >= asked:
            return found[0]
    else:
        _, earlier = encode_ended(target, dialogue[:-1])
        found = _runs(marked)
        if len(found) == len(_runs(earlier or [])) + 1:
            return found[-1]
    raise _inseparable(target)


def _runs(marked: list[bool]) -> list[tuple[int, int]]:
    """Beginning and end of each stretch of marked tokens."""
    edges = [at for at, (one, other) in enumerate(zip([False, *marked], [*marked, False], strict=True)) if one != other]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _inseparable(target: Target) -> InseparableError:
    return InseparableError(
        f"the chat template of {target.name} doesn't show which tokens are the answer's; put {{% generation %}} and "
        "{% endgeneration %} around answers in the template, or let the target answer (answers.source: target)"
    )
