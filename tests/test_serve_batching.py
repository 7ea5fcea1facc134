"""Live requests share the passes: each gets what it would get alone, and leaves nothing behind."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from beagle.errors import BeagleError
from beagle.model import Model
from beagle.serving import engine as engine_module
from beagle.serving.engine import Limits
from beagle.targets.cache import KVCache
from conftest import tiny_target
from serving import PROMPTS, serving, text, wait_for


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def words(seed: int, count: int) -> str:
    return " ".join(f"w{number}" for number in random.Random(seed).choices(range(3, 64), k=count))


def kinds(count: int):
    """Requests of every kind: dialogues with a common beginning, short and long, greedy and sampled."""
    rng = random.Random(3)
    for i in range(count):
        messages = [{"role": "system", "content": words(0, 40)}] if i % 2 else []
        messages.append(user(words(i, rng.choice((1, 4, 60)))))
        options = {"max_tokens": rng.choice((1, 3, 15, 40))}
        if i % 3 == 0:
            options |= {"temperature": 1.1, "top_p": 0.9, "seed": i}
        if i % 5 == 0:
            options["frequency_penalty"] = 0.7
        yield messages, options


def library(model: Model, messages, options, exact: bool = False) -> str:
    sampling = {k: v for k, v in options.items() if k in ("temperature", "top_p", "seed", "frequency_penalty")}
    return model.generate(messages, max_new_tokens=options["max_tokens"], exact=exact, **sampling).text


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("prefix_cache", [0, 200])
def test_everybody_gets_the_librarys_answer(exact, prefix_cache, monkeypatch):
    monkeypatch.setattr(engine_module, "PIECE", 16)
    with serving(Limits(live=3, prefix_cache=prefix_cache), exact=exact) as running:
        plain = Model(running.model.target)
        asked = list(kinds(16))
        expected = [library(plain, *one, exact=exact) for one in asked]

        def ask(i: int) -> str:
            messages, options = asked[i]
            time.sleep(random.Random(i).random() / 10)
            if i % 4 == 0:
                return text(running.ask(messages, stream=True, **options))
            return running.ask(messages, **options).choices[0].message.content

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(len(asked)))) == expected
        running.idle()


def test_a_second_turn_runs_what_is_new():
    with serving(endless=True) as running:
        prefill, lengths = running.model.target.prefill, []
        running.model.target.prefill = lambda ids, cache: (lengths.append(ids.shape[1]), prefill(ids, cache))[1]
        messages = [user("w5 w9 w33 w12 w14")]
        first = running.ask(messages, max_tokens=8)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        answer = first.choices[0].message.content
        messages += [{"role": "assistant", "content": answer}, user("w40 w41")]
        second = running.ask(messages, max_tokens=8)
        cached = second.usage.prompt_tokens_details.cached_tokens
        assert lengths == [first.usage.prompt_tokens, second.usage.prompt_tokens - cached]
        assert cached >= first.usage.prompt_tokens  # the template starts the answer as the model was asked to
        assert (
            second.choices[0].message.content == Model(running.model.target).generate(messages, max_new_tokens=8).text
        )
        streamed = list(running.ask(messages, max_tokens=8, stream=True, stream_options={"include_usage": True}))[
            -1
        ].usage
        assert streamed.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1


def test_several_choices_count_their_prompt_once():
    with serving(endless=True) as running:
        options = {"max_tokens": 6, "temperature": 1.2, "seed": 4}
        answer = running.ask(n=4, **options)
        usage = answer.usage
        assert usage.prompt_tokens == 5
        assert usage.prompt_tokens_details.cached_tokens == 0  # nothing of the request was there
        again = running.ask(n=4, **options)
        assert again.usage.prompt_tokens_details.cached_tokens == 4
        assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
        lines = running.http.get("/metrics").text.splitlines()
        metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(metrics["beagle_cached_prompt_tokens_total"]) == 4
        completion = running.client.completions.create(
            model="tiny", prompt=["w3 w4 w5 w6", "w3 w4 w7"], n=2, max_tokens=4, temperature=1.0
        )
        assert completion.usage.prompt_tokens == 7
        assert completion.usage.prompt_tokens_details.cached_tokens == 2  # the second one's, from the first


def test_a_cancelled_long_prompt_lets_others_on(monkeypatch):
    """It is given up between two of its pieces."""
    monkeypatch.setattr(engine_module, "PIECE", 8)
    with serving(Limits(live=2), endless=True, plain=True, slow=0.01) as running:
        live = running.ask(max_tokens=300, stream=True)
        next(iter(live))
        job = running.engine.submit(work(running, words(1, 400)), lambda event: None)
        wait_for(lambda: running.engine.live == 2)
        job.cancel()
        wait_for(lambda: running.engine.live == 1)
        assert job.first_token is None
        assert running.ask([user("w3")], max_tokens=3).usage.completion_tokens == 3
        live.close()
        running.idle()


def work(running, content: str, **options):
    from beagle.serving.work import Work

    return Work([[user(content)]], seed=0, max_new_tokens=4, **options)


@pytest.mark.parametrize("where", ["watch", "context", "sampler"])
def test_a_request_that_fails_is_the_only_one(where, monkeypatch):
    with serving(Limits(live=4), endless=True, slow=0.005) as running:
        asked = [([user(prompt)], {"max_tokens": 30}) for prompt in PROMPTS]
        expected = [library(Model(running.model.target), *one) for one in asked]
        if where == "watch":
            monkeypatch.setattr("beagle.serving.choice.Watcher.__call__", lambda self, step: 1 / 0)
            bad = {"logprobs": True}
        elif where == "context":
            context, made = running.model.drafter.context, []

            def failing():
                made.append(None)
                if len(made) == 3:
                    raise RuntimeError("no memory")
                return context()

            running.model.drafter.context = failing
            bad = {}
        else:
            bad = {"logit_bias": {"9": 1}}
            monkeypatch.setattr(
                "beagle.decoding.sampling.Sampler.process", lambda self, logits: 1 / 0 if self._processors else logits
            )

        def ask(i: int):
            messages, options = asked[i]
            return running.post(messages=messages, **options, **(bad if i == 2 else {}))

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        failed = [i for i, answer in enumerate(answers) if answer.status_code == 500]
        assert len(failed) == 1
        for i, answer in enumerate(answers):
            if i not in failed:
                assert answer.json()["choices"][0]["message"]["content"] == expected[i]
        running.idle()
        assert running.engine.healthy


def no_memory(*arguments):
    raise BeagleError("no memory")


def test_the_keys_of_a_failed_request_are_let_go_at_once(monkeypatch):
    """Its error must not hold them: memory may be what was missing."""
    caches = []
    init = KVCache.__init__

    def noted(self, *arguments, **options):
        init(self, *arguments, **options)
        caches.append(weakref.ref(self))

    with serving(Limits(prefix_cache=0), endless=True) as running:
        running.ask()
        running.idle()
        logits = running.model.target.logits
        monkeypatch.setattr(KVCache, "__init__", noted)
        gc.collect()
        gc.disable()
        try:
            running.model.target.logits = no_memory
            assert running.post().status_code == 500
            running.model.target.logits = logits
            running.idle()
            assert running.ask(max_tokens=3).usage.completion_tokens == 3
            running.idle()
            assert len(caches) >= 2
            assert [cache() for cache in caches] == [None] * len(caches)
        finally:
            gc.enable()


def test_each_deadline_is_its_own(monkeypatch):
    """The one whose time is over is cut, those who came later go on."""
    with serving(Limits(live=3, seconds=4.0), endless=True, plain=True, slow=0.02) as running:
        cut = threading.Thread(target=lambda: answers.append(running.post(max_tokens=400).json()))
        answers: list = []
        cut.start()
        time.sleep(3.2)
        later = running.post(max_tokens=50, messages=[user(PROMPTS[3])]).json()
        cut.join()
        assert later["beagle"]["cut"] is None
        assert later["usage"]["completion_tokens"] == 50
        assert answers[0]["beagle"]["cut"] == "time"
        own = tiny_target()  # the same, and not slowed down
        own.eos_ids = frozenset()
        expected = Model(own).generate([user("w5 w9 w33")], max_new_tokens=400).text
        assert expected.startswith(answers[0]["choices"][0]["message"]["content"])


def test_short_requests_pass_by_long_ones(monkeypatch):
    """A long prompt runs in pieces between the passes of others, and ends all the same while others keep coming."""
    monkeypatch.setattr(engine_module, "PIECE", 8)
    with serving(Limits(live=3, prefix_cache=0), endless=True, plain=True, slow=0.002) as running:
        ended: list[str] = []
        live = running.ask(max_tokens=200, stream=True)
        next(iter(live))

        def long() -> None:
            running.post(messages=[user(words(2, 300))], max_tokens=4)
            ended.append("long")

        thread = threading.Thread(target=long)
        thread.start()
        wait_for(lambda: running.engine.live == 2)
        count = 0
        while "long" not in ended and count < 300:
            running.post(messages=[user("w7")], max_tokens=2)
            count += 1
        thread.join()
        assert ended == ["long"]
        live.close()
        running.idle()
