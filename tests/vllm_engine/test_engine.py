"""The shipped head in vLLM on a CPU: greedy answers are vLLM's own, drafts are those of our chain.

In an environment of its own (make test-vllm). Everything in float32: in half precision near-ties flip with the
batch, with drafts or without.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from processes import Server, free_port

import beagle
from beagle.decoding.stats import Stats
from beagle.drafters.checkpoint import find_head, load_head
from beagle.drafters.head_drafter import HeadDrafter
from beagle.targets.chat import encode
from beagle.targets.loading import DEFAULT_TARGET, resolve
from beagle.vllm.config import method_for
from beagle.vllm.export import export
from conftest import REAL_CACHE

os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "NUMBA_NUM_THREADS": "1"}
# the engine in this process: starting others is most of a start; the server and the workers below have theirs
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]  # each start of vLLM takes a while

DEPTH = 4
TOKENS = 40
QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "A shop sells 7 red and 5 blue pens a day. How many pens does it sell in 6 days?",
    "Name three rivers in Europe and one fact about each. " * 8,  # more than one chunk of prefill
)


@dataclass(frozen=True)
class Folders:
    target: str
    vllm: str
    speculators: str


@pytest.fixture(scope="module")
def model() -> beagle.Model:
    """Our engine with the chain that vLLM drafts; answers don't end early, as vLLM is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
        plan = beagle.TreePlan("chain", DEPTH)
        model = beagle.load(DEFAULT_TARGET, draft="head", dtype="float32", device="cpu", plan=plan)
    model.target.eos_ids = frozenset()
    return model


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    return [encode(model.target, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> Folders:
    root = tmp_path_factory.mktemp("exported")
    head = load_head(find_head("head", DEFAULT_TARGET), model.target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
        target = resolve(DEFAULT_TARGET)
    export(head, model.target, root / "vllm")
    export(head, model.target, root / "spec", to="speculators", depth=DEPTH, verifier=target)
    return Folders(target, str(root / "vllm"), str(root / "spec"))


class Engine:
    """vLLM, for a while."""

    def __init__(self, model: str, draft: str | None = None, **options) -> None:
        if draft is not None:
            options["speculative_config"] = {
                "method": method_for(draft), "model": draft, "num_speculative_tokens": DEPTH
            }  # fmt: skip
        settings = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "seed": 0}
        settings |= {"disable_log_stats": False, "enable_prefix_caching": False}
        self.llm = LLM(model, **{**settings, **options})

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def answers(self, prompts: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def counters(self) -> list[int]:
        """Drafts, drafted tokens, and accepted ones at each depth."""
        found = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in self.llm.get_metrics()}
        at = found["accepted_tokens_per_pos"].values
        assert sum(at) == found["accepted_tokens"].value
        return [found["drafts"].value, found["draft_tokens"].value, *at]

    def counted(self, prompts: list[list[int]], tokens: int = TOKENS) -> tuple[list[list[int]], list[int]]:
        before = self.counters()
        answers = self.answers(prompts, tokens)
        return answers, [b - a for a, b in zip(before, self.counters(), strict=True)]


def chain(model: beagle.Model, ids: list[int], tokens: int = TOKENS) -> tuple[list[int], list[int]]:
    """Our engine's answer and what vLLM would count; vLLM drafts in full until the limit is reached, so ours runs on."""
    stats = Stats()
    pieces = model.stream(ids, max_new_tokens=tokens + DEPTH + 1, stats=stats)
    answer = [token for piece in pieces for token in piece.token_ids][:tokens]
    made, passes = 1, []
    for accepted in stats.accepted:
        if made >= tokens:
            break
        passes.append(accepted)
        made += accepted + 1
    at = [sum(accepted >= depth for accepted in passes) for depth in range(1, DEPTH + 1)]
    return answer, [len(passes), DEPTH * len(passes), *at]


@pytest.fixture(scope="module")
def ours(model, prompts) -> list[tuple[list[int], list[int]]]:
    return [chain(model, ids) for ids in prompts]


@pytest.fixture(scope="module")
def plain(folders, prompts) -> list[list[int]]:
    """vLLM's own answers, without speculation: one at a time and all at once."""
    with Engine(folders.target) as engine:
        alone = [engine.answers([ids])[0] for ids in prompts]
        assert engine.answers(prompts) == alone
    return alone


def total(counts: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*counts, strict=True)]


def test_answers_and_counters(folders, prompts, plain, ours):
    with Engine(folders.target, folders.vllm) as engine:
        for ids, own, (answer, counts) in zip(prompts, plain, ours, strict=True):
            assert engine.counted([ids]) == ([own], counts)
            assert answer == own
        assert engine.counted(prompts) == (plain, total([counts for _, counts in ours]))
    assert sum(counts[2] for _, counts in ours) > len(QUESTIONS) * 5  # drafts are accepted at all


def test_chunked_prefill(folders, prompts, plain, ours):
    """The longest prompt takes four chunks, between other requests' steps; the head's keys cover all of them."""
    assert len(prompts[-1]) > 3 * 32
    with Engine(folders.target, folders.vllm, max_num_batched_tokens=48, enable_chunked_prefill=True) as engine:
        assert engine.counted(prompts) == (plain, total([counts for _, counts in ours]))


def test_a_speculators_folder_is_served_as_the_model(folders, prompts, plain, ours):
    with Engine(folders.speculators) as engine:
        assert engine.counted(prompts[:1]) == (plain[:1], ours[0][1])


def test_tensor_parallel(folders, prompts, plain, ours):
    """Nine heads on three workers."""
    with Engine(folders.target, folders.vllm, tensor_parallel_size=3) as engine:
        assert engine.counted(prompts[:2]) == (plain[:2], total([counts for _, counts in ours[:2]]))


def test_the_server(model, folders, plain, tmp_path):
    """`beagle serve --engine vllm`, compiled: greedy requests are answered with drafts, others refused."""
    port = free_port()
    command = [sys.executable, "-m", "beagle", "serve", "--engine", "vllm", "--port", str(port)]
    environment = {**os.environ, "BEAGLE_CACHE": str(REAL_CACHE), "VLLM_API_KEY": ""}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    log = Path(tmp_path / "log")
    options = ["--dtype", "float32", "--context", "512", "--depth", str(DEPTH), "--api-key", "secret"]
    with Server([*command, *options], port, environment, log) as server:
        server.wait(1200)
        with httpx.Client(base_url=server.url, timeout=300) as http:
            body = {"model": DEFAULT_TARGET, "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 16}
            path = "/v1/chat/completions"
            assert http.post(path, json=body).status_code == 401
            http.headers["authorization"] = "Bearer secret"
            sampled = http.post(path, json={**body, "temperature": 0.7})
            assert sampled.status_code == 400
            assert "55005" in sampled.json()["error"]["message"]
            texts = set()
            for settings in ({}, {"temperature": 0}):  # greedy is the default, too
                answer = http.post(path, json=body | settings)
                assert answer.status_code == 200, answer.text
                texts.add(answer.json()["choices"][0]["message"]["content"])
            assert texts == {model.target.tokenizer.decode(plain[0][:16])}
            metrics = http.get("/metrics").text
            accepted = [x for x in metrics.splitlines() if x.startswith("vllm:spec_decode_num_accepted_tokens_total")]
            assert sum(float(line.split()[-1]) for line in accepted) > 0
    assert "55005" in log.read_text()  # told at the start, too
    assert "secret" not in log.read_text()


def test_a_head_as_trained_is_refused_with_the_remedy(folders):
    with pytest.raises(Exception, match="beagle export"):
        Engine(folders.target, str(find_head("head", DEFAULT_TARGET)))


def test_settings_that_the_shipped_head_has_not(tmp_path):
    """A whole vocabulary, few KV heads, the top state alone, one block and no newest state.

    On a small target with random weights, eager and compiled.
    """
    from transformers import AutoTokenizer

    from beagle.targets.target import Target
    from conftest import LIVELY, tiny_head, tiny_model, tiny_tokenizer

    inner = tiny_model(hidden_size=128, head_dim=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    inner.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = Target(inner, AutoTokenizer.from_pretrained(tmp_path / "target"), "tiny")
    target.eos_ids = frozenset()
    head = tiny_head(target, scale=LIVELY["beagle"], newest_state="none", num_kv_heads=2)
    export(head, target, tmp_path / "draft")
    prompts = [
        [1, *torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist()] for n in range(3, 11)
    ]
    model = beagle.Model(target, HeadDrafter(target, head), beagle.TreePlan("chain", DEPTH))
    ours = [chain(model, ids, 60) for ids in prompts]
    assert sum(counts[2] for _, counts in ours) > 5  # by luck, but the same luck every time
    expected = [answer for answer, _ in ours], total([counts for _, counts in ours])
    for eager in (True, False):
        with Engine(str(tmp_path / "target"), str(tmp_path / "draft"), enforce_eager=eager) as engine:
            assert engine.counted(prompts, 60) == expected
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["draft_vocab_size"] is None
