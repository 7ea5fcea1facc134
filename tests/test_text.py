"""Text of tokens as they come: special tokens, stop strings, and nothing held back longer than it must be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beagle.decoding.text import StopText
from beagle.drafters.base import TreePlan
from beagle.model import Model
from beagle.targets.target import Target
from conftest import Oracle, tiny_model, tiny_tokenizer

SPECIAL = 50
PROMPT = [5, 9, 33, 12]
LENGTH = 16


def words(*special: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def llama_like() -> PreTrainedTokenizerFast:
    """Pieces with spaces in front of them, bytes where no piece fits, as SentencePiece has them."""
    pieces = ["<s>", "</s>", "<|im_end|>", "▁", "▁a", "b", "▁b", "c", "\n", ".", "▁.", "é"]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate([*pieces, *(f"<0x{b:02X}>" for b in range(256))])}, []))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


def feed(tokenizer, tokens: list[int], stops: list[str], ends: bool = False) -> tuple[list[str], int, bool]:
    """The text that each token brings, and at last what was held back; the tokens used; whether it was a stop."""
    text = StopText(tokenizer, stops)
    shown, used = [], 0
    for n, token in enumerate(tokens, 1):
        piece, taken = text.add([token], ends=ends and n == len(tokens))
        shown.append(piece)
        used += taken
        if text.stopped:
            break
    return [*shown, text.finish()], used, text.stopped


def test_a_special_token_is_a_stop_string():
    tokenizer = words("w50")
    assert tokenizer.decode([5, 6, SPECIAL, 7], skip_special_tokens=True) == "w5 w6 w7"
    assert feed(tokenizer, [5, 6, SPECIAL, 7], ["w50"]) == (["", "w5 w6", "", ""], 3, True)  # w5 might become w50
    assert StopText(tokenizer, ["w50"]).add([5, 6, SPECIAL, 7]) == ("w5 w6", 3)
    assert feed(tokenizer, [5, 6, SPECIAL, 7], ["w9"]) == (["w5", " w6", "", " w7", ""], 4, False)


def test_stop_strings_around_special_tokens():
    tokenizer = llama_like()
    ids = tokenizer.convert_tokens_to_ids(["▁a", "b", "\n", "<|im_end|>", "\n", "▁a", "."])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab\n\n a."
    for stop, text, used in (
        ("\n<|im_end|>", "ab", 4),
        ("<|im_end|>\n", "ab\n", 5),
        ("\n<|im_end|>\n a", "ab", 6),
        ("b\n\n", "a", 5),  # as the text is shown
        ("a.", "ab\n\n ", 7),
    ):
        pieces, taken, stopped = feed(tokenizer, ids, [stop])
        assert ("".join(pieces), taken, stopped) == (text, used, True)
    pieces, taken, stopped = feed(tokenizer, ids, ["\n<|im_end|>\n b", "b\n."])
    assert ("".join(pieces), taken, stopped) == ("ab\n\n a.", 7, False)


def test_only_what_may_become_a_stop_string_is_held_back():
    tokenizer = llama_like()
    ids = tokenizer.convert_tokens_to_ids(["▁a", "b", "c", "▁b", "c", "\n", "b"])
    stop = "c b and much more that never comes"
    assert feed(tokenizer, ids, [stop])[0] == ["a", "b", "", "", "c b", "c\n", "b", ""]


def test_what_was_held_back_comes_at_the_end():
    tokenizer = llama_like()
    ids = tokenizer.convert_tokens_to_ids(["▁a", "b", "c"])
    assert feed(tokenizer, ids, ["bcd"]) == (["a", "", "", "bc"], 3, False)
    eos = tokenizer.eos_token_id
    assert feed(tokenizer, [*ids, eos], ["bcd"], ends=True) == (["a", "", "", "", "bc"], 4, False)
    assert feed(tokenizer, ids, ["bcd"], ends=True) == (["a", "", "", "b"], 3, False)  # c ends the answer: no text


def test_an_unfinished_character_waits_and_comes_at_the_end():
    tokenizer = llama_like()
    bytes_ = tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in "€".encode()])
    a = tokenizer.convert_tokens_to_ids("▁a")
    assert feed(tokenizer, [a, *bytes_, a], [])[0] == ["a", "", "", "€", " a", ""]
    assert "".join(feed(tokenizer, [a, *bytes_[:2]], [])[0]) == tokenizer.decode([a, *bytes_[:2]])


@settings(max_examples=200)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=20), st.lists(st.integers(1, 5), max_size=8))
def test_pieces_of_text_are_the_whole_text(tokens, sizes):
    tokenizer = llama_like_once
    text, parts, at = StopText(tokenizer), [], 0
    for size in [*sizes, len(tokens)]:
        parts.append(text.add(tokens[at : at + size])[0])
        at += size
    parts.append(text.finish())
    assert "".join(parts) == tokenizer.decode(tokens, skip_special_tokens=True)


llama_like_once = llama_like()


def test_a_long_answer_decodes_few_tokens_at_a_time(monkeypatch):
    tokenizer = llama_like()
    longest = []
    decode = type(tokenizer).decode

    def counted(self, ids, **options):
        longest.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    text = StopText(tokenizer, ["no such text"])
    for _ in range(500):
        text.add([4, 5])
    assert max(longest) <= 4


@pytest.fixture(scope="module")
def target():
    target = Target(tiny_model(), words("w50"), "tiny")
    target.eos_ids = frozenset()
    return target


def models_of(target, answer):
    return Model(target), Model(target, Oracle(answer), TreePlan("chain", depth=5))


def test_a_special_stop_ends_an_answer_with_and_without_drafts(target):
    bias = {SPECIAL: 1e6}
    plain = Model(target).generate(PROMPT, max_new_tokens=LENGTH)
    target.tokenizer.add_special_tokens({"additional_special_tokens": [f"w{plain.token_ids[7]}"]})
    first = plain.token_ids.index(plain.token_ids[7])
    stop = f"w{plain.token_ids[7]}"
    for model in models_of(target, plain.token_ids):
        for answer in (
            model.generate(PROMPT, max_new_tokens=LENGTH, stop=stop),
            model.generate_batch([PROMPT], max_new_tokens=LENGTH, stop=stop)[0],
        ):
            assert answer.token_ids == plain.token_ids[: first + 1]
            assert answer.text == target.tokenizer.decode(plain.token_ids[:first], skip_special_tokens=True)
            assert answer.finish_reason == "stop"
        assert model.generate(PROMPT, logit_bias=bias, stop="w50").text == ""


def test_reasons_of_the_end(target):
    plain = Model(target).generate(PROMPT, max_new_tokens=LENGTH)
    assert plain.finish_reason == "length"
    ids, text = plain.token_ids, plain.text
    for model in models_of(target, ids):
        for ask in (model.generate, lambda prompt, model=model, **o: model.generate_batch([prompt], **o)[0]):
            assert ask(PROMPT, max_new_tokens=LENGTH, stop=text[-3:] + " more").text == text  # nothing is lost
            last = ask(PROMPT, max_new_tokens=LENGTH, stop_token_ids=[ids[-1]])
            assert last.finish_reason == "stop"
            assert ask(PROMPT, max_new_tokens=1).finish_reason == "length"
            assert ask(PROMPT, max_new_tokens=1, stop_token_ids=ids[:1]).finish_reason == "stop"
            assert ask(PROMPT, max_new_tokens=1, stop_token_ids=ids[:1]).text == ""


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_cut_answer_keeps_what_was_held_back(target, passes):
    plain = Model(target).generate(PROMPT, max_new_tokens=LENGTH)
    for model in models_of(target, plain.token_ids):
        stream = model.stream(PROMPT, max_new_tokens=LENGTH, stop=plain.text + " and more")  # held back from the start
        pieces = [next(stream) for _ in range(passes)]
        assert not any(piece.text for piece in pieces)
        last = stream.finish()
        assert last.finish_reason == stream.finish_reason == "length"
        assert last.token_ids
        assert last.token_ids == plain.token_ids[: len(last.token_ids)]
        assert last.text == target.tokenizer.decode(last.token_ids, skip_special_tokens=True)
        assert list(stream) == []
        assert stream.finish().text == ""
