"""What a family computes besides plain attention is noticed at load: served as the model itself does, or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets import attention, probe
from beagle.targets.attention import attend
from beagle.targets.family import context_limit, sample_ids
from beagle.targets.head_transform import move_transform
from beagle.targets.mask_rules import window_of
from beagle.targets.proof import difference
from beagle.targets.target import Target
from conftest import Oracle, own_greedy, tiny_drafter, tiny_model, tiny_target, tiny_tokenizer

LONG = [11 + (7 * i * i + i) % 50 for i in range(40)]  # longer than every window below
FULL, SLIDING = "full_attention", "sliding_attention"


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOWED = {"sliding_window": 6, "use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING]}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_moe", {**MOE, **WINDOWED, "shared_expert_intermediate_size": 16, "max_window_layers": 1}),
        ("phimoe", {"num_local_experts": 4, "sliding_window": 6}),
        ("starcoder2", {"sliding_window": 6}),
        ("mistral", {"sliding_window": 6}),
    ],
)
def test_windows_that_only_the_mask_carries_are_honoured(family, options):
    model = tiny_model(family, **options)
    target = Target(tiny_model(family, **options), tiny_tokenizer(), family)
    assert 6 in target.layers.windows
    expected = own_greedy(model, LONG, 20)
    ours = Model(target)
    for exact in (False, True):
        assert ours.generate(LONG, max_new_tokens=20, exact=exact).token_ids == expected
    assert ours.generate_batch([LONG, LONG[:5]], max_new_tokens=20)[0].token_ids == expected


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("doge", {"keep_window_size": 8}, "mask"),
        ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 6}, "mask"),
        ("cpmant", {"dim_ff": 48, "dim_head": 8}, "attention"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(family, options, words):
    with pytest.raises(BeagleError, match=words) as caught:
        Target(tiny_model(family, **options), tiny_tokenizer(), "some-model")
    assert str(caught.value).startswith("some-model: ")
    assert "choose a" in str(caught.value)
    assert "\n" not in str(caught.value)


class Decaying(nn.Module):
    """Adds to a layer what depends on how many tokens the pass has: a state that no KV cache keeps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.inner(x, *args, **kwargs) + 0.2 * x.cumsum(1) / x.shape[1]


def test_a_state_that_no_cache_keeps_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp = Decaying(model.model.layers[1].mlp)
    with pytest.raises(BeagleError, match="hidden states"):
        Target(model, tiny_tokenizer(), "some-model")


def test_a_softcap_or_scale_that_the_pass_does_not_know_is_refused(monkeypatch):
    """The comparison is with the model's own attention: one that is ours alone can't hide in both."""
    monkeypatch.setattr(
        attention, "attend", lambda plan, q, k, v, scaling, *rest: attend(plan, q, k, v, 0.9 * scaling, *rest)
    )
    with pytest.raises(BeagleError, match="hidden states"):
        tiny_target("llama")


def test_attention_output_is_contiguous():
    assert tiny_target("afmoe", **MOE, num_dense_layers=1, sliding_window=6, layer_types=[SLIDING, FULL, SLIDING])


def test_rules_of_masks_are_read():
    def causal(b, h, q, k):
        return k <= q

    def sliding(n):
        return lambda b, h, q, k: (k <= q) & (k > q - n)

    assert window_of(causal, 512) is None
    assert window_of(sliding(6), 512) == 6
    assert window_of(sliding(1000), 512) is None
    assert window_of(lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), 512) == 0  # chunks
    assert window_of(lambda b, h, q, k: k >= 0, 512) == 0  # both ways
    assert window_of(lambda b, h, q, k: (k <= q) | (k < 4), 512) == 0  # a prefix that all see


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.5, 4.0],
    "factor": 8.0, "original_max_position_embeddings": 48,
}  # fmt: skip


def test_longrope_ends_where_its_factors_change():
    options = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48, "max_position_embeddings": 384}
    model, target = tiny_model("phi3", **options), Target(tiny_model("phi3", **options), tiny_tokenizer(), "tiny-phi")
    assert target.context_limit == 48
    ours = Model(target)
    assert ours.generate(LONG, max_new_tokens=8).token_ids == own_greedy(model, LONG, 8)
    for run in (
        lambda: ours.generate(LONG, max_new_tokens=9),
        lambda: ours.generate_batch([LONG[:3], LONG], max_new_tokens=9),
    ):
        with pytest.raises(BeagleError, match=r"longrope.*lower max_new_tokens to 8"):
            run()


def test_longrope_with_equal_factors_keeps_its_context():
    options = {"rope_parameters": {**LONGROPE, "long_factor": [1.0] * 4}, "max_position_embeddings": 384}
    model = tiny_model("phi3", original_max_position_embeddings=48, **options)
    assert context_limit(model.config) == (384, "")


def test_a_probe_is_remembered_by_weights_and_settings(tmp_path, monkeypatch):
    options = {"sliding_window": 6}
    first = Target(tiny_model("mistral", **options), tiny_tokenizer(), "x", probes=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    expected = Model(first).generate(LONG, max_new_tokens=12).token_ids
    learn = probe.learn
    monkeypatch.setattr(probe, "learn", lambda *args: pytest.fail("probed again"))
    again = Target(tiny_model("mistral", **options), tiny_tokenizer(), "x", probes=tmp_path)
    assert again.layers == first.layers
    assert Model(again).generate(LONG, max_new_tokens=12).token_ids == expected
    monkeypatch.setattr(probe, "learn", learn)
    other = tiny_model("mistral", **options)
    other.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    Target(other, tiny_tokenizer(), "x", probes=tmp_path)
    Target(tiny_model("mistral", sliding_window=7), tiny_tokenizer(), "x", probes=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for file in tmp_path.iterdir():
        file.write_text("{}")
    assert Target(tiny_model("mistral", **options), tiny_tokenizer(), "x", probes=tmp_path).layers == first.layers


def test_long_prompts_run_piece_by_piece(monkeypatch):
    """States as of one pass, with windows and caps, whatever the size of the pieces; and no mask of n²."""
    for family in ("llama", "gemma2", "mistral"):
        target = tiny_target(family)
        ids = torch.tensor([LONG, LONG[::-1]])
        whole = target.prefill(ids, target.new_cache(2, 64))
        monkeypatch.setattr("beagle.targets.passes.PROMPT_TOKENS", 7)
        monkeypatch.setattr("beagle.targets.passes.MASK_ENTRIES", 49)
        monkeypatch.setattr("beagle.targets.passes.LEAST_TOKENS", 5)
        cache = target.new_cache(2, 64)
        pieces = target.prefill(ids, cache)
        assert cache.lengths == [40, 40]
        assert difference(pieces[1], whole[1]) < 1e-5
        monkeypatch.undo()


@pytest.mark.slow
def test_a_long_prompt_takes_memory_in_proportion_to_its_length():
    """16,000 tokens by every way in; a dense mask of them would take 1 GB in fp32."""
    code = """
from conftest import tiny_model, tiny_tokenizer
from beagle.evaluation.peak_memory import peak_memory_mb, reset_peak_memory
from beagle.model import Model
from beagle.targets.target import Target

prompt = [11 + (7 * i * i + i) % 50 for i in range(16000)]
for way, family in (("single", "llama"), ("batch", "llama"), ("exact", "llama"), ("single", "mistral")):
    window = {"sliding_window": 64} if family == "mistral" else {}
    model = tiny_model(family, max_position_embeddings=20000, **window)
    ours = Model(Target(model, tiny_tokenizer(), "x"))
    ask = {
        "single": lambda ids: ours.generate(ids, max_new_tokens=2),
        "exact": lambda ids: ours.generate(ids, max_new_tokens=2, exact=True),
        "batch": lambda ids: ours.generate_batch([ids, ids[:9]], max_new_tokens=2),
    }[way]
    ask(prompt[:200])
    reset_peak_memory()
    before = peak_memory_mb()
    ask(prompt)
    print(way, family, peak_memory_mb() - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    grown = [line.split() for line in run.stdout.splitlines()]
    assert len(grown) == 4
    assert all(float(megabytes) < 150 for *_, megabytes in grown), grown


def test_ids_to_try_a_model_with_are_not_special():
    config = tiny_model("llama").config
    ids = sample_ids(config, 64, 300)
    assert not {0, 1, 2} & set(ids.tolist())
    assert ids.max() < 64


def test_where_transformers_differs_from_itself_the_whole_pass_counts():
    """MiniMax-M2's mask carries a window that its KV cache does not know: transformers' answers with a cache differ
    from those of whole passes (Moshi's too). Ours are those of whole passes."""
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "rotary_dim": 4}
    model = tiny_model("minimax_m2", **options)
    ours = Model(Target(tiny_model("minimax_m2", **options), tiny_tokenizer(), "minimax"))
    assert ours.generate(LONG, max_new_tokens=12).token_ids == own_greedy(model, LONG, 12)


def test_dynamic_rope_is_served_as_far_as_it_is_still():
    """Its factors change with the length beyond the context alone, and the context ends there; transformers goes on."""
    options = {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        "max_position_embeddings": 48,
    }
    model = tiny_model("llama", **options)
    target = Target(tiny_model("llama", **options), tiny_tokenizer(), "dynamic")
    assert target.context_limit == 48
    answer = Model(target).generate(LONG, max_new_tokens=30)
    assert answer.token_ids == own_greedy(model, LONG, 8)[: len(answer.token_ids)]
    assert len(LONG) + len(answer.token_ids) <= 48


def test_a_window_too_large_to_be_read_off_is_taken_from_the_config():
    target = Target(
        tiny_model("mistral", sliding_window=200_000, max_position_embeddings=2**18), tiny_tokenizer(), "long"
    )
    assert set(target.layers.windows) == {200_000}


BERT = {"is_decoder": True}
TRANSFORMED = {
    "bert": BERT,
    "electra": {**BERT, "embedding_size": 24},  # as wide as what its LM head reads, not as its layers
    "modernbert-decoder": {"sliding_window": 6, "local_attention": 6, "global_attn_every_n_layers": 2},
}


@pytest.mark.parametrize("family", TRANSFORMED)
def test_lm_heads_that_transform_states_first_are_served(family):
    """A dense layer, an activation and a norm before the linear layer: what that layer reads is the hidden state."""
    model = tiny_model(family, **TRANSFORMED[family])
    target = Target(tiny_model(family, **TRANSFORMED[family]), tiny_tokenizer(), family)
    expected = own_greedy(model, LONG, 14)
    drafted = Model(target, Oracle([*expected, *LONG]), TreePlan("dynamic", depth=4, top_k=4, nodes=10))
    for options in ({}, {"exact": True}, {"draft": False}):
        answer = drafted.generate(LONG, max_new_tokens=14, **options)
        assert answer.token_ids == expected, options
        assert "draft" in options or answer.stats.tau > 1
    together = drafted.generate_batch([LONG, LONG[:5]], max_new_tokens=14)
    assert [answer.token_ids for answer in together] == [expected, own_greedy(model, LONG[:5], 14)]
    headed = Model(target, tiny_drafter(target, scale=15.0))
    assert headed.generate(LONG, max_new_tokens=14).token_ids == expected


def test_an_lm_head_that_reads_other_widths_than_embeddings_have_is_refused():
    options = {**BERT, "input_embedding_size": 16, "output_embedding_size": 40}
    with pytest.raises(
        BeagleError, match="some-model: its LM head reads 40 numbers a token and its embedding gives 16"
    ):
        Target(tiny_model("rembert", **options), tiny_tokenizer(), "some-model")


def test_an_lm_head_that_does_not_end_with_a_linear_layer_is_refused_and_left_as_it_was():
    model = tiny_model("bert", **BERT)
    model.cls = Bent(model.cls)
    before = model(input_ids=torch.tensor([LONG])).logits
    assert move_transform(model) is model.get_output_embeddings()
    assert isinstance(model.cls, Bent)
    torch.testing.assert_close(model(input_ids=torch.tensor([LONG])).logits, before)
    with pytest.raises(BeagleError, match=r"some-model: its logits are more than one linear layer over a hidden state"):
        Target(model, tiny_tokenizer(), "some-model")


class Bent(nn.Module):
    """Logits that are no linear layer of anything."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def predictions(self) -> nn.Module:
        return self.inner.predictions

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.inner(states)
        return logits + 2 * logits.abs()


def test_an_lm_head_whose_layers_give_tuples_is_left_as_it_was():
    """XLM's: the family is refused in one line, for its attention."""
    model = tiny_model("xlm")
    before = model(input_ids=torch.tensor([LONG])).logits
    move_transform(model)
    torch.testing.assert_close(model(input_ids=torch.tensor([LONG])).logits, before)
    with pytest.raises(BeagleError, match="compute their attention themselves"):
        Target(model, tiny_tokenizer(), "some-model")
