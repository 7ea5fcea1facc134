"""What families compute besides plain attention, each on a tiny model: every way of decoding gives the model's own answer."""

from __future__ import annotations

import shutil

import pytest
import torch

import beagle
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets import compiled
from beagle.targets.captured import Captured
from beagle.targets.mask_rules import chunk_of
from beagle.targets.plan import Chunk
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from beagle.training.config import TrainConfig
from beagle.training.trainer import refuse_before_answers
from conftest import Oracle, Recorder, own_greedy, tiny_drafter, tiny_head, tiny_model, tiny_tokenizer

FULL, SLIDING = "full_attention", "sliding_attention"
PROMPT = [11 + (7 * i * i + i) % 50 for i in range(40)]  # longer than every window below
NEW = 14  # the last of the drafts below would reach over them
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6, 5, 0]
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SINKS = {
    "gpt_oss": {**MOE, "sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING]},
    "granite_swa": {"sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING]},
    "mimo_v2_flash": {
        "sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "v_head_dim": 8,
    },
}  # fmt: skip


def lively(family: str, dtype: torch.dtype = torch.float32, **options):
    """A tiny model whose vectors are random, too: sinks that are ignored change its answers."""
    model = tiny_model(family, **options)
    seeded = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:
                parameter.copy_(2 * torch.randn(parameter.shape, generator=seeded))
    return model.to(dtype)


def target_of(model) -> Target:
    return Target(model, tiny_tokenizer(), "some-model")


def assert_served(family: str, **options) -> Target:
    """Alone and drafted, ordinary and exact, and among others."""
    model, target = lively(family, **options), target_of(lively(family, **options))
    for prompt in (PROMPT, PROMPT[:7]):
        expected = own_greedy(model, prompt, NEW)
        beyond = expected + PROMPT[:8]  # drafts would go on behind the last token
        drafted = Model(target, Oracle(beyond), TreePlan("dynamic", depth=4, top_k=4, nodes=10))
        for way in ({}, {"exact": True}, {"draft": False}, {"draft": False, "exact": True}):
            answer = drafted.generate(prompt, max_new_tokens=NEW, **way)
            assert answer.token_ids == expected, way
            assert "draft" in way or answer.stats.tau > 1
        for draft in (True, False):
            together = drafted.generate_batch([prompt, PROMPT[3:9], PROMPT[::-1]], max_new_tokens=NEW, draft=draft)
            assert together[0].token_ids == expected
            assert together[2].token_ids == own_greedy(model, PROMPT[::-1], NEW)
    assert_tree(model, target)
    assert tiny_head(target).config.hidden_size == target.hidden_size
    return target


@torch.no_grad()
def assert_tree(model, target: Target) -> None:
    """Each path of a tree gives the logits that it has as a text of its own, in an ordinary and in an exact pass."""
    tokens = torch.arange(10, 10 + len(PARENTS))
    cache = target.new_cache(1, 64)
    target.prefill(torch.tensor([PROMPT[:30]]), cache)
    shape = TreeShape(PARENTS)
    for states in (target.verify(cache, tokens, shape), target.verify_exact(cache, tokens, shape, 64)):
        for node in range(len(PARENTS)):
            seen = [i for i in range(len(PARENTS)) if shape.ancestors()[node, i]]
            ids = torch.tensor([PROMPT[:30] + tokens[seen].tolist()])
            expected = model(input_ids=ids, use_cache=False).logits[0, -1]
            torch.testing.assert_close(target.logits(states[node]), expected, atol=1e-3, rtol=1e-3)


def assert_exact_bits(family: str, **options) -> None:
    """In bf16 a tree's exact states are those of its paths alone, bit for bit."""
    target = target_of(lively(family, torch.bfloat16, **options))
    target.eos_ids = frozenset()
    plain = Model(target).generate(PROMPT, max_new_tokens=NEW, exact=True).token_ids
    drafted = Model(target, Oracle(plain), TreePlan("dynamic", depth=4, top_k=4, nodes=10))
    answer = drafted.generate(PROMPT, max_new_tokens=NEW, exact=True)
    assert answer.token_ids == plain
    assert answer.stats.tau > 3


def states_of(target: Target) -> torch.Tensor:
    cache = target.new_cache(1, 64)
    target.prefill(torch.tensor([PROMPT]), cache)
    first = target.verify(cache, torch.arange(10, 10 + len(PARENTS)), TreeShape(PARENTS))
    cache.compact([0, 1, 4])
    return torch.cat([first, target.verify(cache, torch.tensor([9]), TreeShape([-1]))])


def assert_captured(family: str, **options) -> None:
    plain, fast, recorder = target_of(lively(family, **options)), target_of(lively(family, **options)), Recorder()
    fast.use(Captured(fast.base, fast.hidden_size, fast.layers, recorder))
    torch.testing.assert_close(states_of(fast), states_of(plain), atol=1e-4, rtol=1e-4)
    assert recorder.made


def assert_compiled(family: str, folder, **options) -> None:
    compiled.build(folder, lively(family, **options), "some-model")
    model = lively(family, **options)
    found = compiled.find(folder, model, None)
    fast, plain = target_of(model), target_of(lively(family, **options))
    fast.use(found)
    torch.testing.assert_close(states_of(fast), states_of(plain), atol=1e-4, rtol=1e-4)


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="there is no C++ compiler"
)


@pytest.mark.parametrize("family", SINKS)
def test_sinks(family):
    target = assert_served(family, **SINKS[family])
    assert any(target.layers.sinks)
    assert_exact_bits(family, **SINKS[family])


def test_long_prompts_with_sinks_run_piece_by_piece(monkeypatch):
    target = target_of(lively("gpt_oss", **SINKS["gpt_oss"]))
    ids = torch.tensor([PROMPT * 3])
    whole = target.prefill(ids, target.new_cache(1, 128))
    monkeypatch.setattr("beagle.targets.passes.MASK_ENTRIES", 900)
    monkeypatch.setattr("beagle.targets.passes.LEAST_TOKENS", 5)
    torch.testing.assert_close(target.prefill(ids, target.new_cache(1, 128)), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@needs_compiler
def test_sinks_in_fast_passes(tmp_path):
    assert_captured("granite_swa", **SINKS["granite_swa"])
    options = {**SINKS["granite_swa"], "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    assert_compiled("granite_swa", tmp_path, **options)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [0.05] * 4,
    "factor": 8.0, "original_max_position_embeddings": len(PROMPT) + NEW,
}  # fmt: skip
ROPES = {
    "phi3": {"seed": 1, "rope_parameters": LONGROPE, "original_max_position_embeddings": len(PROMPT) + NEW},
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 400.0, "rope_theta": 10000.0},
        "max_position_embeddings": len(PROMPT) + NEW,
    },
}


@pytest.mark.parametrize("family", ROPES)
def test_rope_that_depends_on_the_length_up_to_its_switch(family):
    """Drafts and neighbours reach up to the last position before the switch, and none over it."""
    target = assert_served(family, **ROPES[family])
    assert target.context_limit == len(PROMPT) + NEW
    assert_exact_bits(family, **ROPES[family])


CHUNKED = "chunked_attention"
LLAMA4 = {
    "layer_types": [CHUNKED, FULL, CHUNKED], "attention_chunk_size": 6, "no_rope_layers": [1, 0, 1], "floor_scale": 8,
    "num_experts_per_tok": 1, "num_local_experts": 2, "intermediate_size_mlp": 48,
}  # fmt: skip


def test_chunks_and_scales_that_count_tokens():
    """Llama 4: some layers see their chunk alone, others scale queries by how many tokens are before them."""
    target = assert_served("llama4_text", **LLAMA4)
    assert target.layers.windows == [Chunk(6), None, Chunk(6)]
    assert target.layers.cache
    assert_exact_bits("llama4_text", **LLAMA4)


def test_scales_that_begin_far_behind_the_comparison_at_load_are_right():
    """A scale that changes beyond the tokens that a target is compared with can't be found out by comparing."""
    options = {**LLAMA4, "floor_scale": 64, "attn_scale": 5.0}
    model, target = lively("llama4_text", **options), target_of(lively("llama4_text", **options))
    prompt = (PROMPT * 2)[:70]
    assert Model(target).generate(prompt, max_new_tokens=NEW).token_ids == own_greedy(model, prompt, NEW)


def test_a_probe_remembers_chunks(tmp_path):
    first = Target(lively("llama4_text", **LLAMA4), tiny_tokenizer(), "x", probes=tmp_path)
    again = Target(lively("llama4_text", **LLAMA4), tiny_tokenizer(), "x", probes=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert again.layers == first.layers
    assert Model(again).generate(PROMPT, max_new_tokens=NEW).token_ids == own_greedy(
        lively("llama4_text", **LLAMA4), PROMPT, NEW
    )


def test_rules_of_chunks_are_read():
    def causal(b, h, q, k):
        return k <= q

    assert chunk_of(lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), 512) == Chunk(8)
    assert chunk_of(lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), 20) == Chunk(8)
    assert chunk_of(lambda b, h, q, k: (k <= q) & (k > q - 8), 512) is None
    assert chunk_of(lambda b, h, q, k: ((k <= q) | (k < 4)) & (k // 8 == q // 8), 512) is None
    assert chunk_of(lambda b, h, q, k: k > q, 512) is None


@pytest.mark.slow
@needs_compiler
def test_chunks_in_fast_passes(tmp_path):
    assert_captured("llama4_text", **LLAMA4)


BART = {
    "d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
}  # fmt: skip


def test_positions_that_a_model_counts_itself():
    """BART's decoder numbers its tokens by the length of the cache, whatever positions it is given."""
    assert assert_served("bart", **BART).layers.cache
    assert_exact_bits("bart", **BART)


GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING]}
HEADED = {
    "gemma3_text": GEMMA,
    "gemma3n_text": {
        **GEMMA, "num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 8,
    },
    "gemma4_text": {
        **GEMMA, "global_head_dim": 16, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "layer_types": [SLIDING, SLIDING, FULL],
    },
    "cohere2_moe": {**MOE, "num_experts": 4, "sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING]},
    "jetmoe": {**MOE, "kv_channels": 8, "num_key_value_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", HEADED)
def test_heads_take_their_shapes_from_the_loaded_model(family, tmp_path):
    """A head drafts and is trained, whatever a family's config calls its sizes."""
    target = assert_served(family, **HEADED[family])
    expected = own_greedy(lively(family, **HEADED[family]), PROMPT, NEW)
    drafted = Model(target, tiny_drafter(target, scale=15.0), TreePlan("dynamic", depth=3, top_k=3, nodes=6))
    assert drafted.generate(PROMPT, max_new_tokens=NEW).token_ids == expected
    refuse_before_answers(target, tmp_path / "run", TrainConfig(), {"architecture": "beagle"})


CONV = {"layer_types": ["conv", FULL, "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
CONVOLVED = {
    "lfm2": CONV,
    "lfm2_moe": {
        **CONV, "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", CONVOLVED)
def test_short_convolutions(family):
    """LFM2: each token of a tree convolves the inputs of its own ancestors."""
    target = assert_served(family, **CONVOLVED[family])
    assert target.layers.windows == [3, None, 3]
    assert [heads > 0 for heads in target.layers.heads] == [False, True, False]
    assert_exact_bits(family, **CONVOLVED[family])


def test_short_convolutions_in_pieces_and_behind_others(monkeypatch):
    """A prompt that runs piece by piece, a dialogue that goes on behind kept tokens, and a bias."""
    options = {**CONV, "conv_L_cache": 5, "conv_bias": True}
    model, target = lively("lfm2", **options), target_of(lively("lfm2", **options))
    monkeypatch.setattr("beagle.targets.passes.MASK_ENTRIES", 49)
    monkeypatch.setattr("beagle.targets.passes.LEAST_TOKENS", 5)
    cache = target.new_cache(1, 64)
    pieces = target.prefill(torch.tensor([PROMPT]), cache)
    monkeypatch.undo()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    torch.testing.assert_close(target.logits(pieces), expected, atol=1e-4, rtol=1e-4)
    kept = Model(target, prefix_cache=200)
    answer = kept.generate(PROMPT, max_new_tokens=NEW)
    assert answer.token_ids == own_greedy(model, PROMPT, NEW)
    dialogue = [*PROMPT, *answer.token_ids, 7, 9]
    run, passes = target.eager, []
    monkeypatch.setattr(target, "eager", lambda ids, plan: (passes.append(ids.shape[1]), run(ids, plan))[1])
    assert kept.generate(dialogue, max_new_tokens=NEW).token_ids == own_greedy(model, dialogue, NEW)
    assert passes[0] == 3  # the answer's last token, which was never run, and the two new ones


@pytest.mark.slow
def test_short_convolutions_in_captured_passes():
    assert_captured("lfm2", **CONV)


@pytest.mark.slow
@needs_compiler
def test_short_convolutions_in_compiled_passes(tmp_path):
    assert_compiled("lfm2", tmp_path, **{**CONV, "num_hidden_layers": 2, "layer_types": ["conv", FULL]})


ROBERTA = {
    "is_decoder": True, "pad_token_id": 1, "max_position_embeddings": 64, "seed": 1, "scale": 2.0, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("bias", [0.0, 4.0])
def test_positions_of_a_model_that_numbers_tokens_otherwise(bias):
    """RoBERTa numbers tokens from its padding token's id on, and from 0 on when ``generate`` tells it to."""

    def made():
        model = tiny_model("roberta", **ROBERTA)
        with torch.no_grad():
            model.lm_head.bias[1] += bias  # answers hold the padding token, too
        return model

    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2}
    expected = made().generate(torch.tensor([PROMPT]), **given)[0, len(PROMPT) :].tolist()
    assert expected != own_greedy(made(), PROMPT, NEW)
    assert (1 in expected) == bool(bias)
    target = target_of(made())
    drafted = Model(target, Oracle([*expected, *PROMPT[:8]]), TreePlan("dynamic", depth=4, top_k=4, nodes=10))
    for way in ({}, {"exact": True}, {"draft": False}):
        answer = drafted.generate(PROMPT, max_new_tokens=NEW, **way)
        assert answer.token_ids == expected
        assert "draft" in way or answer.stats.tau > 1
    assert drafted.generate_batch([PROMPT, PROMPT[3:9]], max_new_tokens=NEW)[0].token_ids == expected
    speculating = made()
    beagle.speculate(speculating)
    assert speculating.generate(torch.tensor([PROMPT]), **given)[0, len(PROMPT) :].tolist() == expected


LATENT = {"head_dim": 8, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
INDEXED = {
    **LATENT, "q_lora_rank": 8, "kv_lora_rank": 8, "n_group": 1, "topk_group": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "index_topk": 5, "index_head_dim": 8,
    "index_n_heads": 16,  # with few heads many scores are equal: 0
}  # fmt: skip
CHOOSING = {
    "deepseek_v32": {**INDEXED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "glm_moe_dsa": {**INDEXED, "mlp_layer_types": ["dense"] * 3, "indexer_types": ["full", "shared", "full"]},
}


@pytest.mark.parametrize("family", CHOOSING)
def test_keys_chosen_by_an_index(family):
    """Each token of a tree chooses among the keys of its own ancestors, as it does when it is decoded alone."""
    target = assert_served(family, **CHOOSING[family])
    assert list(target.layers.indices.values()) == [8] * (3 if family == "deepseek_v32" else 2)
    assert_exact_bits(family, **CHOOSING[family])


def test_an_index_in_pieces_and_behind_other_answers(monkeypatch):
    options = CHOOSING["glm_moe_dsa"]
    model, target = lively("glm_moe_dsa", **options), target_of(lively("glm_moe_dsa", **options))
    monkeypatch.setattr("beagle.targets.passes.MASK_ENTRIES", 49)
    monkeypatch.setattr("beagle.targets.passes.LEAST_TOKENS", 5)
    pieces = target.prefill(torch.tensor([PROMPT]), target.new_cache(1, 64))
    monkeypatch.undo()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    torch.testing.assert_close(target.logits(pieces), expected, atol=1e-3, rtol=1e-3)
    kept = Model(target, prefix_cache=200)
    answer = kept.generate(PROMPT, max_new_tokens=NEW)
    dialogue = [*PROMPT, *answer.token_ids, 7, 9]
    assert kept.generate(dialogue, max_new_tokens=NEW).token_ids == own_greedy(model, dialogue, NEW)


BLOCKS = {
    "minimax_m3_vl_text": {
        **MOE, "index_n_heads": 2, "index_head_dim": 8, "layer_types": [FULL, "minimax_m3_sparse", FULL],
    },
    "qwen4_exp_text": {
        **MOE, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "hc_lowrank": 8,
        "layer_types": ["indexed_attention"] * 3, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 2048, "indexer_compress_ratio": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("minimax_m3_vl_text", r"its attention also depends on block_indices, .*choose a"),
        ("qwen4_exp_text", r"choose the keys that a token sees in a way that can't be followed; choose a"),
    ],
)
def test_keys_chosen_otherwise_are_refused_however_late_that_shows(family, words):
    """They choose whole blocks; in texts as short as those that are compared at load they see all."""
    with pytest.raises(BeagleError, match=words):
        target_of(lively(family, **BLOCKS[family]))


def test_indices_have_no_compiled_passes(tmp_path):
    with pytest.raises(BeagleError, match=r"chooses the keys of each token by an index, .*use it without"):
        compiled.build(tmp_path, lively("deepseek_v32", **CHOOSING["deepseek_v32"]), "some-model")
    assert not target_of(lively("deepseek_v32", **CHOOSING["deepseek_v32"])).can_capture
