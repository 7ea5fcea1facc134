"""Families whose modules compute their attention themselves: every way of decoding gives the model's own answer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.attention import attend
from beagle.targets.plan import Biased
from beagle.targets.target import Target
from beagle.training.config import TrainConfig
from beagle.training.trainer import refuse_before_answers
from conftest import Oracle, own_greedy, tiny_drafter, tiny_target, tiny_tokenizer
from test_mechanisms import NEW, PROMPT, assert_captured, assert_exact_bits, assert_served, lively

ALIBI = {"alibi": True, "new_decoder_architecture": False}
WINDOW = 6
OWN = {
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 48},
    "gpt_neo": {
        "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW,
    },
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    "bloom": {"n_layer": 3, "n_head": 4},
    "roformer": {"is_decoder": True},
    "mvp": {
        "d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1,
        "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 512},
}  # fmt: skip


@pytest.mark.parametrize("family", OWN)
def test_every_way_of_decoding(family, tmp_path):
    target = assert_served(family, **OWN[family])
    assert target.layers.own
    biased = [isinstance(window, Biased) for window in target.layers.windows]
    assert all(biased) if family in ("bloom", "mpt") else not any(biased)
    if family == "gpt_neo":
        assert target.layers.windows == [None, WINDOW, None]
    assert target.layers.counted == (family in ("roformer", "mvp"))  # positions by the cache's length
    expected = own_greedy(lively(family, **OWN[family]), PROMPT, NEW)
    drafted = Model(target, tiny_drafter(target, scale=15.0), TreePlan("dynamic", depth=3, top_k=3, nodes=6))
    assert drafted.generate(PROMPT, max_new_tokens=NEW).token_ids == expected
    refuse_before_answers(target, tmp_path / "run", TrainConfig(), {"architecture": "beagle"})


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_sampled_answers_are_those_of_plain_decoding(family):
    target = Target(lively(family, **OWN[family]), tiny_tokenizer(), family)
    options = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 5}
    plain = Model(target).generate(PROMPT, **options).token_ids
    drafted = Model(target, Oracle(plain), TreePlan("dynamic", depth=4, top_k=4, nodes=10)).generate(PROMPT, **options)
    assert drafted.token_ids == plain
    assert drafted.stats.tau > 1


def test_exact_bits():
    assert_exact_bits("bloom", **OWN["bloom"])
    assert_exact_bits("gpt_neo", **OWN["gpt_neo"])


@pytest.mark.parametrize("multi_query", [True, False])
def test_biases_that_a_model_rounds(multi_query):
    """Falcon rounds its biases to bf16, which far into a text is another bias."""
    options = {
        **ALIBI,
        "multi_query": multi_query,
        "num_kv_heads": 4,
        "ffn_hidden_size": 48,
        "max_position_embeddings": 700,
    }
    model, other = lively("falcon", **options), lively("falcon", **options)
    model.config._attn_implementation = other.config._attn_implementation = "sdpa"  # what it is loaded with
    target = Target(other, tiny_tokenizer(), "x")
    assert target.layers.windows[0].rounded == "bfloat16"
    prompt = (PROMPT * 16)[:600]
    expected = own_greedy(model, prompt, 6)
    drafted = Model(target, Oracle(expected), TreePlan("dynamic", depth=4, top_k=4, nodes=10))
    assert drafted.generate(prompt, max_new_tokens=6).token_ids == expected
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    ours = target.logits(target.prefill(torch.tensor([prompt]), target.new_cache(1, 640))[0])
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_long_prompts_run_piece_by_piece(monkeypatch):
    target = Target(lively("bloom", **OWN["bloom"]), tiny_tokenizer(), "bloom")
    ids = torch.tensor([PROMPT * 3])
    whole = target.prefill(ids, target.new_cache(1, 128))
    monkeypatch.setattr("beagle.targets.passes.MASK_ENTRIES", 3600)
    monkeypatch.setattr("beagle.targets.passes.LEAST_TOKENS", 5)
    torch.testing.assert_close(target.prefill(ids, target.new_cache(1, 128)), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bloom", "gpt_neo", "roformer"])
def test_a_probe_remembers_them(family, tmp_path):
    first = Target(lively(family, **OWN[family]), tiny_tokenizer(), "x", probes=tmp_path)
    again = Target(lively(family, **OWN[family]), tiny_tokenizer(), "x", probes=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert again.layers == first.layers
    expected = own_greedy(lively(family, **OWN[family]), PROMPT, NEW)
    assert Model(again).generate(PROMPT, max_new_tokens=NEW).token_ids == expected


def test_a_window_of_many_tokens_is_seen():
    options = {**OWN["gpt_neo"], "window_size": 700, "max_position_embeddings": 720}
    target = Target(lively("gpt_neo", **options), tiny_tokenizer(), "x")
    assert target.layers.windows == [None, 700, None]


def test_captured_passes():
    assert_captured("bloom", **OWN["bloom"])


class Strange(nn.Module):
    """Attention that does something more with its scores."""

    def __init__(self, inner: nn.Module, change) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, hidden, attention_mask=None, layer_past=None, **kwargs):
        inner = self.inner
        q, k, v = (
            inner._split_heads(proj(hidden), inner.num_heads, inner.head_dim)
            for proj in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        n = q.shape[2]
        if layer_past is not None:
            k, v = layer_past.update(k, v, inner.layer_id)
        scores = self.change(torch.matmul(q, k.transpose(-1, -2)))
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1e9)
        out = torch.matmul(F.softmax(scores, dim=-1), v)
        return inner.out_proj(inner._merge_heads(out, inner.num_heads, inner.head_dim)), None


def strange(change) -> nn.Module:
    model = lively("gpt_neo", **OWN["gpt_neo"])
    for block in model.transformer.h:
        block.attn.attention = Strange(block.attn.attention, change)
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.tanh, "calls tanh on scores"),
        (lambda scores: scores + torch.arange(scores.shape[-1]) ** 2 / 1000, "bias that is not linear"),
        (lambda scores: scores + torch.eye(scores.shape[-1]), "bias that is not linear"),
        (lambda scores: scores.masked_fill(torch.eye(scores.shape[-1], dtype=torch.bool), -1e9), "mask is neither"),
        (lambda scores: torch.where(scores > 0, scores, 0.0), "calls"),
    ],
)
def test_what_is_more_than_attention_is_refused_in_one_line(change, words):
    with pytest.raises(BeagleError, match=words) as caught:
        Target(strange(change), tiny_tokenizer(), "some-model")
    assert "\n" not in str(caught.value)
    assert "choose a" in str(caught.value)


@pytest.mark.parametrize(
    "change", [lambda scores: scores / 2.0, lambda scores: 0.5 * scores, lambda scores: scores * torch.tensor(0.5)]
)
def test_scales_in_every_form(change):
    model = strange(change)
    expected = own_greedy(model, PROMPT, NEW)
    assert Model(Target(model, tiny_tokenizer(), "x")).generate(PROMPT, max_new_tokens=NEW).token_ids == expected


def test_biases_of_grouped_heads():
    """Query heads of one group have slopes of their own, in every kind of pass."""
    from beagle.targets.plan import of_tree
    from beagle.targets.shape import TreeShape

    target = tiny_target("llama")
    cache = target.new_cache(1, 32)
    cache.lengths = [9]
    slopes = Biased((0.5, 0.25, 0.125, 0.0625))
    for parents in ([-1], [-1, 0, 0, 1]):
        plan = of_tree(cache, TreeShape(parents), [slopes])
        n, keys = len(parents), plan.keys
        seeded = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, heads, size, 8, generator=seeded) for heads, size in ((4, n), (2, keys), (2, keys)))
        found = attend(plan, q, k, v, 0.3, slopes, None, None)
        scores = 0.3 * q @ k.repeat_interleave(2, 1).transpose(-1, -2) + plan.masks[slopes]
        torch.testing.assert_close(found, scores.softmax(-1) @ v.repeat_interleave(2, 1))
        assert plan.masks[slopes].shape == (1, 4, n, keys)
