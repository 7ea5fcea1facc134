"""What starts vLLM's server, without vLLM: the command line, its refusals, and the guard before the server."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from beagle.vllm import export as vllm_export
from beagle.vllm import greedy, launch
from beagle.vllm.launch import CPU_DEPTH, Launch


@pytest.fixture
def started(monkeypatch):
    """Where the server would run: its arguments and environment, as far as it is started at all."""
    seen = {}

    def execve(path, arguments, environment):
        seen.update(path=path, arguments=arguments, environment=environment)
        raise SystemExit(0)

    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execve", execve)
    return seen


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


# the line


def test_the_line_is_for_a_shell():
    line = Launch("a target", "a draft's folder", 3, cpu=True).line
    words = shlex.split(line)
    settings, command = [w for w in words if w.split("=")[0].isupper()], words[words.index("python") :]
    assert any(word.startswith("OMP_WAIT_POLICY=") for word in settings)
    assert option(command, "--model") == "a target"
    speculative = json.loads(option(command, "--speculative-config"))
    assert speculative == {"method": "eagle", "model": "a draft's folder", "num_speculative_tokens": 3}


def test_only_what_speculates_on_a_cpu_is_held_to_temperature_0():
    for draft, cpu, guarded in (("d", True, True), ("m", True, True), (None, True, False), ("d", False, False)):
        arguments = Launch("m", draft, cpu=cpu).arguments
        assert ("beagle.vllm.greedy.GreedyOnly" in arguments) == guarded
        assert ("--override-generation-config" in arguments) == guarded
        assert ("--speculative-config" in arguments) == (draft == "d")  # a speculators folder is its own
        assert bool(Launch("m", draft, cpu=cpu).environment) == cpu


def test_threads_set_by_the_user_stay(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    assert Launch("m", "d", cpu=True).environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"


def test_what_was_compiled_once_is_loaded_at_the_next_start(monkeypatch):
    """On a CPU, vLLM can't load what it compiled ahead of time."""
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    assert Launch("m", "d", cpu=True).environment["VLLM_USE_AOT_COMPILE"] == "0"
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    assert Launch("m", "d", cpu=True).environment["VLLM_USE_AOT_COMPILE"] == "1"
    assert "VLLM_USE_AOT_COMPILE" not in Launch("m", "d", cpu=False).environment


@pytest.mark.parametrize(("cores", "threads"), [(8, "7"), (1, "1")])
def test_a_core_is_left_to_the_engine(monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert Launch("m", "d", cpu=True).environment["OMP_NUM_THREADS"] == threads


# what is preloaded


def test_libraries_that_are_there_are_preloaded(monkeypatch, tmp_path):
    """Beside what is set, and never a second OpenMP."""
    openmp = tmp_path / "libiomp5.so"
    openmp.touch()
    monkeypatch.setattr(launch.sys, "platform", "linux")
    monkeypatch.setattr(launch.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(launch, "files", lambda name: [SimpleNamespace(name=openmp.name, locate=lambda: openmp)])
    monkeypatch.setattr(launch, "find_library", {"tcmalloc_minimal": "libtcmalloc_minimal.so.4"}.get)
    for given, expected in (
        (None, [str(openmp), "libtcmalloc_minimal.so.4"]),
        ("a.so", ["a.so", str(openmp), "libtcmalloc_minimal.so.4"]),
        ("libgomp.so", ["libgomp.so", "libtcmalloc_minimal.so.4"]),
        ("libtcmalloc.so", ["libtcmalloc.so", str(openmp)]),
    ):
        if given is None:
            monkeypatch.delenv("LD_PRELOAD", raising=False)
        else:
            monkeypatch.setenv("LD_PRELOAD", given)
        start = Launch("m", "d", cpu=True)
        assert start.environment["LD_PRELOAD"].split(":") == expected
        assert start.advice == ""
    assert "LD_PRELOAD" not in Launch("m", "d", cpu=False).environment


def test_libraries_that_are_missing_are_named_with_the_remedy(monkeypatch, tmp_path):
    def uninstalled(name):
        raise PackageNotFoundError(name)

    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(launch.sys, "platform", "linux")
    monkeypatch.setattr(launch.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(launch, "find_library", lambda name: None)
    gone = SimpleNamespace(name="libiomp5.so", locate=lambda: tmp_path / "libiomp5.so")
    for files in (uninstalled, lambda name: [gone]):
        monkeypatch.setattr(launch, "files", files)
        start = Launch("m", "d", cpu=True)
        assert "LD_PRELOAD" not in start.environment
        assert "pip install intel-openmp" in start.advice
        assert "apt-get install libtcmalloc-minimal4" in start.advice
    assert Launch("m", "d", cpu=False).advice == ""


# the commands


@pytest.mark.parametrize("to", ["vllm", "speculators"])
def test_export_prints_the_line(folders, beagle, tmp_path, to):
    ended = beagle("export", folders.head, tmp_path / "out", "--to", to, "--target", folders.target, "--depth", 3)
    assert ended.code == 0, ended
    command = shlex.split(ended.out)
    assert option(command, "--model") == str(folders.target if to == "vllm" else tmp_path / "out")
    assert ("--speculative-config" in command) == (to == "vllm")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    if to == "speculators":
        assert content["speculators_config"]["verifier"]["name_or_path"] == str(folders.target)
        assert content["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3


def test_export_refuses(folders, beagle, tmp_path):
    beagle("export", folders.head, tmp_path / "out", "--to", "gguf").refusal("gguf", "speculators")
    beagle("export", tmp_path / "none", tmp_path / "out").refusal(tmp_path / "none", "no such folder")
    (tmp_path / "empty").mkdir()
    beagle("export", tmp_path / "empty", tmp_path / "out").refusal(tmp_path / "empty", "--target")
    beagle("export", folders.head, tmp_path / "out").refusal("tiny")  # the name in its config stands for nothing
    assert not (tmp_path / "out").exists()


def test_serve_starts_vllm(folders, beagle, started, monkeypatch):
    def call(*options):
        started.clear()
        ended = beagle("serve", "--engine", "vllm", *folders.options[:4], *options)
        assert ended.code == 0, ended
        return started["arguments"]

    arguments = call("--port", 1234, "--name", "mine", "--depth", 4, "--context", 99, "--dtype", "float32")
    assert arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in (
        ("--model", str(folders.target)),
        ("--port", "1234"),
        ("--host", "127.0.0.1"),
        ("--served-model-name", "mine"),
        ("--max-model-len", "99"),
        ("--dtype", "float32"),
    ):
        assert option(arguments, name) == value
    settings = json.loads(option(arguments, "--speculative-config"))
    assert settings["num_speculative_tokens"] == 4
    assert os.listdir(settings["model"])
    with monkeypatch.context() as patch:  # the next start finds it exported
        patch.setattr(vllm_export, "export", None)
        again = call("--dtype", "float32", "--api-key", "secret")
    assert json.loads(option(again, "--speculative-config"))["model"] == settings["model"]
    assert "secret" not in " ".join(again)
    assert started["environment"]["VLLM_API_KEY"] == "secret"
    assert "--speculative-config" not in call("--draft", "none")
    depths = []
    for there in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        depths.append(json.loads(option(call("--dtype", "float32"), "--speculative-config"))["num_speculative_tokens"])
    assert depths == [CPU_DEPTH, 5]


def test_serve_refuses(folders, beagle, started, monkeypatch):
    def refusal(*options):
        return beagle("serve", "--engine", *options).refusal()

    assert "engine 'x'" in refusal("x")
    assert "--queue" in refusal("vllm", "--queue", 3)
    assert "--exact" in refusal("vllm", "--exact")
    assert "--draft lookup" in refusal("vllm", "--draft", "lookup")
    assert "--draft head+lookup" in refusal("vllm", "--draft", "head+lookup")
    assert not started
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert "beagle-decoding[vllm]" in refusal("vllm", *folders.options[:4])


# the guard


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"temperature": 0.7}, True),
        ({"temperature": 1e-9}, True),
        ({"temperature": "0.7"}, True),
        ({"temperature": True}, True),
        ({"temperature": float("nan")}, True),
        ({"sampling_params": {"temperature": 1}}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0.0}, False),
        ({"temperature": None}, False),
        ({"temperature": "hot"}, False),
        ({"prompt": "x"}, False),
        ([1], False),
    ],
    ids=str,
)
def test_who_asks_to_sample(content, expected):
    assert greedy.asks_to_sample(json.dumps(content).encode()) is expected


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000], ids=lambda body: str(body[:3]))
def test_what_is_no_json_is_passed_on(body):
    assert greedy.asks_to_sample(body) is False


def ask(body: bytes, broken: bool, monkeypatch, method: str = "POST", kind: str = "http"):
    """What the server behind the guard has read, and the status that the client has got."""
    monkeypatch.setattr(greedy, "sampling_is_broken", lambda: broken)
    read, sent = [], []
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    waiting = [{"type": "http.request", "body": part, "more_body": i == 0} for i, part in enumerate(parts)]
    waiting.append({"type": "http.disconnect"})

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            read.append(message["body"])
        await send({"type": "http.response.start", "status": 200})

    asyncio.run(greedy.GreedyOnly(app)({"type": kind, "method": method}, receive, send))
    return b"".join(read), sent


SAMPLED, GREEDY = b'{"temperature": 0.5, "prompt": "x"}', b'{"temperature": 0, "prompt": "x"}'


def test_the_guard_refuses_to_sample(monkeypatch):
    read, sent = ask(SAMPLED, True, monkeypatch)
    assert read == b""
    assert sent[0]["status"] == 400
    error = json.loads(sent[1]["body"])["error"]
    assert (error["param"], error["type"]) == ("temperature", "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "broken", "method", "kind"),
    [(GREEDY, True, "POST", "http"), (SAMPLED, False, "POST", "http"), (b"", True, "GET", "http")],
    ids=str,
)
def test_the_guard_passes_on_what_is_right(monkeypatch, body, broken, method, kind):
    read, sent = ask(body, broken, monkeypatch, method, kind)
    assert read == body
    assert sent == [{"type": "http.response.start", "status": 200}]
