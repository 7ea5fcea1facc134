"""Log-probabilities as the server tells them: whole characters or parts of some, ties, texts of two tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from beagle.decoding.sequence import Step
from beagle.decoding.text import StopText
from beagle.model import Model, Piece
from beagle.serving.engine import Limits
from beagle.serving.token_texts import TokenTexts, first_characters, shown, token_bytes
from beagle.serving.watching import Watcher
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import tiny_target
from serving import events, follow, serving

ROCKET = "🚀".encode()


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, the first two of 🚀 merged, a word with its space, and an end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    of = bytes_to_unicode()
    pair, word = of[0xF0] + of[0x9F], of[0x20] + "a"
    vocabulary = {token: i for i, token in enumerate([*letters, pair, word])}
    inner = Tokenizer(models.BPE(vocabulary, [(of[0xF0], of[0x9F]), (of[0x20], "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama's decoder: ``▁`` for a space, bytes ``<0xF0>``, and the answer's first space stripped."""
    pieces = ["<unk>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "▁a", "a", "b", "你", "é"]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def wordpiece() -> PreTrainedTokenizerFast:
    pieces = ["[UNK]", "[SEP]", "play", "##ing", "##é", ".", ",", "你", "don", "'", "t", "🚀"]
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="[SEP]")


KINDS = {"byte-level": byte_level(), "SentencePiece": sentencepiece(), "WordPiece": wordpiece()}


def ids_of(tokenizer, *names: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


def contents(tokenizer, tokens: list[int]) -> list[bytes]:
    texts = TokenTexts(tokenizer)
    return [texts.add(token).content for token in tokens]


def test_an_emoji_of_three_byte_level_tokens():
    tokenizer = KINDS["byte-level"]
    tokens = tokenizer("🚀 a🚀é")["input_ids"]
    texts = TokenTexts(tokenizer)
    found = [texts.add(token) for token in tokens]
    assert [list(f.content) for f in found[:4]] == [[240, 159], [154], [128], [32, 97]]
    assert [f.text for f in found] == [
        "bytes:\\xf0\\x9f", "bytes:\\x9a", "bytes:\\x80", " a",
        "bytes:\\xf0\\x9f", "bytes:\\x9a", "bytes:\\x80", "bytes:\\xc3", "bytes:\\xa9",
    ]  # fmt: skip
    assert [f.start for f in found] == [0, 0, 0, 1, 3, 3, 3, 4, 4]
    assert [f.end for f in found] == [1, 1, 1, 3, 4, 4, 4, 5, 5]


def test_an_emoji_of_sentencepiece_bytes():
    tokenizer = KINDS["SentencePiece"]
    tokens = ids_of(tokenizer, "▁a", "<0xF0>", "<0x9F>", "<0x9A>", "<0x80>", "▁a", "你", "<0x0A>", "</s>")
    texts = TokenTexts(tokenizer)
    found = [texts.add(token) for token in tokens]
    assert [f.content for f in found] == [
        b"a",
        *[ROCKET[i : i + 1] for i in range(4)],
        b" a",
        "你".encode(),
        b"\n",
        b"",
    ]
    assert [f.start for f in found] == [0, 1, 1, 1, 1, 2, 4, 5, 6]
    assert found[-1].text == "</s>"


def test_words_get_the_spaces_between_them():
    tokenizer = KINDS["WordPiece"]
    assert contents(tokenizer, ids_of(tokenizer, "play", "##ing", "🚀", "[SEP]")) == [
        b"play",
        b"ing",
        b" " + ROCKET,
        b"",
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_bytes_join_to_the_text(kind, data):
    """Of any tokens whose text is whole, as it is streamed."""
    tokenizer = KINDS[kind]
    if kind == "byte-level":
        text = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
        tokens = tokenizer(text)["input_ids"]
    else:
        parts = [[i] for i in range(2, len(tokenizer)) if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
        if kind == "SentencePiece":
            parts += [
                ids_of(tokenizer, *[f"<0x{b:02X}>" for b in c.encode()]) for c in ("🚀", "é", "你", "\n", "\u0300")
            ]
        tokens = [token for part in data.draw(st.lists(st.sampled_from(parts), max_size=10)) for token in part]
    decoder = StopText(tokenizer)
    text = decoder.add(tokens)[0] + decoder.finish()
    texts = TokenTexts(tokenizer)
    looked, added = [], []
    for token in tokens:
        looked.append(texts.look(token))
        added.append(texts.add(token))
    assert looked == added
    assert b"".join(f.content for f in added).decode() == text
    for f in added:
        if not f.text.startswith("bytes:"):
            assert text[f.start : f.end].encode() == f.content
        else:
            assert f.content in text[f.start : f.end].encode()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=1), min_size=1, max_size=8))
def test_bytes_that_are_no_text_stay_what_they_are(data):
    tokenizer = KINDS["byte-level"]
    tokens = [tokenizer.convert_tokens_to_ids(bytes_to_unicode()[byte[0]]) for byte in data]
    assert b"".join(contents(tokenizer, tokens)) == b"".join(data)


def test_names_and_bytes():
    assert token_bytes("<0xF0>", frozenset()) is None
    assert token_bytes("<0xF0>", frozenset(["ByteFallback"])) == b"\xf0"
    assert token_bytes("Ġa", frozenset(["ByteLevel"])) == b" a"
    assert token_bytes("你", frozenset(["ByteLevel"])) == "你".encode()  # an added token
    assert shown(b"\x9f\x9a") == "bytes:\\x9f\\x9a"
    assert shown("é".encode()) == "é"
    assert [first_characters(b"\x9aab", n) for n in (-1, 0, 1, 2, 3, 4)] == [
        b"",
        b"",
        b"\x9a",
        b"\x9aa",
        b"\x9aab",
        b"\x9aab",
    ]


# served

LETTERS = bytes_to_unicode()
NAMES = ("Ġa", LETTERS[0xF0] + LETTERS[0x9F], LETTERS[0x9A], LETTERS[0x80])
SPACED, PAIR, MID, END = ids_of(KINDS["byte-level"], *NAMES)


def rockets() -> Target:
    """Answers `` a🚀 a🚀…``; other parts of characters are likely too."""
    target = tiny_target(vocab_size=272)
    target.tokenizer = KINDS["byte-level"]
    target.eos_ids = frozenset([target.tokenizer.eos_token_id])
    scores = torch.zeros(272, 272)
    scores[:, SPACED] = 9.0
    for before, after in ((SPACED, PAIR), (PAIR, MID), (MID, END)):
        scores[before, after] = 12.0
        scores[before, [*ids_of(target.tokenizer, LETTERS[0xF0], LETTERS[0xC3])]] = torch.tensor([11.0, 10.0])
    follow(target, scores)
    return target


@pytest.fixture(scope="module")
def served():
    with serving(target=rockets()) as running:
        yield running


WAYS = {
    "limit": {"max_tokens": 9},
    "inside a character": {"max_tokens": 7},
    "stop": {"max_tokens": 20, "stop": "🚀 a"},
    "stop inside a token": {"max_tokens": 20, "stop": ["a🚀 "]},
    "stop token": {"max_tokens": 20, "stop_token_ids": [END]},
    "stop in the end": {"max_tokens": 8, "stop": ["a🚀 a🚀🚀"]},
}


def chat_logprobs(served, stream, **options):
    """Text and tokens of a chat."""
    if not stream:
        choice = served.post(messages=[{"role": "user", "content": "a"}], logprobs=True, **options).json()["choices"][0]
        return choice["message"]["content"], choice["logprobs"]["content"]
    choices = events(served.post(messages=[{"role": "user", "content": "a"}], logprobs=True, stream=True, **options))
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text, [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]


def completion_logprobs(served, stream, **options):
    """Text and OpenAI's four lists of a completion."""
    answer = served.post("/v1/completions", messages=..., prompt="a", stream=stream, **{"logprobs": 4, **options})
    choices = events(answer) if stream else answer.json()["choices"]
    lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in choices:
        for name in lists:
            lists[name] += (choice["logprobs"] or {}).get(name) or []
    return "".join(choice["text"] for choice in choices), lists


@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_served_bytes_join_to_the_text(served, way, stream, draft):
    options = {**WAYS[way], "beagle": {"draft": draft}}
    expected = served.model.generate("a", raw=True, draft=draft, **as_library(WAYS[way]))
    text, tokens = chat_logprobs(served, stream, **options, top_logprobs=3)
    assert text == expected.text
    assert b"".join(bytes(t["bytes"]) for t in tokens).decode(errors="replace") == text
    assert len(tokens) == len(expected.token_ids)
    names = [" a", "bytes:\\xf0\\x9f", "bytes:\\x9a", "bytes:\\x80"] * 5
    assert [t["token"] for t in tokens] == names[: len(tokens)]
    for token in tokens:
        assert next(t["token"] for t in token["top_logprobs"]) == token["token"]
        assert len({t["token"] for t in token["top_logprobs"]}) == len(token["top_logprobs"]) == 3

    text, lists = completion_logprobs(served, stream, **options)
    assert text == expected.text
    assert lists["tokens"] == [t["token"] for t in tokens]
    assert lists["token_logprobs"] == [t["logprob"] for t in tokens]
    joined = b"".join(bytes(t["bytes"]) for t in tokens)
    before = [len(b"".join(bytes(t["bytes"]) for t in tokens[:n]).decode(errors="ignore")) for n in range(len(tokens))]
    assert joined
    assert lists["text_offset"] == before
    for token, logprob, top in zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 4


def as_library(options):
    return {"max_new_tokens" if name == "max_tokens" else name: value for name, value in options.items()}


def watched(target, token, *, top, others=()):
    """A watcher's log-probabilities of ``token`` behind SPACED."""
    watcher = Watcher(target, top=top, trees=False)
    states = target.prefill(torch.tensor([[SPACED]]), target.new_cache(1, 8))[0]
    watcher(Step([SPACED], TreeShape([-1]), states, target.logits(states), [0]))
    return watcher.take(Piece("", [token], 0, "length"))[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [5, 60, 200, 250])
def test_of_equals_the_chosen_token_comes_first(dtype, chosen):
    target = rockets()
    scores = torch.zeros(272, 272)
    scores[SPACED, 5:252] = 4.0
    follow(target, scores.to(dtype))
    told = watched(target, chosen, top=3)
    assert told.top[0].token == told.token
    assert {t.logprob for t in told.top[:3]} == {told.logprob}
    assert len(told.top) >= 3


def test_an_unlikely_chosen_token_is_among_the_others():
    told = watched(rockets(), 7, top=2)
    assert [t.token for t in told.top][-1] == told.token
    assert told.top[-1].logprob == told.logprob < told.top[1].logprob
    assert len(told.top) == 3


def test_tokens_of_one_text_stay_apart():
    """At an answer's start ``▁a`` and ``a`` are the same text."""
    target = tiny_target(vocab_size=272)
    target.tokenizer = KINDS["SentencePiece"]
    word, bare, byte = ids_of(target.tokenizer, "▁a", "a", "<0x61>")
    scores = torch.zeros(272, 272)
    scores[:, word], scores[:, bare], scores[:, byte] = 8.0, 9.0, 7.0
    follow(target, scores)
    model = Model(target)
    for options, own in (({}, "a"), ({"logit_bias": {word: 5.0}}, "a")):
        watcher = Watcher(target, top=3, trees=False)
        tokens = [t for p in model.stream([5], max_new_tokens=1, watch=watcher, **options) for t in watcher.take(p)[0]]
        top = {t.token: t.logprob for t in tokens[0].top}
        assert len(top) == 3
        assert top[own] == tokens[0].logprob
        assert sorted(top.values(), reverse=True) == list(top.values())
        assert {t.content for t in tokens[0].top} == {b"a"}


def test_a_continued_text_keeps_its_space():
    target = tiny_target(vocab_size=272)
    target.tokenizer = KINDS["SentencePiece"]
    target.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (word,) = ids_of(target.tokenizer, "▁a")
    scores = torch.zeros(272, 272)
    scores[:, word] = 9.0
    follow(target, scores)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with serving(target=target) as running:
        for continues, text in ((True, " a a a"), (False, "a a a")):
            options = {"max_tokens": 3, "logprobs": True, "continue_final_message": continues}
            choice = running.post(messages=messages, **options).json()["choices"][0]
            assert choice["message"]["content"] == text
            assert b"".join(bytes(t["bytes"]) for t in choice["logprobs"]["content"]) == text.encode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_cut_answer_keeps_the_logprobs_held_back(stream):
    """Of text that might have become a stop string."""
    with serving(Limits(seconds=0.6), target=rockets(), plain=True, slow=0.05) as running:
        options = {"max_tokens": 200, "stop": " a🚀" * 60 + "b"}
        for text, tokens, made in (
            (*chat_logprobs(running, stream, **options), None),
            (*completion_logprobs(running, stream, **options), "lists"),
        ):
            found = len(tokens if made is None else tokens["tokens"])
            assert 0 < found < 200
            expected = running.model.generate("a", raw=True, draft=False, max_new_tokens=found).text
            assert text == expected
            if made is None:
                assert b"".join(bytes(t["bytes"]) for t in tokens).decode(errors="replace") == text


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("draft", [True, False])
def test_the_greedy_token_is_the_likeliest_in_half_precision(exact, draft):
    with serving(target=tiny_target(dtype=torch.bfloat16), exact=exact) as running:
        for prompt in ("w3", "w5 w9 w33", "w40 w7"):
            answer = running.post(
                messages=[{"role": "user", "content": prompt}], max_tokens=30, ignore_eos=True,
                logprobs=True, top_logprobs=2, beagle={"draft": draft},
            ).json()  # fmt: skip
            tokens = answer["choices"][0]["logprobs"]["content"]
            assert len(tokens) == 30
            for token in tokens:
                assert token["top_logprobs"][0]["token"] == token["token"]
                assert token["top_logprobs"][0]["logprob"] == token["logprob"]
