"""What a server with OpenAI's API answers, read as token ids of the target."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field

from beagle.targets.target import Target


class UnusableError(Exception):
    """An answer can't be trained on; the message is why."""


class Message(BaseModel):
    content: str | None = None


class Choice(BaseModel):
    """An answer: ``message`` in a chat, ``text`` in a completion."""

    finish_reason: str | None = None
    message: Message | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Reply(BaseModel):
    """What is read of a server's reply. Token ids are vLLM's addition (``return_token_ids``)."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


def answer_tokens(reply: Reply, target: Target, ids: list[int], most: int) -> tuple[list[int], bool]:
    """Token ids of an answer, with the one that ends it, and whether it ended.

    Raises:
        UnusableError: the server read another prompt, ended the answer for a reason of its own, or gives a text whose
            tokens can't be known.
    """
    choice, usage = reply.choices[0], reply.usage or Usage()
    _refuse_other_prompt(reply.prompt_token_ids or choice.prompt_token_ids, usage.prompt_tokens, ids)
    if choice.finish_reason not in ("stop", "eos_token", "length"):
        raise UnusableError(f"the server ended it with finish_reason {choice.finish_reason!r}")
    ended = choice.finish_reason != "length"
    tokens = choice.token_ids
    if tokens is None:
        text = (choice.message.content if choice.message else choice.text) or ""
        tokens = _tokenised(target, text, usage.completion_tokens, ended)
    elif not all(0 <= token < target.vocab_size for token in tokens):
        raise UnusableError("the server has another tokenizer: its answer has tokens that the target lacks")
    if not ended and len(tokens) < most:
        raise UnusableError("the server cut the answer before it was as long as was asked for")
    if ended and not (tokens and tokens[-1] in target.eos_ids):
        own = target.tokenizer.eos_token_id
        tokens = [*tokens, own if own in target.eos_ids else min(target.eos_ids, default=own)]
    return tokens[:most], ended


def _refuse_other_prompt(theirs: list[int] | None, count: int | None, ids: list[int]) -> None:
    """Refuse an answer to other tokens than the target's, as far as the server tells them or their number."""
    what = "the server has another tokenizer or chat template: it encodes the prompt as"
    if theirs is not None and theirs != ids:
        raise UnusableError(f"{what} {len(theirs)} tokens, which are not the target's {len(ids)}")
    if theirs is None and count and count != len(ids):
        raise UnusableError(f"{what} {count} tokens, and the target as {len(ids)}")


def _tokenised(target: Target, text: str, count: int | None, ended: bool) -> list[int]:
    """The tokens of a text that stands for ``count`` of them, the one that ends it perhaps among them."""
    tokens = list(target.tokenizer(text, add_special_tokens=False)["input_ids"])
    again = target.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    if again != text or (count is not None and count not in (len(tokens), len(tokens) + ended)):
        raise UnusableError("the server gives no token ids, and its text tokenised again is another answer")
    return tokens


def agreeing(target: Target, ids: list[int], tokens: list[int]) -> int:
    """How many tokens of a greedy answer are those that the target itself chooses behind the ones before them.

    Tokens that end an answer count as one: a text doesn't tell which it was.
    """
    whole = torch.tensor([*ids, *tokens[:-1]], device=target.device)
    states = target.prefill(whole[None], target.new_cache(1, len(whole)))[0, len(ids) - 1 :]
    chosen = target.logits(states).argmax(-1).tolist()
    ends = target.eos_ids
    return sum(own == token or (own in ends and token in ends) for own, token in zip(chosen, tokens, strict=True))
