"""Dialogues that bring their answers: which of their tokens are answers under any chat template, and what files hold them."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beagle.errors import BeagleError
from beagle.targets.target import Target
from beagle.training.dialogues import InseparableError, answered, last_answer
from beagle.training.make_answers import divided, make_answers
from beagle.training.prompts import Prompt, parse_prompt, read_prompts
from beagle.training.recipe import AnswerConfig
from beagle.training.states import open_shard, read_shard
from conftest import tiny_model, tiny_target

CONFIG = AnswerConfig(
    rows=4, max_prompt_tokens=90, max_new_tokens=40, max_turns=3, sampled_share=0.0, source="given", states="live"
)

# The templates are ours, in the manner of those that models come with. Words are joined by spaces.
CHATML = (
    "{% for m in messages %}<im_start> {{ m['role'] }} {{ m['content'] or '' }} "
    "{% for call in m['tool_calls'] or [] %}<tool_call> {{ call['function']['name'] }} </tool_call> {% endfor %}"
    "<im_end> {% endfor %}{% if add_generation_prompt %}<im_start> assistant {% endif %}"
)
# thinking stays in the last answer alone; earlier turns drop it
THINKING = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "<im_start> {{ m['role'] }} {{ text }} <im_end> {% endfor %}"
    "{% if add_generation_prompt %}<im_start> assistant {% endif %}"
)
# asks with an opened thought that it doesn't render
OPENS_A_THOUGHT = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}<im_start> assistant {{ text.split('</think>')[-1].strip() }} <im_end> "
    "{% else %}<im_start> {{ m['role'] }} {{ text }} <im_end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<im_start> assistant <think> {% endif %}"
)
# ends an answer with a word that is no end token
WORDS = (
    "{% for m in messages %}{{ 'Q' if m['role'] == 'user' else 'A' }} {{ m['content'] }} ; {% endfor %}"
    "{% if add_generation_prompt %}A {% endif %}"
)


def marked(template: str, role: str = "m['role'] == 'assistant'") -> str:
    """The template with its own marks around what an assistant says, the end token among it."""
    said = "{{ m['content'] or '' }} " if "or ''" in template else "{{ text }} "
    start, end = template.index(said), template.index("<im_end> ") + len("<im_end> ")
    inner = template[start:end]
    return f"{template[:start]}{{% if {role} %}}{{% generation %}}{inner}{{% endgeneration %}}{{% else %}}{inner}{{% endif %}}{template[end:]}"


def spoken(template: str) -> Target:
    """A target whose tokenizer has a token for each word of the tests, and this template."""
    words = ["<pad>", "<s>", "<im_end>", "<im_start>", "user", "assistant", "system", "tool", "<think>", "</think>"]
    words += ["<tool_call>", "</tool_call>", "Q", "A", ";"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(64 - len(words)))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<im_end>", bos_token="<s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    target = Target(tiny_model(), tokenizer, "spoken")
    target.eos_ids = frozenset({2})
    return target


def words(target: Target, ids) -> str:
    return " ".join(target.tokenizer.convert_ids_to_tokens(list(map(int, ids))))


def said(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


TURNS = [
    said("system", "w40"),
    said("user", "w1 w2"),
    said("assistant", "w3 w4 w5"),
    said("user", "w6"),
    said("assistant", "w7"),
]
THOUGHTS = [
    said("user", "w1 w2"),
    said("assistant", "<think> w30 w31 </think> w3 w4"),
    said("user", "w6"),
    said("assistant", "<think> w32 </think> w7"),
]
TOOLS = [
    said("user", "w1"),
    said("assistant", None, tool_calls=[{"type": "function", "function": {"name": "w20", "arguments": {}}}]),
    said("tool", "w21 w22"),
    said("assistant", "w3"),
]


def split(target: Target, dialogue) -> list[tuple[str, str]]:
    found = [last_answer(target, part) for part in answered(dialogue)]
    return [(words(target, before), words(target, answer)) for before, answer in found]


SYSTEM = "<im_start> system w40 <im_end> <im_start> user w1 w2 <im_end> <im_start> assistant"
USER = "<im_start> user w1 w2 <im_end> <im_start> assistant"
CALL = "<im_start> user w1 <im_end> <im_start> assistant"
EXPECTED = {
    "turns": (CHATML, TURNS, [
        (SYSTEM, "w3 w4 w5"),
        (f"{SYSTEM} w3 w4 w5 <im_end> <im_start> user w6 <im_end> <im_start> assistant", "w7"),
    ]),
    "thinking": (THINKING, THOUGHTS, [
        (USER, "<think> w30 w31 </think> w3 w4"),
        (f"{USER} w3 w4 <im_end> <im_start> user w6 <im_end> <im_start> assistant", "<think> w32 </think> w7"),
    ]),
    "tools": (CHATML, TOOLS, [
        (CALL, "<tool_call> w20 </tool_call>"),
        (f"{CALL} <tool_call> w20 </tool_call> <im_end> <im_start> tool w21 w22 <im_end> <im_start> assistant", "w3"),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("marks", [False, True], ids=["unmarked", "marked"])
@pytest.mark.parametrize("name", EXPECTED)
def test_answers_stand_where_the_template_puts_them(name, marks):
    """By the rule for any template, and by the marks of one that has them: the same tokens."""
    template, dialogue, expected = EXPECTED[name]
    target = spoken(marked(template) if marks else template)
    assert split(target, dialogue) == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_the_rule_agrees_with_the_marks_of_transformers(name):
    template, dialogue, _ = EXPECTED[name]
    unmarked, target = spoken(template), spoken(marked(template))
    for part in answered(dialogue):
        encoded = target.tokenizer.apply_chat_template(part, return_dict=True, return_assistant_tokens_mask=True)
        before, answer = last_answer(unmarked, part)
        mask = encoded["assistant_masks"]
        assert encoded["input_ids"][: len(before) + len(answer)] == before + answer
        assert mask[len(before) :] == [1] * (len(answer) + 1)  # the end token, too
        assert mask[len(before) - 1] == 0


def test_an_answer_that_ends_in_no_end_token_ends_with_its_text():
    talk = [said("user", "w1"), said("assistant", "w3 w4"), said("user", "w5"), said("assistant", "w6")]
    assert split(spoken(WORDS), talk) == [("Q w1 ; A", "w3 w4"), ("Q w1 ; A w3 w4 ; Q w5 ; A", "w6")]


def test_marks_tell_what_the_prompt_does_not():
    """A template that asks with a thought that it doesn't render: only its marks show where an answer begins."""
    with pytest.raises(
        InseparableError, match=r"of spoken doesn't show which tokens .*\{% generation %\}.*source: target"
    ):
        split(spoken(OPENS_A_THOUGHT), THOUGHTS)
    start, end = "{{ text.split('</think>')[-1].strip() }} ", "<im_end> {% else"
    with_marks = OPENS_A_THOUGHT.replace(
        start + end, "{% generation %}" + start + "<im_end> {% endgeneration %}{% else"
    )
    assert split(spoken(with_marks), THOUGHTS) == [
        (USER, "w3 w4"),
        (f"{USER} w3 w4 <im_end> <im_start> user w6 <im_end> <im_start> assistant", "w7"),
    ]


def test_marks_with_a_gap_are_refused():
    """Two stretches of one answer: neither is the whole."""
    gap = CHATML.replace("{{ m['content'] or '' }} ", "{% generation %}{{ m['content'] }} {% endgeneration %} w50 ")
    gap = gap.replace("<im_end> {% endfor", "{% generation %}<im_end> {% endgeneration %}{% endfor")
    with pytest.raises(InseparableError):
        last_answer(spoken(gap), [said("user", "w1"), said("assistant", "w3")])


def test_what_answers_nothing_is_no_answer():
    assert list(answered([said("assistant", "w1"), said("user", "w2"), said("assistant", " ")])) == []
    assert (
        len(
            list(answered([said("system", "w1"), said("user", "w2"), said("assistant", "w3"), said("assistant", "w4")]))
        )
        == 2
    )


# a store of them


def fill(target, prompts, folder, config=CONFIG, **options):
    out = io.StringIO()
    store = make_answers(target, prompts, folder, config, Console(file=out, width=500), **options)
    return store, out.getvalue()


def stored(store) -> dict[str, tuple[int, list[int]]]:
    """First slot with a loss and tokens, by id."""
    found = {}
    for path in store.shards():
        content = read_shard(path)
        with open_shard(path) as file:
            ids = json.loads(file.metadata()["ids"])
        parts = content["tokens"].tensor_split(content["offsets"][1:-1])
        for name, part, first in zip(ids, parts, content["answer_from"].tolist(), strict=True):
            found[name] = first, part.tolist()
    return found


@pytest.fixture
def nothing_is_generated(monkeypatch):
    def refuse(*_):
        raise AssertionError("the target generates")

    monkeypatch.setattr("beagle.training.make_answers._Filling.answer", refuse)


@pytest.mark.usefixtures("nothing_is_generated")
def test_every_answer_of_a_dialogue_is_a_sample(tmp_path):
    target = spoken(CHATML)
    prompt = parse_prompt({"messages": [said("system", "w40"), *TOOLS]}, 1, given=True)
    store, _ = fill(target, [prompt], tmp_path)
    asked = "<im_start> system w40 <im_end> " + CALL
    texts = [f"{asked} <tool_call> w20 </tool_call>"]
    texts.append(f"{texts[0]} <im_end> <im_start> tool w21 w22 <im_end> <im_start> assistant w3")
    found = stored(store)
    assert [words(target, found[f"{prompt.key}/{turn}"][1]) for turn in (0, 1)] == texts
    assert [len(tokens) - first - 1 for first, tokens in found.values()] == [3, 1]


@pytest.mark.usefixtures("nothing_is_generated")
def test_dialogues_that_cannot_be_split_are_counted(tmp_path):
    """The last answer of one dialogue reads like its prompt; the other's don't."""
    template = OPENS_A_THOUGHT.replace(
        "<im_start> assistant <think> ", "<im_start> assistant {% if messages|length > 1 %}<think> {% endif %}"
    )
    target = spoken(template)
    whole, odd = ({"messages": talk} for talk in (TURNS[1:3], TURNS))
    prompts = [parse_prompt(row, n, given=True) for n, row in enumerate((whole, odd), 1)]
    store, printed = fill(target, prompts, tmp_path / "some")
    assert set(stored(store)) == {f"{prompts[0].key}/0"}
    assert "1 dialogues are left out; prompt '2': the chat template of spoken doesn't show which tokens" in printed
    with pytest.raises(BeagleError, match="prompt '2': the chat template of spoken doesn't show") as caught:
        fill(target, prompts[1:], tmp_path / "none")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("nothing_is_generated")
def test_a_text_bears_a_loss_from_its_second_prediction_on_and_long_ones_are_cut(tmp_path):
    target = spoken(CHATML)
    text = " ".join(f"w{i % 40}" for i in range(60))
    prompts = [parse_prompt({"text": text}, 1, given=True), parse_prompt({"text": "w1 w2 w3"}, 2, given=True)]
    store, printed = fill(target, prompts, tmp_path)
    found = [(first, words(target, tokens)) for first, tokens in stored(store).values()]
    assert found == [(0, " ".join(text.split()[:41])), (0, "w1 w2 w3")]
    assert "1 answers are longer than 40 tokens, and are cut there (answers.max_new_tokens)" in printed


def test_a_share_keeps_its_answers_and_the_target_gives_the_others(tmp_path):
    target = tiny_target()
    target.eos_ids = frozenset()
    rows = [
        {"messages": [said("user", f"w{i + 3} w9"), said("assistant", f"w{i + 4} w{i + 5} w{i + 6}")]}
        for i in range(24)
    ]
    prompts = [parse_prompt(row, n, given=True) for n, row in enumerate(rows)]
    prompts.append(Prompt("question", ("w50",)))
    prompts.append(parse_prompt({"text": "w51 w52"}, 99, given=True))
    config = replace(CONFIG, source="both", given_share=0.5)
    given, asked = divided(prompts, config)
    assert {p.id for p in given} & {p.id for p in asked} == set()
    assert 6 <= len(given) - 1 <= 18
    assert "question" in {p.id for p in asked}
    assert "99" in {p.id for p in given}
    assert divided(prompts[::-1], config)[0] == given[::-1]  # the content alone decides
    store, _ = fill(target, prompts, tmp_path / "both", config)
    found = stored(store)
    assert len(found) == len(prompts)
    for prompt in given[:-1]:
        first, tokens = found[f"{prompt.key}/0"]
        assert words(target, tokens[first + 1 :]) == prompt.answers[0]
    for prompt in asked:
        first, tokens = found[f"{prompt.key}/0"]
        assert len(tokens) - first - 1 == 40
    own, _ = fill(target, prompts[:-1], tmp_path / "own", replace(config, source="target"))
    assert {k: v for k, v in stored(own).items() if k in {f"{p.key}/0" for p in asked}} == {
        f"{p.key}/0": found[f"{p.key}/0"] for p in asked
    }
    again, _ = fill(target, prompts, tmp_path / "both", config)
    assert stored(again) == found
    with pytest.raises(BeagleError, match=r"made with source '0\.5 given', not '0\.25 given'"):
        fill(target, prompts, tmp_path / "both", replace(config, given_share=0.25))


# shapes


SHAPES = {
    "openai": ({"messages": TURNS[1:3]}, ("w1 w2",), TURNS[1:3]),
    "openai parts": (
        {"messages": [said("user", [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]), TURNS[2]]},
        ("w1 w2",), TURNS[1:3],
    ),
    "sharegpt": (
        {"system": "w40", "conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3 w4 w5"}]},
        ("w1 w2",), TURNS[:3],
    ),
    "completion": ({"prompt": "w1 w2", "completion": "w3 w4 w5"}, ("w1 w2",), TURNS[1:3]),
    "messages and completion": ({"prompt": TURNS[:2], "completion": TURNS[2:3]}, ("w1 w2",), TURNS[:3]),
    "a prompt beside messages": ({"prompt": "w1 w2", "messages": TURNS[:3]}, ("w1 w2",), TURNS[:3]),
    "tools": ({"messages": TOOLS}, ("w1",), TOOLS),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    row, turns, dialogue = SHAPES[name]
    prompt = parse_prompt(row, 1, given=True)
    assert prompt.turns == turns
    assert prompt.given() == dialogue
    assert prompt.is_askable == (name != "tools")
    if name != "tools":
        assert parse_prompt(row, 1).turns == turns  # asked, too


def test_an_unknown_shape_names_what_it_has_and_what_is_taken():
    row = {"instruction": "w1", "output": "w2"}
    takes = 'none of "turns", "prompt", "question", "messages", "conversations"'
    with pytest.raises(ValueError, match=f'^{takes} is there, only "instruction", "output"$'):
        parse_prompt(row, 1)
    with pytest.raises(ValueError, match=f'^{takes}, "text" is there, only "instruction", "output"$'):
        parse_prompt(row, 1, given=True)
    with pytest.raises(ValueError, match=r"no known role: 'judge' is none of assistant, .*user"):
        parse_prompt({"messages": [said("judge", "w1")]}, 1, given=True)


def test_what_cannot_be_asked_is_read_for_its_answers_alone(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ({"text": "w1 w2"}, {"messages": TOOLS}))).encode()))
    assert [p.is_askable for p in read_prompts(path, given=True)] == [False, False]
    with pytest.raises(BeagleError, match=r"d\.jsonl\.gz:1: none of "):
        read_prompts(path)
    path.write_bytes(gzip.compress(json.dumps({"messages": TOOLS}).encode()))
    with pytest.raises(BeagleError, match=r":1: a message has no known role: 'tool'"):
        read_prompts(path)
