"""Exported heads: driven as vLLM drives a draft model, they draft what ours draft."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.activations import ACT2FN

from beagle.drafters.base import TreePlan
from beagle.drafters.checkpoint import save_head
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import BeagleError
from beagle.vllm.config import BeagleDraftConfig
from beagle.vllm.export import embedding_scale, export
from conftest import LIVELY, tiny_head, tiny_target
from drafting import One

IDS = [1, 5, 9, 9, 23, 7, 40, 41, 5, 9]


def head_for(target, **overrides):
    head = tiny_head(target, scale=LIVELY["beagle"], **overrides)
    for name, tensor in head.named_parameters():  # as fresh, norms and scales would hide a forgotten one
        if tensor.ndim == 1:
            tensor.copy_(torch.linspace(0.5, 1.5, len(tensor)) * (-1) ** len(name))
    if head.config.draft_vocab_size:
        head.draft_vocab.copy_(torch.arange(head.config.draft_vocab_size) * 3 + 1)
    return head


class AsVLLM:
    """The arithmetic of ``vllm.model`` on exported files, whole and slow: slot i has token t_{i+1}, position i, state h_i."""

    def __init__(self, folder, target):
        self.w = load_file(folder / "model.safetensors")
        self.c = json.loads((folder / "config.json").read_text())
        self.c = self.c.get("transformer_layer_config", self.c)
        self.target = target

    def norm(self, name, x):
        return F.rms_norm(x, x.shape[-1:], self.w[f"model.{name}.weight"], self.c["rms_norm_eps"])

    def rotate(self, x, n):
        half = self.c["head_dim"] // 2
        angle = torch.arange(n)[:, None] * self.c["rope_parameters"]["rope_theta"] ** -(torch.arange(half) / half)
        cos, sin, (a, b) = angle.cos()[:, None], angle.sin()[:, None], x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def states(self, tokens, states):
        c, n = self.c, len(tokens)
        shared = self.w.get("model.embed_tokens.weight", self.target.embed.weight)[tokens]
        e = shared * c["embedding_scale"]
        x, h = self.norm("embedding_norm", e), self.norm("state_norm", states)
        q = self.rotate((x @ self.w["model.q_proj.weight"].T).view(n, c["num_attention_heads"], -1), n)
        k = self.rotate((h @ self.w["model.k_proj.weight"].T).view(n, c["num_key_value_heads"], -1), n)
        v = (h @ self.w["model.v_proj.weight"].T).view(n, c["num_key_value_heads"], -1)
        k, v = (t.repeat_interleave(c["num_attention_heads"] // c["num_key_value_heads"], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * c["head_dim"] ** -0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ self.w["model.o_proj.weight"].T + e
        if c["newest_state"] != "none":
            y = y + self.norm("newest_norm", states)
        x = self.norm("mlp_norm", y)
        if c["token_in_mlp"]:
            x = x + self.norm("token_norm", e)
        gated = ACT2FN[c["hidden_act"]](x @ self.w["model.gate_proj.weight"].T) * (x @ self.w["model.up_proj.weight"].T)
        return y + gated @ self.w["model.down_proj.weight"].T

    def draft(self, ids, root, states, depth):
        tokens, drafted = [*ids[1:], root], []
        for _ in range(depth):
            newest = self.states(torch.tensor(tokens), states)[-1:]
            if self.c["draft_vocab_size"] is None:  # the target's LM head is shared
                drafted.append(int(self.target.logits(newest).argmax()))
            else:
                logits = newest @ self.w["lm_head.weight"].T + self.w.get("lm_head.bias", 0)
                drafted.append(int(self.w["draft_vocab"][logits.argmax()]))
            tokens, states = [*tokens, drafted[-1]], torch.cat([states, newest])
        return drafted


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"draft_vocab_size": 20}),
        ("llama", {"newest_state": "none", "num_kv_heads": 2, "token_in_mlp": False}),
        ("gemma3_text", {"draft_vocab_size": 20}),  # scaled embeddings
        ("granite", {"draft_vocab_size": 20}),  # scaled logits
        ("phi", {"draft_vocab_size": 20}),  # an LM head with a bias
    ],
    ids=str,
)
@pytest.mark.parametrize("to", ["vllm", "speculators"])
def test_exported_heads_draft_what_ours_do(tmp_path, family, overrides, to):
    target = tiny_target(family)
    if target.head.bias is not None:
        target.head.bias.copy_(0.05 * torch.randn(64))
    head = head_for(target, **overrides)
    export(head, target, tmp_path, to=to)
    states = target.prefill(torch.tensor([IDS]), target.new_cache(1, 32))[0]
    exported = AsVLLM(tmp_path, target)
    drafter = One(HeadDrafter(target, head))
    drafter.begin(IDS, states)
    drafts = {root: drafter.draft(root, TreePlan("chain", 5)).tokens for root in range(3, 13)}
    assert {root: exported.draft(IDS, root, states, 5) for root in drafts} == drafts
    assert len({token for draft in drafts.values() for token in draft}) > 1  # no constant stands for a head


def test_embeddings_come_with_a_head_when_asked_for(tmp_path):
    target = tiny_target()
    head = head_for(target, draft_vocab_size=20)
    export(head, target, tmp_path / "one")
    export(head, target, tmp_path / "two", embeddings=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert two.keys() - one.keys() == {"model.embed_tokens.weight"}
    assert torch.equal(two["model.embed_tokens.weight"], target.embed.weight)
    assert two["lm_head.weight"].shape == (20, 32)


def test_the_config_is_read_back(tmp_path):
    target = tiny_target(max_position_embeddings=77)
    head = head_for(target, draft_vocab_size=20, num_kv_heads=2, rope_theta=123.0)
    export(head, target, tmp_path)
    config = BeagleDraftConfig.from_pretrained(tmp_path)
    assert config.architectures == ["BeagleForCausalLM"]
    assert (config.vocab_size, config.draft_vocab_size, config.max_position_embeddings) == (64, 20, 77)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.rope_parameters["rope_theta"] == 123.0
    assert config.num_hidden_layers == 1


def test_a_trained_folder_is_no_exported_one(tmp_path):
    target = tiny_target()
    save_head(tiny_head(target), tmp_path, target=target.name, dtype=torch.float32, meta={})
    with pytest.raises(ValueError, match="beagle export"):
        BeagleDraftConfig.from_pretrained(tmp_path)


def test_a_speculators_folder_names_its_target(tmp_path):
    target = tiny_target()
    export(head_for(target), target, tmp_path, to="speculators", depth=4, verifier="owner/name")
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["speculators_config"]["verifier"]["name_or_path"] == "owner/name"
    assert content["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert content["transformer_layer_config"]["hidden_size"] == 32


def test_heads_that_vllm_cannot_run_are_refused(tmp_path):
    target = tiny_target()
    for overrides, reason in (
        ({"architecture": "beagle-ablated", "concat": False}, "beagle-ablated"),
        ({"architecture": "eagle"}, "architecture 'eagle'"),
    ):
        with pytest.raises(BeagleError, match=reason):
            export(tiny_head(target, **overrides), target, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(BeagleError, match="cannot write"):
        export(tiny_head(target), target, tmp_path / "file")


def test_embeddings_that_are_more_than_rows_are_refused():
    target = tiny_target()
    target.embed.register_forward_hook(lambda module, ids, out: out + 1.0)
    with pytest.raises(BeagleError, match="embeddings"):
        embedding_scale(target)
