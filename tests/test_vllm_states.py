"""Hidden states from a server that writes them to files, as vLLM's connector does: a stub of both stands in for it."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from beagle.errors import BeagleError
from beagle.model import Model
from beagle.training.answers import Sample
from beagle.training.states import read_shard
from beagle.training.vllm_states import HEADER, StatesLost, StatesServer, VllmStates
from conftest import tiny_model, tiny_target
from training_runs import COUNT, RECIPE, stored

LAYERS = 3  # of the tiny model
HEAD = {"kv_layers": [1]}


class Stub:
    """Completions over a model, whose layers' outputs go to files.

    Attributes:
        layers: numbers of the layers, from 1 on, whose outputs it gives.
        change: takes the number of a request and its tensors; returns what is written, None for no file, bytes for a
            broken file, or a reply.
        most: bytes in the folder at their highest.
        slow: seconds that a file takes.
    """

    def __init__(self, folder: Path, model) -> None:
        self.folder, self.model = folder, model
        self.layers, self.requests, self.answers = (1, LAYERS), 0, None
        self.change, self.slow, self.most, self.together, self.live = (lambda number, tensors: tensors), 0.0, 0, 0, 0
        self.lock = threading.Lock()

    @torch.no_grad()
    def states(self, ids: list[int]) -> torch.Tensor:
        seen = {}
        layers = self.model.model.layers
        hooks = [
            layers[n - 1].register_forward_hook(lambda _, __, out, n=n: seen.update({n: out})) for n in self.layers
        ]
        self.model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack(
            [(out[0] if isinstance(out, tuple) else out)[0] for out in map(seen.get, self.layers)], dim=1
        )

    def answer(self, body: dict) -> dict | tuple[dict, int]:
        if "messages" in body:
            return self.answers(body)
        ids = body["prompt"]
        assert (body["max_tokens"], body["temperature"]) == (1, 0.0)
        with self.lock:
            number, self.requests = self.requests, self.requests + 1
            tensors = {"hidden_states": self.states(ids).contiguous(), "token_ids": torch.tensor(ids)}
        changed = self.change(number, tensors)
        if isinstance(changed, tuple):
            return changed
        return {**REPLY, "kv_transfer_params": {"hidden_states_path": self.write(number, changed)}}

    def write(self, number: int, content) -> str:
        """Begin to write a file; its lock is there, and held, before anyone hears of it."""
        path = self.folder / f"cmpl-{number}.safetensors"
        handle = Path(f"{path}.lock").open("w")  # noqa: SIM115
        fcntl.flock(handle, fcntl.LOCK_EX)

        def write():
            time.sleep(self.slow)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is not None:
                save_file(content, path)
            with self.lock:
                sizes = [size_of(file) for file in self.folder.iterdir()]
                self.most, self.together = max(self.most, sum(sizes)), max(self.together, sum(s > 0 for s in sizes))
            handle.close()

        threading.Thread(target=write, daemon=True).start()
        return f"/elsewhere/{path.name}"


REPLY = {
    "id": "cmpl", "object": "text_completion", "created": 0, "model": "tiny",
    "choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": None}],
}  # fmt: skip


def size_of(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size
    return 0


@contextmanager
def listening(stub: Stub):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "me"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            found = stub.answer(body)
            self.send(*(found if isinstance(found, tuple) else (found,)))

        def send(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{http.server_port}"
    stub.stop = lambda: (http.shutdown(), http.server_close())
    try:
        yield stub
    finally:
        stub.stop()


@pytest.fixture
def stub(tmp_path):
    folder = tmp_path / "written"
    folder.mkdir()
    with listening(Stub(folder, tiny_model())) as running:
        yield running
        assert list(folder.iterdir()) == []  # whatever happens, nothing stays


@pytest.fixture
def data(train, tmp_path):
    """Answers without states."""
    ended = train(tmp_path / "own", answers={"states": "live"}, head=HEAD)
    assert ended.code == 0, ended.err
    return tmp_path / "own"


@pytest.fixture
def trained(beagle, folders, stub, tmp_path):
    """Trains on stored answers, with states from the stub."""

    def call(out, data, *extra, states="live", limit=None, **train):
        recipe = tmp_path / "served.yaml"
        answers = {**RECIPE["answers"], "states": states}
        recipe.write_text(yaml.safe_dump({"answers": answers, "train": {**RECIPE["train"], **train}, "head": HEAD}))
        options = ["--config", recipe, "--target", folders.target, "--device", "cpu", "--data", data / "data"]
        options += ["--states-from", stub.url, "--states-folder", stub.folder]
        options += ["--states-limit", limit] if limit else []
        return beagle("train", "--out", out, *options, *extra)

    return call


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "head" / "model.safetensors")


def same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=0.02) for name in ours)


def test_training_on_them_is_training_on_the_targets_own(data, trained, stub, tmp_path):
    ended = trained(tmp_path / "served", data)
    assert ended.code == 0, ended.err
    assert stub.requests > 50  # every batch of every epoch
    same_weights(tmp_path / "served", data)


def test_the_target_computes_nothing_meanwhile(data, trained, tmp_path, monkeypatch):
    passes = []
    from beagle.training import data as module

    collate = module.collate

    def watched(group, *rest):
        passes.append(all(sample.states is not None for sample in group))
        return collate(group, *rest)

    monkeypatch.setattr("beagle.training.gradients.collate", watched)
    assert trained(tmp_path / "served", data).code == 0
    assert len(passes) > 10
    assert all(passes)


def test_states_on_disk_are_the_targets_own(folders, beagle, prompts, stub, tmp_path):
    """Dialogues with answers are the source, and files of states are read once."""
    rows = [
        {"prompt": f"w{3 + i} w{9 + i}", "completion": " ".join(f"w{5 + i + j}" for j in range(6))} for i in range(20)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "given.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "answers": {**RECIPE["answers"], "source": "given"}, "head": HEAD}))
    options = ["--config", recipe, "--target", folders.target, "--device", "cpu", "--prompts", prompts, "--seconds", 0]
    assert beagle("train", "--out", tmp_path / "own", *options).code == 0
    served = ["--states-from", stub.url, "--states-folder", stub.folder]
    ended = beagle("train", "--out", tmp_path / "served", *options, *served)
    assert ended.code == 0, ended.err
    assert stub.requests == 20 + 2 * 3  # and the trial
    ours, theirs = (read_shard(tmp_path / run / "data" / "shard-00000.safetensors") for run in ("own", "served"))
    assert stored(tmp_path / "own") == stored(tmp_path / "served")
    assert theirs["states"].dtype == torch.bfloat16
    assert torch.allclose(ours["states"].float(), theirs["states"].float(), rtol=2**-7, atol=1e-3)


@pytest.fixture
def target():
    return tiny_target(state_layers=(1,))


def many(count: int, length: int = 40) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    return [Sample(f"s/{i}", torch.randint(3, 64, (length,), generator=draw), None, 3) for i in range(count)]


def test_files_stay_below_the_limit(target, stub):
    """Far more is streamed than there may be at once, and several files are under way."""
    samples = many(60)
    one = 40 * (2 * target.hidden_size * 4 + 8) + HEADER
    stub.slow = 0.01
    with VllmStates(StatesServer(stub.url, stub.folder, limit=4 * one), target) as states:
        groups = [samples[at : at + 15] for at in range(0, 60, 15)]
        for group in states.ahead(groups):
            assert [s.states.shape for s in states(group)] == [(40, target.state_size)] * 15
        assert states.most <= 4 * one
    assert 2 <= stub.together <= 4
    assert 0 < stub.most <= 4 * one < 60 * (one - HEADER) / 5


def test_states_are_exact_and_the_top_one_is_normed(target, stub):
    (sample,) = many(1)
    with VllmStates(StatesServer(stub.url, stub.folder), target) as states:
        (found,) = states([sample])
    own = target.prefill(sample.tokens[None], target.new_cache(1, 64))[0]
    assert torch.allclose(found.states, own, atol=1e-4)


def test_a_sample_that_has_states_keeps_them(target, stub):
    sample = Sample("s/0", torch.tensor([3, 4, 5]), torch.ones(3, 64), 1)
    with VllmStates(StatesServer(stub.url, stub.folder), target) as states:
        assert states([sample]) == [sample]
        assert list(states.ahead([[sample]])) == [[sample]]
    assert stub.requests == 0


def test_a_sample_larger_than_the_limit(target, stub):
    with (
        VllmStates(StatesServer(stub.url, stub.folder, limit=5000), target) as states,
        pytest.raises(BeagleError, match=r"of 40 tokens take 0 MB.*raise the limit, or train"),
    ):
        states(many(1))
    assert stub.requests == 0


# what can't be used, each in one line with exit code 2


def test_a_server_without_the_method(data, trained, stub, tmp_path):
    stub.change = lambda *_: (REPLY, 200)
    line = trained(tmp_path / "x", data).refusal(stub.url, "hands over no hidden states", "extract_hidden_states")
    assert "[1, 3]" in line  # which layers


def test_missing_layers(data, trained, stub, tmp_path):
    stub.layers = (LAYERS,)
    trained(tmp_path / "x", data).refusal("gives states of 1 layers of width 32", "layers [1, 3]", stub.url)


def test_other_layers(data, trained, stub, tmp_path):
    stub.layers = (LAYERS, LAYERS)
    trained(tmp_path / "x", data).refusal("gives other states of layer 1", "[1, 3]")


def test_another_model(data, trained, stub, tmp_path):
    stub.model = tiny_model(seed=1)
    trained(tmp_path / "x", data).refusal(stub.url, "gives other states of layer", "serve the target itself")


def test_states_that_are_no_numbers(data, trained, stub, tmp_path):
    stub.change = lambda _, t: {**t, "hidden_states": t["hidden_states"] * torch.nan}
    trained(tmp_path / "x", data).refusal("NaN or infinite")


def test_a_prompt_that_the_server_refuses(data, trained, stub, tmp_path):
    stub.change = lambda *_: ({"error": {"message": "maximum context length is 8"}}, 400)
    trained(tmp_path / "x", data).refusal("maximum context length is 8", "max_model_len")


def test_a_folder_that_is_not_there(data, trained, stub, tmp_path):
    trained(tmp_path / "x", data, "--states-folder", tmp_path / "nowhere").refusal("nowhere", "shared_storage_path")


def test_a_server_that_is_not_there(data, trained, stub, tmp_path):
    trained(tmp_path / "x", data, "--states-from", "http://127.0.0.1:9/v1").refusal(
        "http://127.0.0.1:9/v1", "can't be reached"
    )


def test_a_folder_of_another_machine(data, trained, stub, tmp_path):
    """The server writes where this machine doesn't see it."""
    stub.change = lambda *_: ({**REPLY, "kv_transfer_params": {"hidden_states_path": "/far/a.safetensors"}}, 200)
    trained(tmp_path / "x", data).refusal(stub.folder / "a.safetensors", "isn't there", "may be full")


def test_options_that_lack_each_other(data, trained, train, beagle, stub, tmp_path):
    out = ["train", "--out", tmp_path / "x", "--data", data / "data"]
    beagle(*out, "--states-from", stub.url).refusal("--states-folder")
    beagle(*out, "--states-folder", stub.folder).refusal("--states-from")
    served = ["--states-from", stub.url, "--states-folder", stub.folder]
    train(tmp_path / "x", *served, head=HEAD).refusal("of answers that exist", "answers.source: given")


def later(change, after: int):
    """As it is in the trial, and for a while."""
    return lambda number, tensors: tensors if number < after else change(tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: None, "its disk may be full"),
        (lambda tensors: b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "was not written whole"),
        (lambda tensors: b"", "was not written whole"),
        (lambda tensors: ({"error": {"message": "EngineCore died"}}, 500), "EngineCore died"),
    ],
)
def test_a_server_that_fails_loses_nothing(data, trained, stub, tmp_path, change, words):
    """A full disk there, or a dead engine: what was trained is saved, and the same command goes on."""
    stub.change = later(change, 40)
    trained(tmp_path / "x", data, checkpoint_every=1000).refusal(words, "run the same command again")
    assert (tmp_path / "x" / "checkpoint.safetensors").is_file()
    stub.change = lambda number, tensors: tensors
    ended = trained(tmp_path / "x", data, checkpoint_every=1000)
    assert ended.code == 0, ended.err
    same_weights(tmp_path / "x", data)


def test_a_server_that_dies(data, trained, stub, tmp_path):
    def dies(tensors):
        threading.Thread(target=stub.stop).start()
        time.sleep(0.2)
        return tensors

    stub.change = later(dies, 40)
    trained(tmp_path / "x", data, checkpoint_every=1000).refusal(
        stub.url, "run the same command again; nothing is lost"
    )
    assert (tmp_path / "x" / "checkpoint.safetensors").is_file()


def test_a_file_that_is_never_written(target, stub):
    stub.slow = 0.5
    with (
        VllmStates(StatesServer(stub.url, stub.folder, patience=0.1), target) as states,
        pytest.raises(StatesLost, match=r"was not written in 0\.1 seconds; run the same command again"),
    ):
        states(many(1))
    time.sleep(0.8)
    for file in stub.folder.iterdir():  # the server's, which came after all
        file.unlink()


def test_files_of_other_tokens(data, trained, stub, tmp_path):
    stub.change = lambda _, t: {**t, "token_ids": t["token_ids"] + 1}
    trained(tmp_path / "x", data).refusal("other tokens", stub.folder)


def test_answers_of_the_same_server_leave_no_files(train, stub, tmp_path):
    """It writes states of each answer's prompt, which nobody wants: those of whole samples come later."""
    model, lock, asked = Model(tiny_target()), threading.Lock(), []

    def answer(body):
        with lock:
            made = model.generate(body["messages"], max_new_tokens=body["max_tokens"], temperature=0.0)
            asked.append(body)
        ended = made.token_ids[-1] in model.target.eos_ids
        choice = {"index": 0, "finish_reason": "stop" if ended else "length", "token_ids": list(made.token_ids)}
        choice |= {"message": {"role": "assistant", "content": made.text}}
        path = stub.write(10_000 + len(asked), {"hidden_states": torch.zeros(2, 2, 32), "token_ids": torch.zeros(2)})
        return {
            **REPLY,
            "object": "chat.completion",
            "choices": [choice],
            "kv_transfer_params": {"hidden_states_path": path},
        }

    stub.answers = answer
    options = ["--answers-from", stub.url, "--answers-model", "tiny", "--states-from", stub.url]
    options += ["--states-folder", stub.folder]
    ended = train(tmp_path / "x", *options, answers={"states": "live"}, head=HEAD)
    assert ended.code == 0, ended.err
    assert len(asked) > COUNT  # and a trial
    assert train(tmp_path / "own", answers={"states": "live"}, head=HEAD).code == 0
    assert stored(tmp_path / "x") == stored(tmp_path / "own")
