"""The EAGLE-3 head: its training against inference one position at a time, in plain Python; what it reads, and answers."""

from __future__ import annotations

import math

import pytest
import torch

from beagle.drafters.eagle3_head import Eagle3Config, Eagle3Head
from beagle.training.stages import STAGES
from beagle.training.windows import Batch
from conftest import tiny_head, tiny_target
from test_unrolled import collected, gradients, turned

D = 16
HEADS = [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "hidden_act": "gelu", "norm_layers": False, "kv_layers": (2,)}]


def make_head(**overrides) -> Eagle3Head:
    torch.manual_seed(1)
    config = {"hidden_size": D, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "intermediate_size": 24}
    config |= {"target_vocab_size": 32, "kv_layers": (1, 2, 4)}
    head = Eagle3Head(Eagle3Config(**{**config, **overrides})).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def make_batch(head: Eagle3Head) -> Batch:
    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 12, D, generator=random, dtype=torch.float64)
    states = 3 * torch.randn(2, 12, head.config.state_size, generator=random, dtype=torch.float64)
    return Batch(embeddings, states, torch.tensor([0, 3]), torch.tensor([8, 10]))


def normed(head: Eagle3Head, norm: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + head.config.norm_eps).sqrt() * norm.weight


def fused(head: Eagle3Head, state: torch.Tensor) -> torch.Tensor:
    """g of the layers' outputs; the top state stands behind them, unread."""
    parts = [state[i * D : (i + 1) * D] for i in range(len(head.config.kv_layers))]
    if head.config.norm_layers:
        parts = [normed(head, head.layer_norms[i], part) for i, part in enumerate(parts)]
    return sum(head.layer_proj.weight[:, i * D : (i + 1) * D] @ part for i, part in enumerate(parts))


def layer(head: Eagle3Head, slots: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """ĥ of the next slot, from embedding and g of the slots 0, 1, …"""
    c, g = head.config, slots[-1][1]
    xs = [torch.cat([normed(head, head.embedding_norm, e), normed(head, head.state_norm, s)]) for e, s in slots]
    size, out = c.head_dim, []
    for h in range(c.num_heads):
        own = slice(h * size, (h + 1) * size)
        shared = h // (c.num_heads // c.num_kv_heads)
        of_kv = slice(shared * size, (shared + 1) * size)
        q = turned(head.q_proj.weight[own] @ xs[-1], len(xs) - 1, c.rope_theta)
        keys = [turned(head.k_proj.weight[of_kv] @ x, i, c.rope_theta) for i, x in enumerate(xs)]
        weights = torch.stack([q @ key for key in keys]).div(math.sqrt(size)).exp()
        values = [head.v_proj.weight[of_kv] @ x for x in xs]
        out.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
    y = head.o_proj.weight @ torch.cat(out) + g
    inner = normed(head, head.mlp_norm, y)
    a = y + head.down_proj.weight @ (head.activation(head.gate_proj.weight @ inner) * (head.up_proj.weight @ inner))
    return normed(head, head.final_norm, a)


def simulated(head: Eagle3Head, batch: Batch, steps: int) -> dict[tuple[int, int, int], torch.Tensor]:
    """``{(step, sample, slot): predicted state}``: from each base, draft step by step as inference does."""
    found = {}
    for row in range(len(batch.first)):
        first, last = int(batch.first[row]), int(batch.last[row])
        for base in range(first, last + 1):
            slots = [(batch.embeddings[row, i + 1], fused(head, batch.states[row, i])) for i in range(base + 1)]
            for step in range(1, steps + 1):
                slot = base + step - 1
                if slot > last:
                    break
                found[step, row, slot] = layer(head, slots)
                if slot < last:
                    slots.append((batch.embeddings[row, slot + 2], found[step, row, slot]))
    return found


@pytest.mark.parametrize("overrides", HEADS, ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_training_is_inference_from_every_slot(overrides, steps):
    head = make_head(**overrides)
    batch = make_batch(head)
    expected = simulated(head, batch, steps)
    found = collected(STAGES[Eagle3Head].late(head, batch, batch.states, 3, 1, steps))
    assert found.keys() == expected.keys()
    assert len(expected) > 4 * steps
    for key, state in expected.items():
        torch.testing.assert_close(found[key], state, atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, 12, D, dtype=torch.float64)
    ours, literal = gradients(head, found, weights), gradients(head, expected, weights)
    for name, gradient in literal.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4)


def test_the_top_state_is_not_read():
    head = make_head()
    batch = make_batch(head)
    outputs = []
    for changed in (0.0, 1.0):
        states = batch.states.clone()
        states[..., -D:] += changed
        outputs.append(STAGES[Eagle3Head].late(head, batch, states, 1, 0, 3))
    for (a, *_), (b, *_) in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_predicted_states_keep_their_size_however_deep():
    """Fed back behind the final norm, unlike EAGLE's first head, whose states grow."""
    head = make_head()
    batch = make_batch(head)
    for states, _, real in STAGES[Eagle3Head].late(head, batch, batch.states, 1, 0, 8):
        scaled = states[real] / head.final_norm.weight
        torch.testing.assert_close(scaled.square().mean(-1), torch.ones_like(scaled[:, 0]), atol=1e-3, rtol=1e-3)


def test_autocast_keeps_the_residual_precise():
    head = make_head().float()
    batch = make_batch(head)
    batch = Batch(batch.embeddings.float(), batch.states.float(), batch.first, batch.last)
    plain = STAGES[Eagle3Head].late(head, batch, batch.states, 1, 0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = STAGES[Eagle3Head].late(head, batch, batch.states, 1, 0, 3)
    for (a, _, real), (b, _, _) in zip(plain, rounded, strict=True):
        assert b.dtype == torch.float32
        assert (a - b)[real].abs().max() < 0.1 * a[real].abs().max()


@pytest.mark.parametrize(
    ("count", "layers"), [(30, (2, 15, 27)), (24, (2, 12, 21)), (7, (2, 3, 4)), (6, (2, 3)), (3, (1, 2)), (2, (1,))]
)
def test_layers_are_the_published_ones_where_none_are_named(count, layers):
    assert Eagle3Config.default_kv_layers(count) == layers


def test_a_target_has_its_default_layers():
    target = tiny_target(state_layers=(1, 2))
    assert tiny_head(target, architecture="eagle3").config.kv_layers == (1, 2)
    assert tiny_head(target, architecture="eagle3", kv_layers=(2,)).config.kv_layers == (2,)


def test_a_head_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        make_head(kv_layers=())
