"""The server through the official client: the library's answers, whoever else is asking."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from beagle.model import Model
from beagle.serving import engine as engine_module
from beagle.serving.engine import Limits
from serving import MESSAGES, PROMPTS, serving, text, wait_for


@pytest.fixture(scope="module")
def served():
    with serving(Limits(answer=24)) as running:
        yield running


@pytest.fixture(scope="module")
def endless():
    with serving(endless=True) as running:
        yield running


# the same answers as the library's


@pytest.mark.parametrize("draft", [True, False])
def test_greedy_answers_are_the_librarys(served, draft):
    for prompt in PROMPTS:
        messages = [{"role": "system", "content": "w7"}, {"role": "user", "content": prompt}]
        expected = Model(served.model.target).generate(messages, max_new_tokens=20)
        answer = served.ask(messages, max_tokens=20, extra_body={"beagle": {"draft": draft}})
        choice = answer.choices[0]
        assert choice.message.content == expected.text
        assert choice.message.role == "assistant"
        ended = expected.token_ids[-1] in served.model.target.eos_ids
        assert choice.finish_reason == ("stop" if ended else "length")
        assert answer.usage.completion_tokens == len(expected.token_ids)
        assert answer.usage.prompt_tokens == len(["w7", "w5", "w9", "w33"]) + 3
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert (answer.model, answer.object) == ("tiny", "chat.completion")
        assert answer.beagle["drafting"] is draft
        assert answer.beagle["tokens"] == len(expected.token_ids)


def test_streamed_pieces_make_the_answer(endless):
    expected = endless.ask(max_tokens=30)
    chunks = list(endless.ask(max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert text(chunks) == expected.choices[0].message.content
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, count) == getattr(expected.usage, count)
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    figures = chunks[-2].beagle
    pieces = [c.beagle for c in chunks[:-2] if c.choices[0].delta.content]
    assert sum(p["tokens"] for p in pieces) == figures["tokens"] == 30
    accepted = sum(int(d) * n for d, n in figures["accepted_at_depth"].items())
    assert sum(p["drafted"] for p in pieces) == accepted
    assert figures["tau"] == expected.beagle["tau"] == pytest.approx(29 / figures["passes"], abs=1e-3)


def test_completions_take_texts_and_tokens(endless):
    target = endless.model.target
    ids = [[3, 4, 5], [9, 8]]
    plain = Model(target)
    for prompt, prompts in (
        ("w3 w4 w5", ["w3 w4 w5"]),
        (["w3 w4", "w9"], ["w3 w4", "w9"]),
        (ids[0], [ids[0]]),
        (ids, ids),
    ):
        options = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 9}
        answer = endless.client.completions.create(**options)
        expected = [plain.generate(p, raw=True, max_new_tokens=9).text for p in prompts]
        assert [c.text for c in answer.choices] == expected
        assert [c.index for c in answer.choices] == list(range(len(prompts)))
        streamed = [""] * len(prompts)
        for chunk in endless.client.completions.create(**options, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == expected
    assert endless.client.completions.create(model="tiny", prompt="w3").usage.completion_tokens == 16


def test_seeds_and_several_choices(endless):
    options = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 10}
    expected = [
        endless.model.generate(MESSAGES, max_new_tokens=10, temperature=1.3, top_p=0.9, seed=s).text for s in (7, 8, 9)
    ]
    answer = endless.ask(**{**options, "seed": 7, "n": 3})
    assert [c.message.content for c in answer.choices] == expected
    assert answer.usage.completion_tokens == 30
    assert answer.usage.prompt_tokens == 5
    streamed = ["", "", ""]
    for chunk in endless.ask(**{**options, "seed": 7, "n": 3, "stream": True}):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == expected
    random = endless.ask(**options)
    again = endless.ask(**options, seed=random.beagle["seed"])
    assert again.choices[0].message.content == random.choices[0].message.content
    top = endless.ask(**options, extra_body={"beagle": {"top_k": 1}}).choices[0].message.content
    assert top == endless.ask(max_tokens=10).choices[0].message.content


def test_stop_strings(endless):
    words = endless.ask(max_tokens=24).choices[0].message.content.split()
    for stop in (words[5], [words[9], f"{words[3]} {words[4]}"], "nowhere"):
        expected = endless.model.generate(MESSAGES, max_new_tokens=24, stop=stop)
        answer = endless.ask(max_tokens=24, stop=stop)
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason == ("length" if stop == "nowhere" else "stop")
        assert answer.usage.completion_tokens == len(expected.token_ids)
        assert text(endless.ask(max_tokens=24, stop=stop, stream=True)) == expected.text
    # a stop string that the last allowed token completes
    ids = endless.model.generate(MESSAGES, max_new_tokens=24).token_ids
    n = max(i for i, token in enumerate(ids) if token > 2 and token not in ids[:i])
    last = endless.ask(max_tokens=n + 1, stop=endless.model.target.tokenizer.decode([ids[n]]))
    assert last.choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens == n + 1


def test_max_completion_tokens_and_the_default(endless):
    assert endless.ask(max_tokens=None, max_completion_tokens=5).usage.completion_tokens == 5
    with serving(Limits(answer=7, context=20), endless=True) as running:
        assert running.ask(max_tokens=None).usage.completion_tokens == 7
        long = [{"role": "user", "content": "w4 " * 15}]
        assert running.ask(long, max_tokens=None).usage.completion_tokens == 3  # what the context leaves


def test_logprobs_are_the_targets_own(endless):
    target = endless.model.target
    answer = endless.ask(max_tokens=12, logprobs=True, top_logprobs=3).choices[0]
    tokens = [target.tokenizer.convert_tokens_to_ids(t.token.strip()) for t in answer.logprobs.content]
    prompt = [1, 5, 9, 33, 1]
    ids = torch.tensor([prompt + tokens])
    scores = target.logits(target.prefill(ids, target.new_cache(1, 64))[0]).log_softmax(-1)
    assert len(tokens) == 12
    for i, item in enumerate(answer.logprobs.content):
        row = scores[len(prompt) - 1 + i]
        assert item.logprob == pytest.approx(float(row[tokens[i]]), abs=1e-4)
        assert [t.logprob for t in item.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert item.top_logprobs[0].token == item.token
        special = item.token in target.tokenizer.all_special_tokens  # which add nothing to the text
        assert bytes(item.bytes).decode() == ("" if special else item.token)
    streamed = [
        item
        for chunk in endless.ask(max_tokens=12, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for item in chunk.choices[0].logprobs.content
    ]
    assert [i.token for i in streamed] == [i.token for i in answer.logprobs.content]
    completion = endless.client.completions.create(model="tiny", prompt="w3", max_tokens=6, logprobs=2, temperature=0)
    parts = completion.choices[0].logprobs
    assert len(parts.tokens) == len(parts.token_logprobs) == len(parts.text_offset) == 6
    assert all(len(top) == 2 for top in parts.top_logprobs)
    assert all(value <= 0 for value in parts.token_logprobs)
    assert endless.ask().choices[0].logprobs is None


@pytest.mark.parametrize("stop", [None, "no such text"])
def test_watched_pieces_and_trees(endless, stop):
    options = {"max_tokens": 30, "stop": stop}
    expected = endless.ask(**options)
    chunks = list(endless.ask(**options, stream=True, extra_body={"beagle": {"watch": True}}))
    watched = [c.beagle for c in chunks if c.choices[0].delta.content]
    parts = [part for w in watched for part in w["pieces"]]
    assert "".join(p["text"] for p in parts) == expected.choices[0].message.content
    numbers = [p["i"] for p in parts]
    assert numbers == sorted(numbers)
    assert numbers[-1] < 30
    steps = [step for w in watched for step in w["steps"]]
    assert sum(len(step["path"]) for step in steps) >= 30
    depths = [depth for step in steps for depth in [*range(1, len(step["path"])), 0]]
    assert all(p["depth"] == depths[p["i"]] for p in parts)
    words = {p["i"]: p["text"].strip() for p in parts if p["text"].strip()}
    made = 0
    for step in steps:
        assert len(step["tokens"]) == len(step["parents"])
        assert step["parents"][0] == -1
        for before, node in zip(step["path"], step["path"][1:], strict=False):
            assert step["parents"][node] == before
        if stop is None:
            for i, node in enumerate(step["path"][1:], made):
                assert words.get(i) in (step["tokens"][node], None)  # special tokens have no text
        made += len(step["path"])
    assert watched[-1]["tau"] >= 1


# several clients


def test_answers_are_not_crossed(endless):
    """More clients than live requests, of every kind at once: each gets what it gets alone."""
    kinds = [
        {"max_tokens": 5 + 3 * i, **({"temperature": 1.2, "seed": i} if i % 3 == 0 else {})}
        | ({"extra_body": {"beagle": {"draft": False}}} if i % 4 == 1 else {})
        for i in range(20)
    ]
    alone = []
    for i, kind in enumerate(kinds):
        sampling = {k: v for k, v in kind.items() if k in ("temperature", "seed")}
        prompt = [{"role": "user", "content": PROMPTS[i % 8]}]
        alone.append(endless.model.generate(prompt, max_new_tokens=kind["max_tokens"], **sampling).text)

    def one(i):
        prompt = [{"role": "user", "content": PROMPTS[i % 8]}]
        if i % 2:
            return text(endless.ask(prompt, stream=True, **kinds[i]))
        return endless.ask(prompt, **kinds[i]).choices[0].message.content

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, range(20))) == alone
    endless.idle()


def test_requests_that_arrive_while_others_are_read(endless, monkeypatch):
    encode = engine_module.encode

    def slowly(*arguments, **options):
        time.sleep(0.03)
        return encode(*arguments, **options)

    expected = endless.ask().choices[0].message.content
    monkeypatch.setattr(engine_module, "encode", slowly)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: endless.ask().choices[0].message.content, range(24)))
    assert answers == [expected] * 24


def test_turns_are_fair():
    """A short answer asked for later ends long before a long one."""
    ended = {}
    with serving(endless=True, plain=True, slow=0.01) as running:

        def ask(name, tokens):
            running.ask(max_tokens=tokens)
            ended[name] = time.monotonic()

        long = threading.Thread(target=ask, args=("long", 150))
        long.start()
        wait_for(lambda: running.engine.live == 1)
        ask("short", 5)
        assert "long" not in ended
        long.join()


def test_disconnected_clients_free_their_place():
    with serving(Limits(live=1, queue=4), endless=True, plain=True, slow=0.02) as running:
        stream = running.ask(max_tokens=400, stream=True)
        next(iter(stream))
        with pytest.raises(openai.APITimeoutError):  # leaves while it waits
            running.client.with_options(timeout=1.0).chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=400
            )
        wait_for(lambda: running.engine.waiting == 0)
        assert running.engine.live == 1
        stream.close()
        running.idle()
        with pytest.raises(openai.APITimeoutError):  # leaves while its answer is made
            running.client.with_options(timeout=1.0).chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=400
            )
        running.idle()
        assert running.ask(max_tokens=3).usage.completion_tokens == 3
        metrics = running.http.get("/metrics").text
        assert 'beagle_requests_total{path="/v1/chat/completions",status="499"} 2.0' in metrics


def test_a_full_queue_refuses():
    with serving(Limits(live=1, queue=1), endless=True, plain=True, slow=0.02) as running:
        streams = [running.ask(max_tokens=300, stream=True)]
        threads = [threading.Thread(target=lambda: text(running.ask(max_tokens=3, stream=True)))]
        threads[0].start()
        wait_for(lambda: running.engine.waiting == 1)
        refused = running.post()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError, match="waiting"):
            running.ask()
        streams[0].close()
        threads[0].join()
        assert running.ask().choices[0].message.content
        running.idle()


def test_time_cuts_an_answer():
    with serving(Limits(seconds=1.0, live=1), endless=True, plain=True, slow=0.05) as running:
        answers = []
        late = threading.Thread(target=lambda: answers.append(running.post(max_tokens=300, n=2)))
        late.start()
        wait_for(lambda: running.engine.live == 1)
        in_vain = running.post(max_tokens=300)
        late.join()
        cut = answers[0].json()
        assert cut["beagle"]["cut"] == "time"
        assert [c["finish_reason"] for c in cut["choices"]] == ["length", "length"]
        assert 0 < cut["usage"]["completion_tokens"] < 300
        assert in_vain.status_code == 429 or in_vain.json()["beagle"]["cut"] == "time"


def test_slow_readers_harm_nobody(endless):
    with socket.create_connection(("127.0.0.1", int(endless.url.rsplit(":", 1)[1]))) as slow:
        body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 400}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode() + body)
        assert endless.ask(max_tokens=20).usage.completion_tokens == 20
        endless.idle()  # the engine does not wait for the reader


def test_metrics_add_up(endless):
    def value(name):
        lines = [line for line in endless.http.get("/metrics").text.splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[1])

    endless.idle()
    names = ["generated_tokens", "passes", "passed_tokens", "drafted_tokens", "prompt_tokens"]
    before = {name: value(f"beagle_{name}_total") for name in names}
    answer = endless.ask(max_tokens=25)
    endless.idle()
    gained = {name: value(f"beagle_{name}_total") - before[name] for name in names}
    assert gained["generated_tokens"] == 25
    assert gained["prompt_tokens"] == answer.usage.prompt_tokens
    assert gained["passed_tokens"] / gained["passes"] == pytest.approx(answer.beagle["tau"], abs=1e-3)
    assert gained["drafted_tokens"] > 0
    assert value("beagle_tau") >= 1
    assert value("beagle_live_requests") == value("beagle_queue_length") == 0
    text = endless.http.get("/metrics").text
    for name in ("request_seconds", "first_token_seconds", "queue_seconds", "token_seconds"):
        assert f"beagle_{name}_bucket" in text
