"""What a prompt may be, what is refused, and dialogues whose last message is continued."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.chat import encode
from conftest import tiny_drafter, tiny_target

IDS = [5, 9, 33, 12]
USER = {"role": "user", "content": "w5 w9"}
TEXT = {"type": "text", "text": "w5"}


@pytest.fixture
def target():
    target = tiny_target()
    target.eos_ids = frozenset()
    return target


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(IDS),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        np.array(IDS),
        [np.int64(i) for i in IDS],
        [torch.tensor(i) for i in IDS],
    ],
    ids=lambda prompt: type(prompt).__name__ + type(prompt[0]).__name__,
)
def test_token_ids_of_any_integer_type(target, prompt):
    assert encode(target, prompt) == IDS
    assert all(type(token) is int for token in encode(target, prompt))
    assert Model(target).generate(prompt, max_new_tokens=6).token_ids == (
        Model(target).generate(IDS, max_new_tokens=6).token_ids
    )


@pytest.mark.parametrize(
    "content", [[{"type": "text", "text": "w5 w9"}], [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w9"}]]
)
def test_text_parts_are_joined(target, content):
    assert encode(target, [{"role": "user", "content": content}]) == encode(target, [USER])
    assert Model(target).generate_batch([[{"role": "user", "content": content}]], max_new_tokens=5)[0].text


def test_tool_calls_go_to_a_template_that_knows_them(target):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w7"}}]}
    with pytest.raises(
        BeagleError, match="message 2 of 2 has tool_calls, which the target's chat template doesn't know"
    ):
        encode(target, [USER, call])
    target.tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m['content'] or m['tool_calls'][0]['function']['name'] }} {% endfor %}<s>"
    )
    assert target.tokenizer.decode(encode(target, [USER, call])) == "<s> w5 w9 <s> w7 <s>"


REFUSED = {
    "nothing": ("", "the prompt is empty"),
    "no items": ([], "the prompt is empty"),
    "no tokens": (torch.tensor([], dtype=torch.int64), "the prompt is empty"),
    "none": (None, "the prompt is a NoneType"),
    "a number": (5, "the prompt is a int"),
    "bytes": (b"w5", "the prompt is a bytes"),
    "one message": (USER, "put a message into a list"),
    "texts": (["w5", "w9"], "a list with 'w5' in it"),
    "fractions": ([1.5], "a list with 1.5 in it"),
    "truths": ([True, 5], "a list with True in it"),
    "floats": (torch.tensor([1.0]), "a list with 1.0 in it"),
    "a matrix": (torch.tensor([IDS]), r"2 dimensions; pass one prompt's token ids, such as input_ids\[0\]"),
    "too large": ([5, 64], "token id 64; .* ids from 0 to 63"),
    "negative": ([-1], "token id -1"),
    "mixed": ([5, USER], "give a text, a list of messages"),
    "mixed too": ([USER, 5], "message 2 of 2 is 5"),
    "no role": ([{"content": "w5"}], "message 1 of 1 has the role None"),
    "odd role": ([USER, {"role": "usr", "content": "w5"}], "message 2 of 2 has the role 'usr'"),
    "no content": ([{"role": "user"}], "message 1 of 1 has no content"),
    "null content": ([USER, {"role": "assistant", "content": None}, USER], "message 2 of 3 has no content"),
    "number": ([{"role": "user", "content": 5}], "has a int as its content"),
    "bytes content": ([{"role": "user", "content": b"w5"}], "has a bytes as its content"),
    "image": ([{"role": "user", "content": [TEXT, {"type": "image_url"}]}], "a content part of type 'image_url'"),
    "audio": ([{"role": "user", "content": [{"type": "input_audio"}]}], "a content part of type 'input_audio'"),
    "bare part": ([{"role": "user", "content": ["w5"]}], "a content part of type 'w5'"),
    "empty part": ([{"role": "user", "content": [{"type": "text"}]}], "a text part without a text"),
    "half a pair": ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "half a surrogate pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prompt_is_refused_in_one_line(target, name):
    prompt, message = REFUSED[name]
    for ask in (Model(target).generate, lambda prompt: Model(target).generate_batch([prompt])):
        with pytest.raises(BeagleError, match=message) as caught:
            ask(prompt)
        assert "\n" not in str(caught.value)


def test_a_role_that_the_template_names_is_served(target):
    target.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'ipython' %}w9{% endif %} {{ m['content'] }}{% endfor %}"
    )
    assert encode(target, [{"role": "ipython", "content": "w5"}]) == [9, 5]


def test_raw_takes_no_dialogue(target):
    with pytest.raises(BeagleError, match="leave raw out for a dialogue"):
        encode(target, [USER], raw=True)


def test_the_last_message_is_continued(target):
    dialogue = [USER, {"role": "assistant", "content": "w7 w8"}]
    ids = encode(target, dialogue, continue_final_message=True)
    assert target.tokenizer.decode(ids) == "<s> w5 w9 <s> w7 w8"
    assert [*ids, 1] == encode(target, dialogue)
    expected = Model(target).generate(ids, max_new_tokens=12)
    options = {"max_new_tokens": 12, "continue_final_message": True}
    for model in (Model(target), Model(target, tiny_drafter(target), TreePlan("dynamic", depth=3, top_k=4, nodes=8))):
        for answer in (
            model.generate(dialogue, **options),
            model.generate(ids, **options),
            model.generate_batch([dialogue], **options)[0],
        ):
            assert answer.token_ids == expected.token_ids
            assert answer.text == " " + expected.text  # put behind the message, words stay apart


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("w5", "needs a dialogue"),
        ([USER], "needs a last message of the assistant"),
        ([USER, {"role": "assistant", "content": " "}], "needs a last message of the assistant"),
    ],
    ids=["text", "user", "empty"],
)
def test_nothing_to_continue_is_refused(target, prompt, message):
    with pytest.raises(BeagleError, match=message):
        Model(target).generate(prompt, continue_final_message=True)


def test_a_template_that_drops_the_last_message_is_refused(target):
    target.tokenizer.chat_template = "{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BeagleError, match=r"its chat template refuses this dialogue .*does not appear") as caught:
        encode(target, [USER, {"role": "assistant", "content": "w7"}], continue_final_message=True)
    assert "\n" not in str(caught.value)
