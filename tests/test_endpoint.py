"""Answers from a server with OpenAI's API: the target's own, many at once, and nothing else in silence."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beagle.errors import BeagleError
from beagle.model import Model
from beagle.serving.engine import Limits
from beagle.targets.chat import encode
from beagle.targets.loading import load_target
from beagle.targets.target import Target
from beagle.training import answer_files
from beagle.training import endpoint as module
from beagle.training import server as server_module
from beagle.training.answer_files import AnswerFolder, prompt_key
from beagle.training.endpoint import fetch_answers
from beagle.training.make_answers import make_answers
from beagle.training.prompts import Prompt
from beagle.training.recipe import AnswerConfig
from beagle.training.server import Endpoint
from conftest import REAL_CACHE, tiny_model, tiny_tokenizer
from serving import serving
from test_answer_files import everything
from training_runs import stored

LIMIT = 12
PROMPTS = [
    Prompt(
        f"p{i}",
        tuple(" ".join(f"w{3 + (7 * i + 11 * t + j * j) % 60}" for j in range(1 + i % 5)) for t in range(1 + i % 3)),
        system="w50 w51" if i % 4 == 3 else "",
    )
    for i in range(12)
]
CONFIG = AnswerConfig(rows=6, max_prompt_tokens=80, max_new_tokens=LIMIT, max_turns=3, sampled_share=0.5)


def tokenizer() -> PreTrainedTokenizerFast:
    """Only the end is a special token, so that each text has its tokens."""
    inner = Tokenizer(models.WordLevel(tiny_tokenizer().get_vocab(), unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    plain.chat_template = tiny_tokenizer().chat_template
    return plain


def new_target(seed: int = 0) -> Target:
    target = Target(tiny_model(seed=seed), tokenizer(), "tiny")
    target.eos_ids = frozenset({2, 17, 30, 41})
    return target


@pytest.fixture
def target() -> Target:
    return new_target()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Of the openai client, before it tries again."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.1)


@pytest.fixture(scope="module")
def served():
    with serving(Limits(live=4, queue=2), target=new_target()) as running:
        yield running


class Stub:
    """A server that answers as the target does; ``change`` makes its answers others.

    Attributes:
        change: takes path, body and answer; returns the answer, ``(status, answer)``, or bytes to send as they are.
        bodies: of all requests, in order.
        most: requests that were under way at once.
    """

    def __init__(self, target: Target) -> None:
        self.model, self.change, self.bodies = Model(target), lambda path, body, answer: answer, []
        self.ids, self.live, self.most, self.lock = True, 0, 0, threading.Lock()
        self.known = {}

    def answer(self, path: str, body: dict) -> dict:
        prompt = body.get("messages") or body.get("prompt")
        asked = {"max_new_tokens": body["max_tokens"], "temperature": body["temperature"], "seed": body["seed"]}
        with self.lock:
            key = json.dumps([prompt, asked])  # a request that comes again is answered at once
            answer = self.known[key] = self.known.get(key) or self.model.generate(prompt, **asked)
        ended = answer.token_ids[-1] in self.model.target.eos_ids
        choice = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice |= (
            {"message": {"role": "assistant", "content": answer.text}} if "messages" in body else {"text": answer.text}
        )
        usage = {"prompt_tokens": len(encode(self.model.target, prompt)), "completion_tokens": len(answer.token_ids)}
        whole = {"id": "a", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        if self.ids and body.get("return_token_ids"):
            choice["token_ids"] = list(answer.token_ids)
        return {**whole, "choices": [choice]}


@contextmanager
def stub(target: Target):
    server = Stub(target)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "me"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                server.bodies.append(body)
                server.live += 1
                server.most = max(server.most, server.live)
            try:
                changed = server.change(self.path, body, server.answer(self.path, body))
            finally:
                with server.lock:
                    server.live -= 1
            if isinstance(changed, bytes):
                self.wfile.write(changed)
            else:
                self.send(*(reversed(changed) if isinstance(changed, tuple) else [changed]))

        def send(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

        def handle(self):
            with suppress(ConnectionError):  # the client has gone
                super().handle()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture
def vllm():
    with stub(new_target()) as server:
        yield server


class Fetch:
    """Asks a server; ``printed`` is what the last call printed."""

    def __init__(self, target, folder):
        self.target, self.folder, self.printed = target, folder, ""

    def __call__(self, server, prompts=PROMPTS, config=CONFIG, *, model="tiny", patience=120.0, **options):
        out = io.StringIO()
        endpoint = Endpoint(server if isinstance(server, str) else server.url, model, patience)
        try:
            return fetch_answers(
                endpoint, self.target, prompts, self.folder, config, Console(file=out, width=400), **options
            )
        finally:
            self.printed = out.getvalue()


@pytest.fixture
def fetch(target, tmp_path) -> Fetch:
    return Fetch(target, tmp_path / "answers")


def by_turn(folder: AnswerFolder) -> dict:
    return {(a.prompt, a.turn): (a.temperature, a.ended, a.prompt_tokens, a.tokens.tolist()) for a in folder.read()}


@pytest.fixture
def own(target, tmp_path):
    """Samples that the target makes by itself."""
    return everything(make_answers(target, PROMPTS, tmp_path / "own", CONFIG, Console(file=io.StringIO())))


def same_samples(found, expected):
    assert found.keys() == expected.keys()
    for name, sample in expected.items():
        assert found[name].tokens.tolist() == sample.tokens.tolist(), name
        assert found[name].answer_from == sample.answer_from
        assert (found[name].states - sample.states).abs().max() < 0.05


# the same answers as the target's own


def test_our_own_server_gives_the_targets_answers_greedy_and_sampled(served, fetch, own, target, tmp_path):
    folder = fetch(served)  # four at once, two wait, the others are sent away and come back
    store = make_answers(target, PROMPTS, tmp_path / "data", CONFIG, Console(file=io.StringIO()), answers=folder)
    same_samples(everything(store), own)
    assert {answer.temperature for answer in folder.read()} == {0.0, 0.7}
    assert "100% of the endpoint's greedy tokens" in fetch.printed
    assert "left out" not in fetch.printed


def test_token_ids_are_taken_where_the_server_gives_them(vllm, fetch, own, target, tmp_path):
    vllm.change = lambda path, body, answer: garbled(answer)
    folder = fetch(vllm)
    store = make_answers(target, PROMPTS, tmp_path / "data", CONFIG, Console(file=io.StringIO()), answers=folder)
    same_samples(everything(store), own)
    assert vllm.most > 3
    body = vllm.bodies[-1]
    assert body["max_tokens"] == LIMIT + 1
    assert (body["top_p"], body["top_k"], body["repetition_penalty"], body["min_p"]) == (1.0, -1, 1.0, 0.0)
    seeds = {body["seed"] for body in vllm.bodies if body["temperature"]}
    assert len(seeds) == len([answer for answer in folder.read() if answer.temperature])


def garbled(answer):
    answer["choices"][0]["message"]["content"] = "no token of the target"
    return answer


def test_the_end_is_there_whether_the_server_gives_it_or_not(vllm, fetch):
    expected = by_turn(fetch(vllm))
    assert any(ended for _, ended, *_ in expected.values())
    for turn, (*_, ended, _n, tokens) in expected.items():
        assert (tokens[-1] in {2, 17, 30, 41}) == ended, turn

    def without(path, body, answer):
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop":
            choice["token_ids"].pop()
        return answer

    vllm.change = without
    fetch.folder = fetch.folder.with_name("other")
    found = by_turn(fetch(vllm))
    assert found.keys() == expected.keys()
    for turn, (*_, ended, _n, tokens) in found.items():
        assert tokens[:-1] == expected[turn][-1][:-1]
        assert tokens[-1] == (2 if ended else expected[turn][-1][-1])


def test_a_base_model_is_asked_with_token_ids(vllm, tmp_path):
    target = new_target()
    target.tokenizer.chat_template = None
    vllm.model.target.tokenizer.chat_template = None
    folder = Fetch(target, tmp_path / "answers")(vllm)
    assert all(isinstance(body["prompt"], list) and "messages" not in body for body in vllm.bodies)
    expected = Model(target).generate(PROMPTS[4].turns[0], max_new_tokens=LIMIT + 1, raw=True)
    [found] = [a for a in folder.read() if a.prompt == prompt_key(PROMPTS[4]) and a.temperature == 0] or [None]
    assert found is None or found.tokens.tolist() == list(expected.token_ids)
    assert {answer.turn for answer in folder.read()} == {0}


def test_fields_that_a_server_refuses_are_left_out(vllm, fetch, own, target, tmp_path):
    def strict(path, body, answer):
        bad = next((name for name in ("repetition_penalty", "return_token_ids") if name in body), None)
        return (400, {"error": {"message": f"Unrecognized request argument: {bad}"}}) if bad else answer

    vllm.change = strict
    store = make_answers(target, PROMPTS, tmp_path / "data", CONFIG, Console(file=io.StringIO()), answers=fetch(vllm))
    same_samples(everything(store), own)
    assert "repetition_penalty" not in vllm.bodies[-1]
    assert vllm.bodies[-1]["top_k"] == -1


def test_enough_tokens_end_the_asking(vllm, fetch):
    folder = fetch(vllm, config=replace(CONFIG, max_tokens=60, rows=1))
    answers = folder.read()
    sizes = [a.prompt_tokens + len(a.tokens) for a in answers]
    dialogue = [a.prompt for a in answers].index(answers[-1].prompt)
    assert sum(sizes[:dialogue]) < 60 <= sum(sizes)
    asked = len(vllm.bodies)
    fetch(vllm, config=replace(CONFIG, max_tokens=60, rows=1))
    assert len(vllm.bodies) == asked


QUESTIONS = ("Schreibe einen Satz über Äpfel und Grüße.", "List three emoji 🎉 with names.",
             "Write a Python function that reverses a string.", "写一句关于雨的话。")  # fmt: skip


REAL_CONFIG = AnswerConfig(rows=6, max_prompt_tokens=200, max_new_tokens=12, max_turns=2, sampled_share=0.5)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real target, prompts, and the samples that it makes of them by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
        target = load_target("smollm2-135m", dtype="float32", device="cpu")
    prompts = [Prompt(str(i), (question, "Tell me more.")) for i, question in enumerate(QUESTIONS)]
    folder = tmp_path_factory.mktemp("real")
    return target, prompts, everything(make_answers(target, prompts, folder, REAL_CONFIG, Console(file=io.StringIO())))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "texts"])
def test_a_real_model_is_answered_for_token_by_token(ids, real, tmp_path, monkeypatch):
    target, prompts, expected = real
    if not ids:
        monkeypatch.setattr(server_module, "EXTENSIONS", {"top_k": -1})
    fetch = Fetch(target, tmp_path / "answers")
    with serving(target=target, plain=True) as running:
        folder = fetch(running, prompts, REAL_CONFIG, patience=300.0)
    store = make_answers(target, prompts, tmp_path / "data", REAL_CONFIG, Console(file=io.StringIO()), answers=folder)
    found = everything(store)
    assert "100% of the endpoint's greedy tokens" in fetch.printed
    assert len(found) == len(expected) if ids else len(expected) // 2 <= len(found)  # emoji may be cut in a text
    assert ("left out" in fetch.printed) == (len(found) < len(expected))
    for name, sample in found.items():
        assert sample.tokens.tolist() == expected[name].tokens.tolist()


# resumed


def test_what_is_missing_is_asked_for_after_an_interruption(vllm, fetch):
    expected = by_turn(fetch(vllm))
    fetch.folder = fetch.folder.with_name("other")
    keep, seen = module._Run._keep, []

    def stopped(run, answer):
        keep(run, answer)
        seen.append(answer)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module._Run, "_keep", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetch(vllm)
    first = by_turn(AnswerFolder.open(fetch.folder))
    assert 7 <= len(first) < len(expected)
    with stub(new_target()) as second:
        assert by_turn(fetch(second)) == expected
        asked = [body for body in second.bodies if body["max_tokens"] != server_module.TRIED_TOKENS]
        assert len(asked) == len(expected) - len(first)
        del second.bodies[:]
        assert by_turn(fetch(second)) == expected
        assert second.bodies == []


def test_answers_of_other_settings_are_never_mixed(vllm, fetch):
    fetch(vllm)
    with pytest.raises(BeagleError, match="holds answers of another sampling; choose another folder"):
        fetch(vllm, config=replace(CONFIG, temperature=0.9))


# a server that fails


def test_short_failures_are_waited_for(vllm, fetch, monkeypatch):
    expected = by_turn(fetch(vllm, PROMPTS[:6]))
    fetch.folder = fetch.folder.with_name("other")
    numbers = count()
    lost = [
        (503, {"error": {"message": "loading"}}),
        (429, {"error": {"message": "busy"}}),
        b"",
        b"HTTP/1.1 200 OK\r\n",
    ]

    def failing(path, body, answer):
        n = next(numbers)
        whole = json.dumps(answer).encode()
        cut = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(whole)
        return [*lost, cut + whole[:40]][n // 2 % 5] if n % 2 else answer

    vllm.change = failing
    assert by_turn(fetch(vllm, PROMPTS[:6])) == expected


def test_a_server_that_is_down(fetch):
    with pytest.raises(BeagleError, match=r"can't be reached .*; check the address and that the server runs") as raised:
        fetch("http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in str(raised.value)


@pytest.mark.parametrize("how", ["silent", "failing", "down", "busy"])
def test_a_server_that_stops_answering_is_given_up_and_nothing_is_lost(fetch, how):
    with stub(new_target()) as server:
        expected = by_turn(fetch(server, PROMPTS[:8]))
        fetch.folder = fetch.folder.with_name(how)
        numbers, waits = count(), threading.Event()

        def stops(path, body, answer):
            if next(numbers) < server_module.TRIES + 5:
                return answer
            if how == "silent":
                waits.wait(20)
            status = {"failing": (500, {"error": {"message": "out of memory"}}), "busy": (429, {"error": {}})}
            return status.get(how, b"")

        server.change = stops
        message = {
            "silent": "gave no answer for 1 seconds; lower answers.rows",
            "busy": "gave no answer for 1 seconds; lower answers.rows",
            "failing": r"status 500 \(out of memory\); see the server's log",
            "down": "can't be reached",
        }[how]
        with pytest.raises(BeagleError, match=message) as raised:
            fetch(server, PROMPTS[:8], patience=1.0)
        assert "nothing is lost" in str(raised.value)
        waits.set()
        assert len(AnswerFolder.open(fetch.folder).read()) == 5
        server.change = lambda path, body, answer: answer
        assert by_turn(fetch(server, PROMPTS[:8])) == expected


def test_a_full_disk_keeps_what_is_there(vllm, fetch, monkeypatch):
    monkeypatch.setattr(module, "SAVE_ANSWERS", 4)
    save, times = answer_files.save_file, count()

    def full(*args, **options):
        if next(times) == 2:
            raise OSError(28, "No space left on device")
        save(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(answer_files, "save_file", full)
        with pytest.raises(BeagleError, match=r"cannot write '.*answers-00000.safetensors': .*No space left"):
            fetch(vllm)
    kept = by_turn(AnswerFolder.open(fetch.folder))
    assert len(kept) >= 8
    found = by_turn(fetch(vllm))
    assert found.items() >= kept.items()
    assert len(found) > len(kept)


# a server of another kind, or another model


def test_a_model_that_the_server_lacks(served, fetch):
    with pytest.raises(BeagleError, match=r"has no model 'other' \(.*\); name one of: tiny"):
        fetch(served, model="other")


def test_an_address_of_something_else(served, fetch):
    with pytest.raises(BeagleError, match="is no endpoint of OpenAI's API"):
        fetch(served.url + "/v2")


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_address(url):
    with pytest.raises(BeagleError, match="give one such as http://host:8000/v1"):
        Endpoint(url, "tiny")


def test_a_key_that_the_server_wants(fetch, monkeypatch):
    with serving(target=new_target(), api_key="secret") as running:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(BeagleError, match=r"status 401 .*; put its key into OPENAI_API_KEY"):
            fetch(running)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert len(fetch(running, PROMPTS[:2]).read()) > 1


def test_another_models_answers_are_refused(fetch):
    with (
        stub(new_target(seed=1)) as server,
        pytest.raises(BeagleError, match=r"'tiny' is another model than tiny: .*%"),
    ):
        fetch(server)
    assert AnswerFolder.open(fetch.folder).read() == []


def other_prompt(path, body, answer):
    answer["usage"]["prompt_tokens"] += 3
    return answer


def other_prompt_ids(path, body, answer):
    answer["prompt_token_ids"] = [5] * answer["usage"]["prompt_tokens"]
    return answer


def other_vocabulary(path, body, answer):
    answer["choices"][0]["token_ids"][0] = 64
    return answer


def other_words(path, body, answer):
    del answer["choices"][0]["token_ids"]
    answer["choices"][0]["message"]["content"] = "Grüße"
    return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_prompt,
            r"has another tokenizer or chat template: it encodes the prompt as \d+ tokens, and the target as",
        ),
        (other_prompt_ids, "encodes the prompt as 3 tokens, which are not the target's 3"),
        (other_vocabulary, "has another tokenizer: its answer has tokens that the target lacks"),
        (other_words, "its text tokenised again is another answer; use a server that takes return_token_ids"),
        (lambda *_: "hello", "does not answer as OpenAI's API does"),
        (lambda *_: {"choices": []}, "does not answer as OpenAI's API does"),
    ],
    ids=["count", "ids", "vocabulary", "words", "text", "nothing"],
)
def test_another_tokenizer_is_refused(vllm, fetch, change, message):
    vllm.change = change
    with pytest.raises(BeagleError, match=message) as raised:
        fetch(vllm)
    assert vllm.url in str(raised.value)
    assert "\n" not in str(raised.value)


def cut(path, body, answer):
    """An answer that a limit of the server ends."""
    choice = answer["choices"][0]
    if body["max_tokens"] == LIMIT + 1 and choice["finish_reason"] == "length":
        choice["token_ids"] = choice["token_ids"][:5]
    return answer


def test_truncated_answers_are_left_out_with_a_line(vllm, fetch):
    expected = by_turn(fetch(vllm))
    fetch.folder = fetch.folder.with_name("other")
    vllm.change = cut
    found = by_turn(fetch(vllm))
    assert 0 < len(found) < len(expected)
    assert found.items() <= expected.items()
    assert all(ended for _, ended, *_ in found.values())
    assert "answers are left out: the server cut the answer before it was as long as was asked for" in fetch.printed
    vllm.change = lambda path, body, answer: answer
    assert by_turn(fetch(vllm)) == expected  # asked again, as all that is missing


def test_a_server_that_refuses_each_prompt_in_other_words(vllm, fetch):
    numbers = count(2000)

    def refuses(path, body, answer):
        short = body["max_tokens"] == server_module.TRIED_TOKENS or len(body["messages"][-1]["content"]) < 8
        words = f"maximum context length is 20 tokens, you requested {next(numbers)}"
        return answer if short else (400, {"error": {"message": words}})

    vllm.change = refuses
    found = by_turn(fetch(vllm))
    assert found
    assert fetch.printed.count("answers are left out: the server refuses it (maximum context length") == 4
    assert "answers are left out for other reasons" in fetch.printed
    vllm.change = lambda *_: (400, {"error": {"message": "no"}})
    fetch.folder = fetch.folder.with_name("none")
    with pytest.raises(BeagleError, match=r"the server refuses it \(no\); see the server's log"):
        fetch(vllm)


def test_a_server_whose_answers_are_all_truncated_is_refused(vllm, fetch, target):
    target.eos_ids = vllm.model.target.eos_ids = frozenset()
    vllm.change = cut
    with pytest.raises(BeagleError, match=r"cut the answer .*; raise the server's limits of length and time"):
        fetch(vllm)


def test_a_server_without_token_ids_gives_texts(vllm, fetch, own, target, tmp_path):
    vllm.ids = False
    store = make_answers(target, PROMPTS, tmp_path / "data", CONFIG, Console(file=io.StringIO()), answers=fetch(vllm))
    same_samples(everything(store), own)


# the command


@pytest.fixture
def saved(tmp_path):
    tiny_model().save_pretrained(tmp_path / "target")
    tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def test_a_head_is_trained_on_a_servers_answers(train, saved, tmp_path):
    plain = Target(tiny_model(), tokenizer(), "tiny")
    options = ["--target", saved, "--answers-model", "tiny"]
    with serving(target=plain) as running:
        ended = train(tmp_path / "run", *options, "--answers-from", running.url + "/v1")
        assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "head" / "config.json").is_file()
    assert train(tmp_path / "own", "--target", saved).code == 0
    assert stored(tmp_path / "run") == stored(tmp_path / "own")
    again = train(tmp_path / "run", *options, "--answers-from", running.url)  # it is down, and nothing is to be asked
    assert again.code == 0, again.err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_goes_on(train, saved, tmp_path, monkeypatch, how):
    keep, seen = module._Run._keep, []

    def stopped(run, answer):
        keep(run, answer)
        seen.append(answer)
        if len(seen) == 4:
            signal.raise_signal(how)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    with stub(Target(tiny_model(), tokenizer(), "tiny")) as server:
        options = ["--target", saved, "--answers-model", "tiny", "--answers-from", server.url]
        with monkeypatch.context() as patched:
            patched.setattr(module._Run, "_keep", stopped)
            ended = train(tmp_path / "run", *options)
        assert ended.code == 130
        assert "run the same command again" in " ".join(ended.err.split())
        assert "Traceback" not in ended.err
        assert 4 <= len(AnswerFolder.open(tmp_path / "run" / "answers").read()) < 12
        ended = train(tmp_path / "run", *options)
        assert ended.code == 0, ended.err
    assert train(tmp_path / "own", "--target", saved).code == 0
    assert stored(tmp_path / "run") == stored(tmp_path / "own")


def test_bad_input_to_the_command(train, saved, beagle, prompts, tmp_path, monkeypatch):
    options = ["--target", saved]
    down = ["--answers-from", "http://127.0.0.1:9"]
    train(tmp_path / "run", *options, *down).refusal("--answers-from", "--answers-model")
    train(tmp_path / "run", *options, *down, "--answers-model", "tiny").refusal(
        "http://127.0.0.1:9", "can't be reached"
    )
    train(tmp_path / "run", *options, "--answers-model", "tiny").refusal("--answers-model", "--answers-from")
    both = train(tmp_path / "run", *options, *down, "--answers-model", "tiny", "--answers", tmp_path)
    both.refusal("--answers", "leave one of them out")
    given = train(tmp_path / "run", *options, *down, "--answers-model", "tiny", answers={"source": "given"})
    given.refusal("answers.source: given", "leave one of them out")
    out = ["--out", tmp_path / "none", *options, *down, "--answers-model", "tiny"]
    beagle("train", *out).refusal("--answers-from", "--prompts")
    monkeypatch.setitem(sys.modules, "openai", None)
    missing = train(tmp_path / "run", *options, *down, "--answers-model", "tiny")
    missing.refusal("openai", "pip install 'beagle-decoding[endpoint]'")
