"""Text pieces and stop strings: the same however many tokens a step brings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beagle.decoding.pieces import Pieces, Stream
from beagle.decoding.sequence import Emitted
from beagle.decoding.stats import Stats
from beagle.decoding.text import StopText
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from conftest import Oracle, tiny_drafter, tiny_target, tiny_tokenizer

PROMPT = "w5 w9 w33 w12"
KINDS = ["chain", "static", "dynamic"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One byte a token, so that a character may span up to four tokens."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


WORDS, BYTES = tiny_tokenizer(), byte_tokenizer()


def chunked(tokenizer, tokens: list[int], sizes: list[int], stops: list[str]) -> tuple[str, list[int]]:
    """Text and tokens that come of ``tokens`` arriving in steps of ``sizes``."""
    steps, at = [], 0
    for size in [*sizes, len(tokens)]:
        if at < len(tokens):
            steps.append(Emitted(tokens[at : at + size], 0))
        at += size
    steps[-1] = replace(steps[-1], finish_reason="length")
    stream = Stream((step for step in steps), Pieces(StopText(tokenizer, stops), Stats()))
    pieces = list(stream)
    assert pieces[-1].finish_reason is not None
    assert all(p.finish_reason is None for p in pieces[:-1])
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.token_ids]


def expected(tokenizer, tokens: list[int], stops: list[str]) -> tuple[str, list[int]]:
    """The same, token by token."""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n], skip_special_tokens=True)
        cuts = [text.find(s) for s in stops if s in text]
        if cuts:
            return text[: min(cuts)], tokens[:n]
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens


sizes = st.lists(st.integers(1, 6), max_size=12)
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(3, 7), min_size=1, max_size=20), sizes, st.data())
def test_words_with_one_stop(tokens, sizes, data):
    text = WORDS.decode(tokens)
    a = data.draw(st.integers(0, len(text) - 1))
    stop = text[a : a + data.draw(st.integers(1, 12))]
    assert chunked(WORDS, tokens, sizes, [stop]) == expected(WORDS, tokens, [stop])
    assert chunked(WORDS, tokens, sizes, []) == (text, tokens)


@pytest.mark.parametrize("longest", [1, 4])
def test_characters_of_several_bytes(longest):
    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(st.text(characters, min_size=1, max_size=12), sizes, st.data())
    def check(text, sizes, data):
        tokens = BYTES(text)["input_ids"]
        assert chunked(BYTES, tokens, sizes, []) == (text, tokens)
        a = data.draw(st.integers(0, len(text) - 1))
        stop = text[a : a + data.draw(st.integers(1, longest))]
        assert chunked(BYTES, tokens, sizes, [stop]) == expected(BYTES, tokens, [stop])

    check()


def test_stop_that_ends_in_a_character_of_two_bytes():
    tokens = BYTES("0é")["input_ids"]
    assert chunked(BYTES, tokens, [1, 1, 1], ["0é"]) == ("", tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=16), sizes)
def test_bytes_that_are_no_text(tokens, sizes):
    assert chunked(BYTES, tokens, sizes, []) == (BYTES.decode(tokens), tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 9), min_size=1, max_size=20), sizes, st.lists(st.integers(3, 9), min_size=1, max_size=3))
def test_several_stops_of_one_word(tokens, sizes, words):
    stops = [f"w{i}" for i in words]
    assert chunked(WORDS, tokens, sizes, stops) == expected(WORDS, tokens, stops)


def test_stops_inside_one_another():
    tokens, stops = [3, 4, 5, 6, 7], ["w5 w6", "w4 w5 w6 w7"]
    assert expected(WORDS, tokens, stops) == ("w3 w4 ", [3, 4, 5, 6])
    assert chunked(WORDS, tokens, [1, 4], stops) == expected(WORDS, tokens, stops)


@pytest.fixture(scope="module")
def endless():
    target = tiny_target()
    target.eos_ids = frozenset()
    return target


@pytest.mark.parametrize("stop", [(), "w", "no such text", ["zz", "w"]], ids=str)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_streamed_pieces_make_the_answer(endless, kind, stop):
    plan = TreePlan(kind or "chain", depth=4, top_k=6, nodes=14)
    model = Model(endless, tiny_drafter(endless) if kind else None, plan)
    pieces = list(model.stream(PROMPT, max_new_tokens=20, stop=stop))
    answer = model.generate(PROMPT, max_new_tokens=20, stop=stop)
    assert "".join(p.text for p in pieces) == answer.text
    assert [t for p in pieces for t in p.token_ids] == answer.token_ids
    assert all(0 <= p.drafted <= len(p.token_ids) for p in pieces)


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_stop_ends_text_and_tokens_alike_with_drafts(endless, depth):
    plain = Model(endless).generate(PROMPT, max_new_tokens=24)
    words = plain.text.split()
    drafted = Model(endless, Oracle(plain.token_ids), TreePlan("chain", depth=depth))
    for stop in (words[3], f"{words[5]} {words[6]}", words[8][-1] + " " + words[9][:2], [words[9], words[6]]):
        answer = drafted.generate(PROMPT, max_new_tokens=24, stop=stop)
        without = Model(endless).generate(PROMPT, max_new_tokens=24, stop=stop)
        assert (answer.text, answer.token_ids) == (without.text, without.token_ids)
        assert (answer.text, answer.token_ids) == expected(
            WORDS, plain.token_ids, [stop] if isinstance(stop, str) else stop
        )
        assert len(answer.token_ids) < 24


def test_answers_of_forks_take_turns(endless):
    model = Model(endless, tiny_drafter(endless), TreePlan("dynamic", depth=3, top_k=4, nodes=8))
    prompts = [PROMPT, "w7", "w40 w41 w42 w9"]
    alone = [model.generate(prompt, max_new_tokens=20).text for prompt in prompts]
    streams = [model.stream(prompt, max_new_tokens=20) for prompt in prompts]
    texts = [""] * len(prompts)
    running = list(range(len(prompts)))
    while running:
        for i in list(running):
            piece = next(streams[i], None)
            if piece is None:
                running.remove(i)
            else:
                texts[i] += piece.text
    assert texts == alone


def test_prompts_of_token_ids_and_what_is_no_prompt(endless):
    model = Model(endless)
    ids = endless.tokenizer(PROMPT)["input_ids"]
    assert model.generate(ids, max_new_tokens=8).text == model.generate(PROMPT, raw=True, max_new_tokens=8).text
    for bad in ([3, 64], [-1], "\ud800", [{"role": "user", "content": "\ud800"}], []):
        with pytest.raises(BeagleError):
            model.generate(bad)


def test_drafted_counts_follow_the_statistics(endless):
    plain = Model(endless).generate(PROMPT, max_new_tokens=21)
    model = Model(endless, Oracle(plain.token_ids), TreePlan("chain", depth=3))
    pieces = list(model.stream(PROMPT, max_new_tokens=21))
    assert sum(p.drafted for p in pieces) == 15  # five passes, three drafted tokens each
