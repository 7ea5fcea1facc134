"""What the server refuses and how, how it stops, and that no request brings it down."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import httpx
import openai
import pytest
from hypothesis.errors import Unsatisfiable

from beagle.cli import options
from beagle.errors import BeagleError
from beagle.serving.engine import Limits
from beagle.serving.server import bind
from serving import MESSAGES, serving, wait_for


@pytest.fixture(scope="module")
def served():
    with serving(Limits(answer=24)) as running:
        yield running


# refusals


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": ...}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "w3"}, "messages"),
        ({"messages": [{"role": "king", "content": "w3"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"model": ...}, "model"),
        ({"model": 3}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 100_000}, None),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, None),
        ({"stop": ["a"] * 17}, None),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"beagle": {"draft": "no"}}, "beagle.draft"),
        ({"messages": [{"role": "user", "content": "w3 " * 600}]}, None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
        ({"logit_bias": {"\ud800": "x"}}, None),
    ],
    ids=str,
)  # fmt: skip
def test_bad_requests(served, changes, param):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "temperature": 0, **changes}
    content = json.dumps({k: v for k, v in body.items() if v is not ...})  # ASCII, with lone surrogates escaped
    with served.http as http:
        answer = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "changes",
    [{"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [64]}, {"prompt": [-1]}, {"prompt": [3, "w3"]}, {"prompt": ["w3"] * 17},
     {"prompt": ["w3"] * 5, "n": 4}, {"prompt": "w3", "echo": True}, {"prompt": "w3", "suffix": "w"}, {"prompt": "w3", "best_of": 4},
     {"prompt": "w3", "logprobs": 6}, {"prompt": None}, {"prompt": "w3 " * 600}],
    ids=lambda changes: str(changes)[:60],
)  # fmt: skip
def test_bad_completions(served, changes):
    answer = served.post("/v1/completions", messages=..., **changes)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_neutral_values_are_taken(served):
    neutral = {"tools": [], "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me"}
    neutral |= {
        "response_format": {"type": "text"},
        "n": None,
        "stop": None,
        "seed": None,
        "stream": None,
        "what": None,
    }
    assert served.post(**neutral).status_code == 200
    parts = [{"type": "text", "text": "w5 w9"}, {"type": "text", "text": " w33"}]
    same = served.post(messages=[{"role": "user", "content": parts}], seed=0)
    assert same.json()["choices"] == served.post(seed=0).json()["choices"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}'])
def test_bodies_that_are_no_request(served, content):
    with served.http as http:
        answer = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_oversize_bodies_are_refused():
    with serving(Limits(body=2000)) as running, running.http as http:
        long = [{"role": "user", "content": "w3 " * 1000}]
        declared = running.post(messages=long)

        def chunked():
            yield b'{"model": "tiny", "pad": "'
            for _ in range(100):
                yield b"x" * 100

        streamed = http.post("/v1/chat/completions", content=chunked())
        huge = [http.post("/v1/completions", content=b"x" * 3_000_000) for _ in range(5)]  # too long for any buffer
        for answer in (declared, streamed, *huge):
            assert answer.status_code == 413
            assert "2000" in answer.json()["error"]["message"]
        assert running.post().status_code == 200


def test_unknown_models_paths_and_methods(served):
    with pytest.raises(openai.NotFoundError, match="tiny"):
        served.ask(model="gpt-4")
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("gpt/4")
    assert [m.id for m in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").max_model_len == 512
    with served.http as http:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/docs", 404),
            ("GET", "/v1/chat/completions", 405),
            ("DELETE", "/v1/models", 405),
        ):
            answer = http.request(method, path)
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_failures_of_ours_are_told(served, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("secret")

    monkeypatch.setattr(served.model.target, "verify", broken)
    answer = served.post(max_tokens=8, messages=[{"role": "user", "content": "w9"}])
    assert answer.status_code == 500 or answer.json()["choices"]
    stream = served.post(max_tokens=8, stream=True)
    assert '"type":"server_error"' in stream.text
    assert "secret" not in stream.text
    with pytest.raises(openai.APIError, match="RuntimeError"):
        list(served.ask(stream=True))
    monkeypatch.undo()
    assert served.post().status_code == 200  # the engine goes on


def test_api_key():
    with serving(api_key="key-1") as running:
        for key, allowed in (("key-1", True), ("key-2", False), ("", False)):
            client = openai.OpenAI(base_url=running.url + "/v1", api_key=key or "x", max_retries=0)
            if allowed:
                assert client.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
        with running.http as http:
            assert http.get("/health").status_code == http.get("/").status_code == 200
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                assert http.get(path).status_code == 401
            assert http.get("/metrics", headers={"authorization": "Bearer key-1"}).status_code == 200
            assert http.post("/v1/completions", content=b"x" * 5_000_000).status_code == 401


# what the operator sees


def test_health_and_page(served):
    with served.http as http:
        assert http.get("/health").json() == {"status": "ok", "live": 0, "waiting": 0}
        page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for outside in ("http://", "https://", "//cdn", "@import", "url("):
        assert outside not in page.text.replace("http://www.w3.org/2000/svg", "")


# the end


def test_shutdown_finishes_what_is_live_and_refuses_the_rest():
    with serving(Limits(live=1, grace=120), endless=True, plain=True, slow=0.02) as running:
        expected = running.model.generate(MESSAGES, max_new_tokens=60).text
        answers = {}

        def ask(name):
            answers[name] = running.post(max_tokens=60)

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("live", "waiting")]
        threads[0].start()
        wait_for(lambda: running.engine.live == 1)
        threads[1].start()
        wait_for(lambda: running.engine.waiting == 1)
        running.server.should_exit = True
        for thread in threads:
            thread.join()
        assert answers["live"].json()["choices"][0]["message"]["content"] == expected
        assert answers["waiting"].status_code == 503
        running.thread.join(120)
        assert not running.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            running.post()


def test_shutdown_cuts_what_takes_too_long():
    with serving(Limits(grace=0.3), endless=True, plain=True, slow=0.02) as running:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(running.post(max_tokens=400)))
        thread.start()
        wait_for(lambda: running.engine.live == 1)
        running.server.should_exit = True
        thread.join()
        running.thread.join(120)
        assert not running.thread.is_alive()
        assert answers[0].json()["beagle"]["cut"] == "shutdown"


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_as_a_process(folders, tmp_path, sign):
    command = [sys.executable, "-m", "beagle", "serve", *folders.options, "--port", "0", "--nodes", "4"]
    environment = {**os.environ, "BEAGLE_API_KEY": "k"}
    process = subprocess.Popen(
        [*command, "--name", "tiny"], stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    try:
        lines = (re.search(r"serving tiny on (http://127\.0\.0\.1:\d+)", line) for line in process.stderr)
        address = next(found[1] for found in lines if found)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0, timeout=300)
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, temperature=0)
        assert answer.choices[0].message.content
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=300, stream=True)
        next(iter(stream))
        process.send_signal(sign)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_bad_options_of_the_command(folders, beagle, monkeypatch):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        beagle("serve", *folders.options, "--port", port).refusal("127.0.0.1", port, "another host or port")
    beagle("serve", *folders.options, "--host", "no.such.host.invalid").refusal("no.such.host.invalid")
    beagle("serve", *folders.options, "--api-key", "clé").refusal("API key")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "beagle.serving.server")
    beagle("serve", *folders.options).refusal("uvicorn", "pip install 'beagle-decoding[serve]'")


def test_retry_after_is_bounded():
    with serving(Limits(live=1, queue=0), endless=True) as running:
        running.engine._mean_seconds = 1e9
        failure = running.engine._busy("no")
        assert failure.retry_after == 60


# fuzzing


@pytest.mark.slow
def test_no_request_brings_the_server_down(served):
    """Requests made from our own description of the API, right and wrong ones: whatever they hold, no 5xx."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(served.url + "/openapi.json")
    statuses: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:

            @settings(max_examples=20, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                answer = case.call(timeout=300)
                statuses.setdefault(operation.path, set()).add(answer.status_code)  # noqa: B023
                assert answer.status_code < 500, answer.text
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"]

            with suppress(Unsatisfiable):  # nothing can be wrong about a path without parameters
                check()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= set(statuses)
    assert 400 in statuses["/v1/chat/completions"]
    assert served.post().status_code == 200


def test_the_engines_thread_loads_the_model(folders, beagle, monkeypatch):
    """Another one would leave it slow: see ``beagle.threads.ModelThread``."""

    def load(*arguments, **options):
        raise BeagleError(f"loaded by {threading.current_thread().name}")

    monkeypatch.setattr(options, "load_model", load)
    beagle("serve", *folders.options, "--port", "0").refusal("loaded by beagle-engine")
