"""Models that also see: their text part is served, and each refusal of what can't be names the reason."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import beagle
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.loading import load_target
from beagle.targets.target import Target
from conftest import SMALL, Oracle, own_greedy, tiny_drafter, tiny_model, tiny_tokenizer

FULL, SLIDING = "full_attention", "sliding_attention"
PROMPT = [11 + (7 * i * i + i) % 50 for i in range(20)]
NEW = 12
SEES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
QWEN_SEES = {"depth": 3, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
GEMMA = {
    "query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING],
    "final_logit_softcapping": 3.0,
}  # fmt: skip
WRAPPERS = {
    "gemma3": ({**SMALL, **GEMMA}, {"model_type": "siglip_vision_model", **SEES}),
    "llava": ({"model_type": "llama", **SMALL}, {"model_type": "clip_vision_model", **SEES}),
    "mistral3": ({"model_type": "mistral", **SMALL}, {"model_type": "pixtral", **SEES, "head_dim": 8}),
    "qwen2_5_vl": ({**SMALL, **ROPE}, {**QWEN_SEES, "fullatt_block_indexes": [1]}),
    "qwen3_vl": ({**SMALL, **ROPE}, {**QWEN_SEES, "deepstack_visual_indexes": [0]}),
}


def wrapper(family: str):
    text, sees = WRAPPERS[family]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, text_config=text, vision_config=sees))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(6.0)
    model.generation_config.eos_token_id = 2
    return model.eval()


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_text_part_is_served(family, tmp_path):
    model = wrapper(family)
    model.save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    target = load_target(str(tmp_path / family), dtype="float32", device="cpu", state_layers=(1,))
    assert target.context_limit == 512  # of the text config
    assert target.layer_count == 3
    assert target.pass_weights < sum(parameter.numel() for parameter in model.parameters())  # what sees is no part
    expected = own_greedy(model, PROMPT, NEW)
    drafted = Model(target, Oracle(expected), TreePlan("dynamic", depth=4, top_k=4, nodes=10))
    for exact in (False, True):
        assert drafted.generate(PROMPT, max_new_tokens=NEW, exact=exact).token_ids == expected
    assert drafted.generate_batch([PROMPT, PROMPT[:5]], max_new_tokens=NEW)[0].token_ids == expected
    headed = Model(target, tiny_drafter(target, scale=15.0), TreePlan("dynamic", depth=3, top_k=3, nodes=6))
    assert headed.generate(PROMPT, max_new_tokens=NEW).token_ids == expected
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    ours = target.logits(target.prefill(torch.tensor([PROMPT]), target.new_cache(1, 32))[0])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_generate_with_drafts_takes_prompts_of_text_alone(family):
    model = wrapper(family)
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([[0, 0, *PROMPT[:10]], PROMPT[:12]])
    mask = (ids != 0).long()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    speculation = beagle.speculate(model, draft="lookup", plan=TreePlan("dynamic", depth=4, top_k=4, nodes=8))
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False), expected)
    speculation.remove()


def refusal(model) -> str:
    with pytest.raises(BeagleError) as caught:
        Target(model, tiny_tokenizer(), "some-model")
    message = str(caught.value)
    assert message.startswith("some-model: ")
    assert "; choose a" in message
    assert "\n" not in message
    return message


TROCR = {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("cpmant", {"dim_ff": 48, "dim_head": 8}, r"compute their attention themselves.*in a way"),
        (
            "rembert",
            {"is_decoder": True, "input_embedding_size": 32, "output_embedding_size": 48},
            "its LM head reads 48 numbers a token",
        ),
        ("diffllama", {}, "attention runs more than once in a layer"),
        ("trocr", {**TROCR, "use_learned_position_embeddings": False}, "numbers its tokens in a way of its own"),
        ("recurrent_gemma", {}, "recurrent state outside its cache"),
        ("deepseek_v4", {"q_lora_rank": 8, "o_lora_rank": 8}, "make one key of several tokens"),
    ],
)
def test_refusals_say_what_the_family_has(family, options, words):
    import re

    assert re.search(words, refusal(tiny_model(family, **options)))


def test_a_model_that_does_not_run_on_tokens_alone_is_refused_in_one_line():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: None
    assert "don't run here on tokens alone" in refusal(model)


def test_a_family_without_a_language_model_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(BeagleError, match="no class for a causal language model of type vit; choose"):
        load_target(str(tmp_path), dtype="float32", device="cpu")
