"""A live server over a tiny model, on a loopback port of this process."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai
import torch

from beagle.drafters.base import TreePlan
from beagle.model import Model
from beagle.serving.app import create_app
from beagle.serving.engine import Engine
from beagle.serving.server import Server, bind
from conftest import tiny_drafter, tiny_target

PLAN = TreePlan("dynamic", depth=4, top_k=4, nodes=10)
MESSAGES = [{"role": "user", "content": "w5 w9 w33"}]
PROMPTS = [f"w{3 + i} w{40 - i} w{9 + 2 * i}" for i in range(8)]


@dataclass
class Running:
    """A live server, its model, and clients of it."""

    model: Model
    engine: Engine
    server: Server
    thread: threading.Thread
    url: str

    @property
    def client(self):
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=300)

    @property
    def http(self):
        return httpx.Client(base_url=self.url, timeout=300)

    def ask(self, messages=MESSAGES, **options):
        options = {"model": "tiny", "temperature": 0, "max_tokens": 12, **options}
        return self.client.chat.completions.create(messages=messages, **options)

    def post(self, path="/v1/chat/completions", **changes):
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "temperature": 0, **changes}
        with self.http as http:
            return http.post(path, json={k: v for k, v in body.items() if v is not ...})

    def idle(self):
        wait_for(lambda: self.engine.live == self.engine.waiting == 0)


def wait_for(condition, seconds=240.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def follow(target, scores):
    """Make the logits behind a token a row of ``scores`` ``[vocabulary, vocabulary]``, whatever was before it."""
    prefill, verify = target.prefill, target.verify

    def marked(states, tokens):
        states = torch.zeros_like(states)
        states[..., 0] = tokens.to(states.dtype)
        return states

    target.prefill = lambda tokens, cache: marked(prefill(tokens, cache), tokens)
    target.verify = lambda cache, tokens, *rest: marked(verify(cache, tokens, *rest), tokens)
    target.logits = lambda states: scores[states[..., 0].long()]


def events(answer):
    """Choices of a streamed answer's chunks."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [choice for line in lines for choice in json.loads(line)["choices"]]


@contextmanager
def serving(limits=None, *, target=None, endless=False, api_key=None, plain=False, slow=0.0, exact=False):
    target = target or tiny_target()
    if endless:
        target.eos_ids = frozenset()
    model = Model(target, None if plain else tiny_drafter(target), PLAN)
    if slow:
        verify = target.verify

        def slowly(*arguments):
            time.sleep(slow)
            return verify(*arguments)

        target.verify = slowly
    engine = Engine(model, limits, exact=exact)
    engine.start()
    listener = bind("127.0.0.1", 0)
    server = Server(create_app(engine, name="tiny", api_key=api_key), engine)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    running = Running(model, engine, server, thread, f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        wait_for(lambda: server.started)
        yield running
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive(), "the server hangs"
        assert engine.join(120), "the engine hangs"


def text(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
