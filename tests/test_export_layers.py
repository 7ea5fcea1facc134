"""Exported heads that read several target layers or have several blocks: as vLLM drives them, they draft what ours draft."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.activations import ACT2FN

from beagle.drafters.base import TreePlan
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import BeagleError
from beagle.vllm.config import BeagleDraftConfig
from beagle.vllm.export import export, final_norm
from beagle.vllm.launch import Launch
from conftest import tiny_target
from drafting import One
from test_export import IDS, AsVLLM, head_for

SHAPES = [
    {"kv_layers": (1,)},
    {"blocks": 3, "num_kv_heads": 2},
    {"kv_layers": (1, 2), "blocks": 2, "draft_vocab_size": 20},
]


class LayersAsVLLM(AsVLLM):
    """The same for what is read of several layers, and for the blocks behind the first."""

    def fuse(self, outputs):
        """Of the outputs of the layers that the config names, the last one's before the final norm."""
        layers = self.c["eagle_aux_hidden_state_layer_ids"]
        *parts, last = (outputs[layer] for layer in layers)
        normed = [self.norm(f"layer_norms.{i}", part) for i, part in enumerate(parts)]
        weight, eps = self.w["model.final_norm.weight"], self.c["final_norm_eps"]
        top = F.rms_norm(last, last.shape[-1:], weight, eps)
        return top + torch.cat(normed, -1) @ self.w["model.layer_proj.weight"].T

    def further(self, name, x, states):
        c, n = self.c, len(x)
        w = {part: self.w[f"model.{name}.{part}_proj.weight"].T for part in ("q", "k", "v", "o", "gate", "up", "down")}
        h = self.norm(f"{name}.state_norm", states)
        q = self.rotate((self.norm(f"{name}.query_norm", x) @ w["q"]).view(n, c["num_attention_heads"], -1), n)
        k = self.rotate((h @ w["k"]).view(n, c["num_key_value_heads"], -1), n)
        v = (h @ w["v"]).view(n, c["num_key_value_heads"], -1)
        k, v = (t.repeat_interleave(c["num_attention_heads"] // c["num_key_value_heads"], 1) for t in (k, v))
        attended = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
        y = attended.transpose(0, 1).flatten(1) @ w["o"] + x
        normed = self.norm(f"{name}.mlp_norm", y)
        return y + (ACT2FN[c["hidden_act"]](normed @ w["gate"]) * (normed @ w["up"])) @ w["down"]

    def states(self, tokens, states):
        y = super().states(tokens, states)
        for i in range(self.c["num_hidden_layers"] - 1):
            y = self.further(f"further.{i}", y, states)
        return y


def outputs_of_layers(target, ids):
    """By number, from 1 on, as vLLM hands them over: before the final norm, that of the last one too."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in target.base.layers
    ]
    target.prefill(torch.tensor([ids]), target.new_cache(1, 32))
    for hook in hooks:
        hook.remove()
    return {number: output[0] for number, output in enumerate(found, 1)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("to", ["vllm", "speculators"])
def test_exported_heads_draft_what_ours_do(tmp_path, family, shape, to):
    layers = shape.get("kv_layers", ())
    target = tiny_target(family, state_layers=layers)
    target.base.norm.weight.copy_(torch.linspace(0.3, 0.9, 32))
    head = head_for(target, **shape)
    export(head, target, tmp_path, to=to)
    content = json.loads((tmp_path / "config.json").read_text())
    states = target.prefill(torch.tensor([IDS]), target.new_cache(1, 32))[0]
    exported = LayersAsVLLM(tmp_path, target)
    given = exported.fuse(outputs_of_layers(target, IDS)) if layers else states
    drafter = One(HeadDrafter(target, head))
    drafter.begin(IDS, states)
    drafts = {root: drafter.draft(root, TreePlan("chain", 5)).tokens for root in range(3, 13)}
    assert {root: exported.draft(IDS, root, given, 5) for root in drafts} == drafts
    assert len({token for draft in drafts.values() for token in draft}) > 1
    method = "eagle3" if layers else "eagle"
    if to == "speculators":
        assert content["speculators_model_type"] == method
    else:
        line = Launch("m", str(tmp_path)).arguments
        assert json.loads(line[line.index("--speculative-config") + 1])["method"] == method


def test_the_config_names_layers_and_blocks(tmp_path):
    target = tiny_target(state_layers=(1, 2))
    export(head_for(target, kv_layers=(1, 2), blocks=2), target, tmp_path)
    config = BeagleDraftConfig.from_pretrained(tmp_path)
    assert config.eagle_aux_hidden_state_layer_ids == [1, 2, target.layer_count]
    assert config.num_hidden_layers == 2
    wanted = {"layer_norms.0", "layer_norms.1", "layer_proj", "final_norm", "further.0.query_norm", "further.0.k_proj"}
    assert {f"model.{name}.weight" for name in wanted} <= load_file(tmp_path / "model.safetensors").keys()


def test_heads_without_layers_bring_no_norm(tmp_path):
    target = tiny_target()
    export(head_for(target, blocks=2), target, tmp_path)
    assert BeagleDraftConfig.from_pretrained(tmp_path).eagle_aux_hidden_state_layer_ids is None
    assert "model.final_norm.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_target_without_a_final_rms_norm_is_refused(tmp_path):
    target = tiny_target("phi", state_layers=(1,))  # its norms have means and biases
    with pytest.raises(BeagleError, match="kv_layers"):
        export(head_for(target, kv_layers=(1,)), target, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_final_norm_is_found_in_half_precision():
    target = tiny_target(state_layers=(1,))
    weight = torch.linspace(0.3, 0.9, 32).bfloat16()
    target.base.norm.weight.copy_(weight)
    assert torch.equal(final_norm(target), weight.float())
