"""Tiny random models of each family, with a tokenizer that needs no file."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from weakref import ref

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # see beagle.threads
os.environ.setdefault("BEAGLE_HUGE_PAGES", "0")  # seconds beside the tests
os.environ.pop("COLUMNS", None)  # consoles made at import would keep this width

import hypothesis
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import beagle.research.ablations
from beagle.cli import main
from beagle.drafters.base import Draft, DraftContext, Drafter
from beagle.drafters.block import Block
from beagle.drafters.checkpoint import HEADS, save_head
from beagle.drafters.head_drafter import HeadDrafter
from beagle.evaluation import run
from beagle.model import Model
from beagle.targets.loading import cache_dir
from beagle.targets.target import Target

pytest_plugins = ["training_runs"]
collect_ignore_glob = []
if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "openai", "httpx")):
    collect_ignore_glob += [
        "test_serve*.py",
        "test_page.py",
        "test_endpoint.py",
        "test_processes.py",
    ]  # the extras serve and dev are not installed
if find_spec("peft") is None:
    collect_ignore_glob += ["test_adapters.py", "test_adapter.py"]  # the extra dev is not installed
if find_spec("datasets") is None:
    collect_ignore_glob += ["test_tables.py"]  # the extra dev is not installed
if find_spec("vllm") is None:
    collect_ignore_glob += ["vllm_engine/*"]  # make test-vllm

hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None)
hypothesis.settings.load_profile("seeded")

REAL_CACHE = cache_dir()  # before tests redirect it: keeps the real target between runs

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0},
}
# Weights of fresh heads times this: they hardly attend else; EAGLE's feedback, unnormed, explodes beyond.
LIVELY = {"beagle": 15.0, "eagle": 8.0}
SCALES = LIVELY | {"eagle3": 8.0}  # of heads that need a target loaded with layers, too


class Recorder:
    """Takes a CUDA graph's place: a trace to single operations, which as little as the graph asks Python anything again.

    As little as the graph it keeps what was there before: only views keep their base.
    """

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, run):
        self.made += 1
        trace = make_fx(run)()
        out = torch.empty_like(trace())
        read = {node.target: ref(getattr(trace, node.target)) for node in trace.graph.nodes if node.op == "get_attr"}

        def replay() -> None:
            for name, tensor in read.items():
                setattr(trace, name, tensor())
            out.copy_(trace())
            forget()

        def forget() -> None:
            for name in read:
                setattr(trace, name, None)

        forget()
        return replay, out


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: ``w3 w4 …``, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}<s>"
    return tokenizer


def tiny_model(family: str = "llama", *, seed: int = 0, scale: float = 6.0, **overrides):
    torch.manual_seed(seed)
    small = {name: size for name, size in SMALL.items() if family != "falcon" or name != "head_dim"}  # it has its own
    config = AutoConfig.for_model(family, **{**small, **FAMILIES.get(family, {}), **overrides})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # random models are nearly constant; make their choices vary
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale if "embed" not in name else 1.0)
    return model


def tiny_target(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, state_layers=(), **overrides
) -> Target:
    model = tiny_model(family, seed=seed, **overrides).to(dtype)
    return Target(model, tiny_tokenizer(), f"tiny-{family}", state_layers=state_layers)


def tiny_head(target: Target, *, architecture: str = "beagle", seed: int = 0, scale: float = 1.0, **overrides) -> Block:
    torch.manual_seed(seed)
    kind = HEADS[architecture]
    head = kind(kind.config_class.for_target(target, **overrides))
    for parameter in head.parameters():
        parameter.data.mul_(scale if parameter.ndim == 2 else 1.0)
    return head.to(target.device, target.dtype).eval().requires_grad_(False)


def tiny_drafter(target: Target, *, architecture: str = "beagle", **overrides) -> HeadDrafter:
    return HeadDrafter(target, tiny_head(target, architecture=architecture, **overrides))


class Counted(DraftContext):
    """How long the prompt was, and how long it is now."""

    def __init__(self) -> None:
        self.prompt = self.length = 0

    def extend(self, tokens, states):
        self.prompt = self.prompt or len(tokens)
        self.length += len(tokens)


class Oracle(Drafter[Counted]):
    """Knows the answer: drafts its next tokens as a chain, among wrong candidates."""

    name = "oracle"

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def context(self):
        return Counted()

    def draft(self, contexts, roots, plan, min_expected_tokens=0.0):
        return [self.candidates(context, plan) for context in contexts]

    def candidates(self, context, plan):
        at = context.length - context.prompt + 1
        tokens, parents, parent = [], [], -1
        for right in self.answer[at : at + plan.depth]:
            tokens += [(right + 1) % 64, right]
            parents += [parent, parent]
            parent = len(tokens) - 1
        return Draft(tokens, parents, [0.0] * len(tokens))


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory):
    """A folder of packages that holds the CPU kernel, whatever it is worth here."""
    from beagle.targets.linears import tiled

    folder = tmp_path_factory.mktemp("kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "_kernel", None)
        patch.setattr(tiled, "_is_kept", lambda: True)
        assert tiled.build(folder) is None
    return folder


@pytest.fixture
def target() -> Target:
    return tiny_target()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Measured costs and the like never touch the user's cache."""
    monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("beagle.targets.linears.tiled._kernel", None)  # what one test loads is not for the next
    monkeypatch.setattr("beagle.decoding.costs.STEADY", math.inf)  # other tests run beside this one
    monkeypatch.setattr("beagle.decoding.costs.still_true", lambda *_: True)


def interrupt(monkeypatch, at: str):
    """Ctrl-C in mode ``beagle`` of question ``at``; returns what lets the next run go through."""
    ask = run.ask

    def interrupted(system, name, prompt, *rest):
        if prompt.id == at and system.mode == "beagle":
            raise KeyboardInterrupt
        return ask(system, name, prompt, *rest)

    monkeypatch.setattr(run, "ask", interrupted)
    return lambda: monkeypatch.setattr(run, "ask", ask)


@dataclass(frozen=True)
class Folders:
    """A saved tiny target, and a draft head for it."""

    target: Path
    head: Path

    @property
    def options(self) -> list[str]:
        return ["--target", str(self.target), "--draft", str(self.head), "--dtype", "float32", "--device", "cpu"]

    @property
    def plain(self) -> list[str]:
        return ["--target", str(self.target), "--draft", "none", "--dtype", "float32", "--device", "cpu"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def refusal(self, *names: object, code: int = 2) -> str:
        """The one line of an error that names its input."""
        assert self.code == code, self
        assert "Traceback" not in self.err
        lines = self.err.strip().splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        for name in names:
            assert str(name) in lines[-1]
        return lines[-1]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Folders:
    root = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")
    save_head(tiny_head(tiny_target()), root / "head", target="tiny", dtype=torch.float32, meta={})
    return Folders(root / "target", root / "head")


@pytest.fixture
def beagle(monkeypatch, capsys):
    """Runs the command in this process, as its entry point would."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("FORCE_COLOR", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["beagle", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.run()
        return Outcome(ended.value.code or 0, *capsys.readouterr())

    return call


QUESTIONS = [
    {"id": "a", "prompt": "w3 w4 w5"},
    {"id": "b", "turns": ["w9", "w8"]},
    {"id": "c", "prompt": "w30 w7"},
    {"id": "d", "prompt": "w12"},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return path


@pytest.fixture
def first_turns(folders, beagle, questions, tmp_path):
    """Runs `beagle eval` on the first turns in three modes; returns its outcome and its JSON."""

    def call(*extra):
        path = tmp_path / "figures" / "out.json"
        options = ["--first-turns", "--modes", "plain,beagle,transformers", "-n", 8, "--json", path]
        ended = beagle("eval", "--questions", questions, *folders.options, *options, *extra)
        return ended, json.loads(path.read_text()) if path.exists() else None

    return call


@pytest.fixture(scope="module")
def model():
    target = tiny_target()
    return Model(target, tiny_drafter(target))


@torch.no_grad()
def own_greedy(model, ids: list[int], new: int) -> list[int]:
    """By the model's own forward, without a cache, up to token 2."""
    made: list[int] = []
    for _ in range(new):
        made.append(int(model(input_ids=torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax()))
        if made[-1] == 2:
            break
    return made
