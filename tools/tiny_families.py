"""Tiny random models of every family of causal language models that transformers knows."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

VOCABULARY = 200
LAYERS = 4
WINDOW = 8  # of sliding windows, chunks and indices
LEFT_OUT = "(left out)"  # as a setting's value
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

Settings = dict[str, Any]


def _all(value: Any, names: str) -> Settings:
    return dict.fromkeys(names.split(), value)


SIZES: Settings = {
    **_all(64, "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size lru_width decoder_hidden_size"),
    **_all(64, "attention_hidden_size rel_extent"),
    **_all(LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    **_all(LAYERS, "num_encoder_layers num_decoder_layers"),
    **_all(4, "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads"),
    **_all(4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    **_all(2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads"),
    **_all(16, "head_dim kv_channels dim_head swa_head_dim global_head_dim attention_head_dim v_head_dim swa_v_head_dim"),
    **_all(8, "qk_rope_head_dim qk_nope_head_dim rotary_dim"),
    **_all(16, "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank laurel_rank gated_norm_rank"),
    **_all(96, "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim moe_intermediate_size ffn_hidden_size"),
    **_all(96, "shared_expert_intermediate_size expert_ffn_hidden_size dff dim_ff intermediate_size_mlp hidden_dim d_inner"),
    **_all(96, "dense_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    **_all(96, "shared_experts_intermediate_size"),
    **_all(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_all(2, "num_experts_per_tok moe_topk moe_k moe_top_k num_experts_per_token top_k_experts layernorm_num_groups"),
    **_all(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group num_expert_group topk_group"),
    **_all(WINDOW, "sliding_window attention_window_size window_size local_attention attention_chunk_size"),
    **_all(WINDOW, "sliding_window_size attention_window index_topk keep_window_size floor_scale log_scaling_n_floor"),
    **_all(512, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length"),
    **_all(16, "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim index_head_dim"),
    **_all(16, "linear_key_head_dim linear_value_head_dim linear_head_dim hidden_size_per_layer_input"),
    **_all(8, "mamba_n_heads mamba_num_heads"),
    **_all(4, "mamba_dt_rank time_step_rank linear_num_value_heads linear_num_heads"),
    **_all(2, "linear_num_key_heads"),
    **_all(16, "index_n_heads"),  # with few heads many scores are equal: 0
    **_all(VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
}  # fmt: skip
TOKENS: Settings = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "cls_token_id": 4, "mask_token_id": 5,
    "decoder_start_token_id": 1, "eod_token_id": 2, "forced_eos_token_id": None, "forced_bos_token_id": None,
}  # fmt: skip
NOT_SET = {
    "transformers_version", "_name_or_path", "model_type", "id2label", "label2id", "architectures", "dtype",
    "problem_type", "per_layer_config", "output_hidden_states", "return_dict", "output_attentions",
    "is_encoder_decoder", "torch_dtype",
}  # fmt: skip

MIXED = {"layer_types": [SLIDING, FULL, SLIDING, FULL]}
CONVOLVED = {"layer_types": ["conv", FULL, "conv", FULL]}
LATENT = {"head_dim": 8}  # of keys and values that come from one small vector
DECODER = {"is_decoder": True}
GEMMA_4 = {
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 5, "global_head_dim": 32,
    "num_kv_shared_layers": 0, "per_layer_config": LEFT_OUT,
}  # fmt: skip
GEMMA_4_ALONE = {"vision_config": None, "audio_config": None}
QWEN_4 = {
    "head_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "hc_lowrank": 16, "layer_types": [LINEAR, "indexed_attention"] * 2,
}  # fmt: skip
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# what the sizes alone don't get right
SETTINGS: dict[str, Settings] = {
    **{
        name: DECODER
        for name in (
            "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
            "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "prophetnet",
        )
    },
    "xmod": {**DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "reformer": {
        **DECODER, "attn_layers": ["local", "local"], "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16, "feed_forward_size": 96, "local_attn_chunk_length": 8, "num_hidden_layers": 2,
    },
    **dict.fromkeys(("axk1", "deepseek_v3", "youtu", "longcat_flash"), LATENT),
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "ministral": {**MIXED, "head_dim": 16},
    "dots1": {
        **MIXED, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 16, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron": {"num_key_value_heads": 2},
    "cohere_compass_text": {**MIXED, "num_key_value_heads": 2, "rope_parameters": {FULL: DEFAULT_ROPE, SLIDING: DEFAULT_ROPE}},
    "lfm2": {**CONVOLVED, "full_attn_idxs": LEFT_OUT},
    "lfm2_moe": {**CONVOLVED, "num_dense_layers": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"moe_top_k": 2},
    },
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_chunk_size": 8},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_chunk_size": 8, "layers_block_type": LEFT_OUT},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": LEFT_OUT},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_chunk_size": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "n_groups": 1, "chunk_size": 8},
    "zamba": {
        "n_mamba_heads": 2, "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
    },
    "zamba2": {
        "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 8, "attention_hidden_size": 128,
        "attention_head_dim": 32, "num_key_value_heads": 4, "mamba_ngroups": 1, "hybrid_layer_ids": [1, 3],
        "layers_block_type": [LINEAR, "hybrid"] * 2, "num_query_groups": 4, "adapter_rank": 8,
    },
    "xlstm": {"chunk_size": 16, "embedding_dim": 64, "num_blocks": 4, "head_dim": LEFT_OUT},
    "gemma3n_text": {
        **MIXED, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 96,
    },
    "gemma4_text": GEMMA_4,
    "gemma4_unified_text": GEMMA_4,
    "gemma4": {**GEMMA_4_ALONE, "text_config": GEMMA_4},
    "gemma4_unified": {**GEMMA_4_ALONE, "text_config": GEMMA_4},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "qwen4_exp_text": QWEN_4,
    "qwen4_exp": {"text_config": QWEN_4},
    "dory": {
        "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "num_hidden_layers": 6,
        "layer_types": [SLIDING, "mlp", FULL, "mlp", SLIDING, "mlp"],
    },
    "xlnet": {"d_head": 16, "attn_type": "uni"},
    "xlm": {"emb_dim": 64, "causal": True, "is_encoder": True},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
}  # fmt: skip
SETTINGS["gemma3n"] = {"text_config": SETTINGS["gemma3n_text"]}

ROPE = {"rope_theta": 10000.0}
LONG_FACTORS = [1.0, 1.3, 1.7, 2.2, 3.0, 4.0, 5.0, 6.0]
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0,
        "beta_fast": 32.0, "beta_slow": 1.0, **ROPE}  # fmt: skip
SCALED = {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
LATE_WINDOWS = {
    "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
    "layer_types": [FULL, FULL, SLIDING, SLIDING],
}  # fmt: skip
ALIBI = {"alibi": True, "new_decoder_architecture": False}

# settings that defaults don't show
VARIANTS: dict[str, Settings] = {
    "falcon@new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon@7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "falcon@alibi": {**ALIBI, "multi_query": False, "num_kv_heads": 4},
    "falcon@alibi-mqa": {**ALIBI, "multi_query": True},
    "falcon@rw": {**ALIBI, "multi_query": False, "num_kv_heads": 4, "bias": True, "parallel_attn": False},
    "gpt2@scaled": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": True},
    "gpt_bigcode@mha": {"multi_query": False},
    "gpt_neox@serial": {"use_parallel_residual": False},
    "opt@350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi3@longrope": {
        "rope_parameters": {
            "rope_type": "longrope", **ROPE, "long_factor": LONG_FACTORS, "short_factor": [1.0] * 8, "factor": 8.0,
            "original_max_position_embeddings": 56, "partial_rotary_factor": 1.0,
        },
        "original_max_position_embeddings": 56, "max_position_embeddings": 320,  # the longest text here has 53 tokens
    },
    "llama@yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **ROPE}},
    "llama@llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, **ROPE,
        },
    },
    "llama@dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **ROPE}, "max_position_embeddings": 56},
    "llama@linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}},
    "llama@bias": {"attention_bias": True, "mlp_bias": True},
    "llama@headdim": {"head_dim": 24},
    "llama@mqa": {"num_key_value_heads": 1},
    "llama@tied": {"tie_word_embeddings": True},
    "gemma@tied": {"tie_word_embeddings": True},
    "qwen2@sliding": LATE_WINDOWS,
    "mistral@full": {"sliding_window": None},
    "mixtral@sliding": {"sliding_window": WINDOW},
    "llama4_text@full": {"layer_types": [FULL] * 4, "attention_chunk_size": None},
    "stablelm@parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "phi@norms": {"qk_layernorm": True},
    "granite@scaled": SCALED,
    "granitemoe@scaled": SCALED,
    "minicpm3@base": {"dim_model_base": 16},
    "ministral3@scaled": {"rope_parameters": {**YARN, "factor": 4.0, "llama_4_scaling_beta": 0.3}},
    "deepseek_v3@yarn": {**LATENT, "rope_parameters": {**YARN, "factor": 8.0}},
    "mpt@positions": {"attn_config": {"alibi": False}},
    "olmo@clip": {"clip_qkv": 2.0},
    "gemma3_text@both-ways": {"use_bidirectional_attention": True},
    "granitemoehybrid@attention": {"layer_types": ["attention"] * 4, "layers_block_type": LEFT_OUT},
    "doge@wide": {"keep_window_size": 2048},
    **{f"{name}@scaled": {"scale_embedding": True} for name in ("pegasus", "bart", "mbart", "biogpt")},
    **{f"{name}@sliding": {"sliding_window": WINDOW} for name in ("phi3", "phimoe", "starcoder2", "minimax_m2")},
    **{f"{name}@sliding": LATE_WINDOWS for name in ("qwen3", "qwen2_moe", "qwen3_moe", "smollm3")},
    "gemma4@softcap": {**GEMMA_4_ALONE, "text_config": {**GEMMA_4, "final_logit_softcapping": 30.0}},
    "gemma4_text@softcap": {**GEMMA_4, "final_logit_softcapping": 30.0},
    "gemma4_text@shared": {**GEMMA_4, "num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL]},
    "gemma4_text@moe": {**GEMMA_4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "gemma4_text@keys": {**GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
}  # fmt: skip


def config_of(name: str) -> Any:
    """A tiny config.

    Args:
        name: a model type of transformers, or a key of ``VARIANTS``.
    """
    family = name.split("@")[0]
    kind = CONFIG_MAPPING[family]
    try:
        defaults = kind().to_dict()
    except Exception:  # some configs have no defaults, each in a way of its own
        defaults = {}
    settings = shrunk(defaults)
    if "tie_word_embeddings" in defaults:
        settings["tie_word_embeddings"] = False
    for changes in (SETTINGS.get(family, {}), VARIANTS.get(name, {})):
        settings = merged(settings, changes)
    return kind(**settings)


def shrunk(defaults: Settings) -> Settings:
    """A config's settings with small sizes; of its layers a few, each type among them."""
    found: Settings = {}
    chosen = _layers_of_each_type(defaults)
    for key, value in defaults.items():
        if key in NOT_SET:
            continue
        if chosen is not None and isinstance(value, Sequence) and len(value) == _layer_count(defaults):
            found[key] = [value[i] for i in chosen]
        elif key in TOKENS:
            found[key] = TOKENS[key]
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[key] = min(SIZES[key], value) if key in ("moe_topk", "num_experts_per_tok") else SIZES[key]
            if key == "num_key_value_heads" and isinstance(defaults.get("kv_lora_rank"), int):
                found[key] = SIZES["num_attention_heads"]
        elif isinstance(value, dict) and key.endswith("_config"):
            found[key] = shrunk(value) | ({"model_type": value["model_type"]} if "model_type" in value else {})
        elif key.endswith(("dropout", "pdrop", "layerdrop", "dropout_prob")):
            found[key] = 0.0 if isinstance(value, float) else value
        elif isinstance(value, dict | list | tuple):
            found[key] = copy.deepcopy(value)
        elif isinstance(value, int | float | str | bool):
            found[key] = value
    return found


def _layer_count(defaults: Settings) -> int:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    return next((defaults[name] for name in names if isinstance(defaults.get(name), int)), 0)


def _layers_of_each_type(defaults: Settings) -> list[int] | None:
    """Numbers of the layers to keep, from 0 on; None: no setting has a value for each layer."""
    count = _layer_count(defaults)
    lists = [v for v in defaults.values() if isinstance(v, list | tuple) and len(v) == count]
    if count <= 2 or not lists:
        return None
    first: dict[tuple[str, ...], int] = {}
    for i, signature in enumerate(zip(*(map(str, values) for values in lists), strict=True)):
        first.setdefault(signature, i)
    kept = sorted(first.values())[:LAYERS]
    others = [i for i in range(count) if i not in kept]
    return sorted(kept + others[: LAYERS - len(kept)])


def merged(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with changes, also inside of settings that are dictionaries."""
    found = dict(settings)
    for key, value in changes.items():
        if isinstance(value, str) and value == LEFT_OUT:
            found.pop(key, None)
        elif isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = merged(found[key], value)
        else:
            found[key] = copy.deepcopy(value)
    return found


@torch.no_grad()
def enliven(model: torch.nn.Module, seed: int) -> None:
    """Random weights with which a model makes varied choices; biases, norms and sinks are random, too, so that none can be
    ignored unseen."""
    seeded = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        noise = torch.randn(parameter.shape, generator=seeded)
        name = name.lower()
        if any(part in name for part in ("a_log", "dt_bias", "time_decay", "time_first", "recurrent_param", "lambda")):
            parameter.add_(0.1 * noise)
        elif parameter.ndim >= 2 and any(part in name for part in ("embed", "wte", "wpe", "shared.weight")):
            parameter.copy_(noise * (0.5 if "pos" in name or "wpe" in name else 1.0))
        elif parameter.ndim >= 2:
            inputs = parameter.shape[-1] if parameter.shape[-1] > 1 else parameter.numel() // parameter.shape[0]
            if parameter.ndim == 3 and "expert" not in name and parameter.shape[1] <= 4:
                inputs = parameter.shape[-1] * parameter.shape[1]
            parameter.copy_(noise * 1.3 / math.sqrt(max(inputs, 4)))
        else:
            parameter.add_((0.2 if "norm" in name or "ln" in name else 0.3) * noise)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and "bias" in name.lower() and buffer.ndim == 1 and "causal" not in name:
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=seeded))


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    made.chat_template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}<s>"
    return made
