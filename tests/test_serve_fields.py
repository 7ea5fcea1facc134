"""Fields of requests: each that is served means what the library means by it; the rest is refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from beagle.model import Model
from beagle.serving.engine import Limits
from conftest import tiny_target
from serving import MESSAGES, events, serving

LONG = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def served():
    with serving() as running:
        yield running


FIELDS = {
    "top_k": ({"top_k": 3, "temperature": 1.0}, {"top_k": 3, "temperature": 1.0}),
    "top_k off": ({"top_k": -1, "temperature": 1.0}, {"temperature": 1.0}),
    "min_p": ({"min_p": 0.3, "temperature": 1.0}, {"min_p": 0.3, "temperature": 1.0}),
    "top_p": ({"top_p": 0.5, "temperature": 1.0}, {"top_p": 0.5, "temperature": 1.0}),
    "stop_token_ids": ({"stop_token_ids": [22, 50, 9]}, {"stop_token_ids": [22, 50, 9]}),
    "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}),
    "min_tokens": ({"min_tokens": 20}, {"min_new_tokens": 20}),
    "repetition_penalty": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "presence_penalty": ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
    "frequency_penalty": ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
    "logit_bias": ({"logit_bias": {"22": -100, "9": 4.5}}, {"logit_bias": {22: -100, 9: 4.5}}),
}


@pytest.mark.parametrize("field", FIELDS)
def test_served_fields_mean_what_the_library_means(served, field):
    asked, options = FIELDS[field]
    body = {**LONG, "seed": 5, **asked}
    options = {"max_new_tokens": 24, "seed": 5, **options}
    expected = served.model.generate(MESSAGES, draft=False, **options)
    prompt = "w5 w9 w33 w12"
    raw = served.model.generate(prompt, raw=True, draft=False, **options)
    for draft in (True, False):
        answer = served.post(**body, beagle={"draft": draft}).json()
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert answer["choices"][0]["finish_reason"] == expected.finish_reason
        assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
        answer = served.post("/v1/completions", messages=..., prompt=prompt, **body, beagle={"draft": draft}).json()
        assert answer["choices"][0]["text"] == raw.text
    streamed = served.ask(stream=True, extra_body=body)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected.text


def test_fields_change_answers(served):
    """So that the test above can fail: each field matters for the tiny model."""
    plain = {seed: served.model.generate(MESSAGES, max_new_tokens=24, temperature=t, seed=5).token_ids
             for seed, t in ((0, 0.0), (1, 1.0))}  # fmt: skip
    for field, (_, options) in FIELDS.items():
        if field not in ("top_k off", "ignore_eos", "min_tokens"):
            made = served.model.generate(MESSAGES, max_new_tokens=24, **{"seed": 5, **options}).token_ids
            assert made != plain[int("temperature" in options)], field


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 1.3}, "length_penalty"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"what": 1}, "what"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"min_tokens": 9}, None),  # of at most 4
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, None),
        ({"stop_token_ids": [5000]}, None),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"min_p": 2}, "min_p"),
        ({"stop": [""]}, "stop"),
        ({"beagle": {"drafts": True}}, "beagle"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"top_k": 2, "beagle": {"top_k": 5}}, "top_k"),
        ({"logit_bias": {"05": 2}}, "logit_bias"),
        ({"include_obfuscation": True}, "include_obfuscation"),
        ({"echo": 0}, "echo"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused_by_name(served, changes, param):
    answer = served.post(**changes)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    name = next(iter(changes)).removesuffix("s")
    assert (param or name) in error["message"] or "vocabulary" in error["message"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": None}, ["messages.0.content", "null", "send text"]),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ["image_url", "send text"]),
        ({"role": "user", "content": [{"type": "text", "text": "w3"}, {"type": "input_audio"}]}, ["input_audio"]),
        ({"role": "user", "content": "w3", "tool_calls": [{"id": "a"}]}, ["tool_calls"]),
        ({"role": "user", "content": "w3", "user": "me"}, ["user"]),
        ({"role": "user", "content": []}, ["messages.0.content", "send a text"]),
        ({"role": "user", "content": 5}, ["messages.0.content", "send a text"]),
        ({"role": "user", "content": [{"type": "text"}]}, ["messages.0.content", "send a text"]),
    ],
    ids=str,
)
def test_messages_that_mislead_no_more(served, message, words):
    answer = served.post(messages=[message])
    assert answer.status_code == 400
    for word in words:
        assert word in answer.json()["error"]["message"]


def test_text_parts_and_replayed_messages_are_served(served):
    parts = [{"role": "user", "content": [{"type": "text", "text": "w5 w9"}, {"type": "text", "text": " w33"}]}]
    assert served.post(messages=parts).json()["choices"] == served.post().json()["choices"]
    replayed = {"role": "assistant", "content": "w9", "refusal": None, "tool_calls": None, "audio": None}
    assert served.post(messages=[*MESSAGES, replayed, *MESSAGES]).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}]
)
def test_another_content_type_is_named(served, headers):
    body = {"model": "tiny", "messages": MESSAGES}
    with served.http as http:
        answer = http.post("/v1/chat/completions", content=json.dumps(body).encode(), headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_the_final_message_is_continued(served):
    begun = [*MESSAGES, {"role": "assistant", "content": "w7 w8"}]
    expected = served.model.generate(begun, continue_final_message=True, max_new_tokens=12)
    for extra in ({}, {"add_generation_prompt": False}):
        answer = served.ask(begun, extra_body={"continue_final_message": True, **extra})
        assert answer.choices[0].message.content == expected.text
    assert served.post(messages=begun, max_tokens=12).json()["choices"][0]["message"]["content"] != expected.text
    assert served.post(continue_final_message=True).status_code == 400  # the last is the user's
    refused = served.post(messages=begun, continue_final_message=True, add_generation_prompt=True)
    assert "add_generation_prompt" in refused.json()["error"]["message"]


def test_special_tokens_stop(served):
    """A stop string that only a special token's text completes."""
    free = served.model.generate(MESSAGES, max_new_tokens=24, ignore_eos=True)
    tokenizer = served.model.target.tokenizer
    assert (
        served.post(stop=tokenizer.decode(free.token_ids[3:4]), max_tokens=24).json()["choices"][0]["finish_reason"]
        == "stop"
    )


def test_a_cut_answer_keeps_what_was_held_back():
    """The text that might have become a stop string, of an answer that time ends."""
    with serving(Limits(seconds=1.0), endless=True, plain=True, slow=0.05) as running:
        own = tiny_target()  # the same, and not slowed down
        own.eos_ids = frozenset()
        whole = Model(own).generate(MESSAGES, max_new_tokens=400).text
        stop = whole[: len(whole) - 5] + " no"  # a prefix of it matches all along
        answer = running.post(max_tokens=400, stop=stop).json()
        content = answer["choices"][0]["message"]["content"]
        assert answer["choices"][0]["finish_reason"] == "length"
        made = answer["usage"]["completion_tokens"]
        assert 0 < made < 400
        assert content == Model(own).generate(MESSAGES, max_new_tokens=made).text


def test_logits_that_are_no_numbers_fail_by_name():
    with serving() as running:
        logits = running.model.target.logits
        running.model.target.logits = lambda states: torch.full_like(logits(states), torch.nan)
        for extra in ({}, {"logprobs": True, "top_logprobs": 2}, {"temperature": 1.0}):
            answer = running.post(**extra)
            assert answer.status_code == 500
            assert "its logits are nan" in answer.json()["error"]["message"]
        verify, passes = running.model.target.verify, []

        def fails_at_last(*arguments):
            passes.append(verify(*arguments))
            return passes[-1] * (torch.nan if len(passes) > 3 else 1.0)

        running.model.target.logits, running.model.target.verify = logits, fails_at_last
        with running.http as http, http.stream(
            "POST", "/v1/chat/completions",
            json={"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "stream": True, "logprobs": True,
                  "ignore_eos": True, "beagle": {"draft": False}},
        ) as stream:  # fmt: skip
            events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert "NaN" not in "".join(e for e in events if "error" not in e)
        errors = [json.loads(e) for e in events if e.startswith("{") and "error" in json.loads(e)]
        assert len(errors) == 1


@pytest.mark.parametrize("body", ["", "[1]", "null", "5"])
def test_a_body_that_is_no_object_is_named(served, body):
    with served.http as http:
        answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "JSON object" in answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [None, [], [3, "w"], 5, {}])
def test_prompts_of_no_known_form_are_named(served, prompt):
    error = served.post("/v1/completions", messages=..., prompt=prompt).json()["error"]
    assert error["param"] == "prompt"
    assert "send a text, a list of token ids" in error["message"]


@pytest.mark.parametrize("n", [1, 2])
def test_token_ids_are_those_of_the_library_where_they_are_asked_for(served, n):
    body = {**LONG, "temperature": 0.9, "seed": 5, "n": n, "return_token_ids": True}
    expected = [served.model.generate(MESSAGES, max_new_tokens=24, temperature=0.9, seed=5 + i) for i in range(n)]
    ids = [list(answer.token_ids) for answer in expected]
    choices = served.post(**body).json()["choices"]
    assert [choice["token_ids"] for choice in choices] == ids
    assert [choice["message"]["content"] for choice in choices] == [answer.text for answer in expected]
    raw = served.post("/v1/completions", messages=..., prompt=[3, 4, 5], **body).json()["choices"][0]
    assert raw["token_ids"] == list(
        served.model.generate([3, 4, 5], max_new_tokens=24, temperature=0.9, seed=5).token_ids
    )
    streamed: list[list[int]] = [[] for _ in range(n)]
    for choice in events(served.post(**body, stream=True)):
        streamed[choice["index"]] += choice.get("token_ids", [])
    assert streamed == ids
    assert "token_ids" not in served.post(**LONG).json()["choices"][0]
