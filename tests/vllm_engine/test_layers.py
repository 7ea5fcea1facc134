"""Heads that read several target layers, or have several blocks, in vLLM on a CPU: as in test_engine.py."""

from __future__ import annotations

import pytest
import torch
from test_engine import DEPTH, Engine, chain, total
from transformers import AutoTokenizer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

import beagle
from beagle.drafters.base import TreePlan
from beagle.drafters.head_drafter import HeadDrafter
from beagle.targets.target import Target
from beagle.vllm.config import method_for
from beagle.vllm.export import export
from conftest import LIVELY, tiny_head, tiny_model, tiny_tokenizer
from drafting import One

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

TOKENS = 60
LAYERS = {"kv_layers": (1, 2), "blocks": 2}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    inner = tiny_model(
        hidden_size=128, head_dim=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        num_hidden_layers=4,
    )  # fmt: skip
    with torch.no_grad():
        inner.model.norm.weight.copy_(torch.linspace(0.5, 1.5, 128))
    inner.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [[1, *torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist()] for n in range(3, 11)]


@pytest.fixture(scope="module")
def plain(target_folder, prompts) -> list[list[int]]:
    with Engine(str(target_folder)) as engine:
        return engine.answers(prompts, TOKENS)


def lively_head(target, **shape):
    """One whose parts all count."""
    head = tiny_head(target, scale=LIVELY["beagle"], **shape)
    for name, tensor in head.named_parameters():
        if tensor.ndim == 1:
            tensor.copy_(torch.linspace(0.5, 1.5, len(tensor)) * (-1) ** len(name))
    return head


def exported(target_folder, folder, shape, to="vllm"):
    """A random head's folder for vLLM, and our engine with the chain that vLLM drafts."""
    from transformers import AutoModelForCausalLM

    inner = AutoModelForCausalLM.from_pretrained(target_folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    target = Target(inner, tokenizer, "tiny", state_layers=shape.get("kv_layers", ()))
    target.eos_ids = frozenset()
    head = lively_head(target, **shape)
    export(head, target, folder, to=to, depth=DEPTH, verifier=str(target_folder))
    return beagle.Model(target, HeadDrafter(target, head), beagle.TreePlan("chain", DEPTH))


def drafts(model, ids: list[int], answer: list[int]) -> list[list[int]]:
    """What our head drafts from scratch at each step of vLLM's."""
    target, found, made = model.target, [], 1
    while made < len(answer):
        known = torch.tensor([[*ids, *answer[:made]]])
        states = target.prefill(known[:, :-1], target.new_cache(1, 256))[0]
        drafter = One(HeadDrafter(target, model.drafter.head))
        drafter.begin(known[0, :-1].tolist(), states)
        found.append(drafter.draft(int(known[0, -1]), TreePlan("chain", DEPTH)).tokens)
        same = [a == b for a, b in zip(found[-1], answer[made:], strict=False)]
        made += [*same, False].index(False) + 1
    return found


def check(engine, prompts, plain, ours) -> None:
    for ids, own, (answer, counts) in zip(prompts, plain, ours, strict=True):
        assert engine.counted([ids], TOKENS) == ([own], counts)
        assert answer == own
    assert engine.counted(prompts, TOKENS) == (plain, total([counts for _, counts in ours]))


@pytest.mark.parametrize("shape", [LAYERS, {"blocks": 3}, {"kv_layers": (3,), "draft_vocab_size": 40}], ids=str)
def test_answers_drafts_and_counters(target_folder, prompts, plain, tmp_path, monkeypatch, shape):
    model = exported(target_folder, tmp_path, shape)
    ours = [chain(model, ids, TOKENS) for ids in prompts]
    assert sum(counts[2] for _, counts in ours) > 0  # by luck, but the same luck every time
    assert method_for(tmp_path) == ("eagle3" if "kv_layers" in shape else "eagle")
    proposed, propose = [], SpecDecodeBaseProposer.propose

    def recorded(self, *args, **kwargs):
        proposed.append(propose(self, *args, **kwargs))
        return proposed[-1]

    with Engine(str(target_folder), str(tmp_path)) as engine:
        check(engine, prompts, plain, ours)
        monkeypatch.setattr(SpecDecodeBaseProposer, "propose", recorded)
        for ids, own in zip(prompts, plain, strict=True):
            proposed.clear()
            engine.answers([ids], TOKENS)
            expected = drafts(model, ids, own)
            assert [one.tolist() for one in torch.cat(proposed)][: len(expected)] == expected


def test_compiled_and_in_chunks(target_folder, prompts, plain, tmp_path):
    model = exported(target_folder, tmp_path, LAYERS)
    ours = [chain(model, ids, TOKENS) for ids in prompts]
    options = {"enforce_eager": False, "max_num_batched_tokens": 40, "enable_chunked_prefill": True}
    with Engine(str(target_folder), str(tmp_path), **options) as engine:
        check(engine, prompts, plain, ours)


def test_a_speculators_folder_is_served_as_the_model(target_folder, prompts, plain, tmp_path):
    model = exported(target_folder, tmp_path, LAYERS, to="speculators")
    ours = [chain(model, ids, TOKENS) for ids in prompts]
    with Engine(str(tmp_path)) as engine:
        check(engine, prompts, plain, ours)


def test_tensor_parallel(target_folder, prompts, plain, tmp_path):
    model = exported(target_folder, tmp_path, LAYERS)
    ours = [chain(model, ids, TOKENS) for ids in prompts[:2]]
    with Engine(str(target_folder), str(tmp_path), tensor_parallel_size=2) as engine:
        assert engine.counted(prompts[:2], TOKENS) == (plain[:2], total([counts for _, counts in ours]))
