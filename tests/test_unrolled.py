"""EAGLE's training against inference one position at a time, in plain Python, and against the drafter."""

from __future__ import annotations

import math

import pytest
import torch

from beagle.drafters.eagle_head import EagleConfig, EagleHead
from beagle.training.unrolled import chains, single, unrolled
from beagle.training.windows import Batch

HEADS = [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "hidden_act": "gelu"}]


def make_head(**overrides) -> EagleHead:
    torch.manual_seed(1)
    config = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "intermediate_size": 24}
    head = EagleHead(EagleConfig(**{**config, "target_vocab_size": 32, **overrides})).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


def make_batch() -> Batch:
    random = torch.Generator().manual_seed(0)
    embeddings, states = (torch.randn(2, 12, 16, generator=random, dtype=torch.float64) for _ in range(2))
    return Batch(embeddings, states, torch.tensor([0, 3]), torch.tensor([8, 10]))


def turned(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """RoPE of one head's vector: pairs (i, i + half) turn by position · theta^(-i / half)."""
    half = len(x) // 2
    out = []
    for i in range(len(x)):
        angle = position * theta ** -((i % half) / half)
        other = -x[i + half] if i < half else x[i - half]
        out.append(x[i] * math.cos(angle) + other * math.sin(angle))
    return torch.stack(out)


def feature(head: EagleHead, embedding: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    d = len(state)
    return head.fc.weight[:, :d] @ embedding + head.fc.weight[:, d:] @ state + head.fc.bias


def layer(head: EagleHead, xs: list[torch.Tensor]) -> torch.Tensor:
    """The decoder layer's output at the last of the features ``xs`` of slots 0, 1, …: ĥ of the next slot."""
    c, x = head.config, xs[-1]
    size, out = c.head_dim, []
    for h in range(c.num_heads):
        rows = slice(h * size, (h + 1) * size)
        shared = h // (c.num_heads // c.num_kv_heads)
        of_kv = slice(shared * size, (shared + 1) * size)
        q = turned(head.q_proj.weight[rows] @ x, len(xs) - 1, c.rope_theta)
        keys = [turned(head.k_proj.weight[of_kv] @ other, i, c.rope_theta) for i, other in enumerate(xs)]
        weights = torch.stack([q @ key for key in keys]).div(math.sqrt(size)).exp()
        values = [head.v_proj.weight[of_kv] @ other for other in xs]
        out.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
    y = head.o_proj.weight @ torch.cat(out) + x
    normed = y / (y.square().mean() + c.norm_eps).sqrt() * head.mlp_norm.weight
    return y + head.down_proj.weight @ (
        head.activation(head.gate_proj.weight @ normed) * (head.up_proj.weight @ normed)
    )


def simulated(
    head: EagleHead, batch: Batch, states: torch.Tensor, steps: int
) -> dict[tuple[int, int, int], torch.Tensor]:
    """``{(step, row, slot): predicted state}``: from each base, draft step by step as inference does."""
    found = {}
    for row in range(len(batch.first)):
        first, last = int(batch.first[row]), int(batch.last[row])
        for base in range(first, last + 1):
            xs = [feature(head, batch.embeddings[row, i + 1], states[row, i]) for i in range(base + 1)]
            for step in range(1, steps + 1):
                slot = base + step - 1
                if slot > last:
                    break
                predicted = layer(head, xs)
                found[step, row, slot] = predicted
                if slot < last:
                    xs.append(feature(head, batch.embeddings[row, slot + 2], predicted))
    return found


def collected(parts) -> dict[tuple[int, int, int], torch.Tensor]:
    return {
        (step, row, int(slots[row, i])): states[row, i]
        for step, (states, slots, real) in enumerate(parts, 1)
        for row, i in real.nonzero().tolist()
    }


def gradients(head: EagleHead, outputs: dict, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum that tells outputs of different places and steps apart."""
    head.zero_grad()
    sum((out * weights[row, slot]).sum() * step for (step, row, slot), out in outputs.items()).backward()
    return {name: parameter.grad.clone() for name, parameter in head.named_parameters()}


@pytest.mark.parametrize("overrides", HEADS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_training_is_inference_from_every_slot(overrides, steps):
    head, batch = make_head(**overrides), make_batch()
    noisy = batch.states + 0.2 * torch.randn(batch.states.shape, dtype=torch.float64)
    expected = simulated(head, batch, noisy, steps)
    found = collected(unrolled(head, batch, noisy, 3, 1, steps))
    assert found.keys() == expected.keys()
    assert len(expected) > 4 * steps
    for key, state in expected.items():
        torch.testing.assert_close(found[key], state, atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, 12, 16, dtype=torch.float64)
    ours, literal = gradients(head, found, weights), gradients(head, expected, weights)
    for name, gradient in literal.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4)


def test_single_step_is_the_first_of_the_unrolled():
    head, batch = make_head(), make_batch()
    one = collected([single(head, batch, batch.states, 5, 2)])
    expected = simulated(head, batch, batch.states, 1)
    assert one.keys() == expected.keys()
    for key, state in expected.items():
        torch.testing.assert_close(one[key], state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "offset"), [(1, 0), (3, 0), (3, 2), (4, 1)])
def test_chains_of_windows_are_those_of_their_bases(window, offset):
    head, batch = make_head(), make_batch()
    everywhere = unrolled(head, batch, batch.states, window, offset, 3)
    some = chains(head, batch, batch.states, window, offset, 3)
    for (every, at, _), (states, slots, real) in zip(everywhere, some, strict=True):
        for row, i in real.nonzero().tolist():
            assert (int(slots[row, i]) - int(at[row, 0]) + offset) % window == 0
            match = int((at[row] == slots[row, i]).nonzero())
            torch.testing.assert_close(states[row, i], every[row, match])


@pytest.mark.parametrize("what", ["states", "embeddings"])
def test_a_step_sees_nothing_later(what):
    """Of true states those up to slot i-j+1, of tokens those up to t_{i+1}."""
    head, batch, steps = make_head(), make_batch(), 3
    before = collected(unrolled(head, batch, batch.states, 1, 0, steps))
    for changed in range(12):
        other = getattr(batch, what).clone()
        other[1, changed] += 1.0
        changes = {"embeddings": batch.embeddings, "states": batch.states} | {what: other}
        now = Batch(first=batch.first, last=batch.last, **changes)
        after = collected(unrolled(head, now, now.states, 1, 0, steps))
        for (step, row, slot), state in before.items():
            seen = slot - step + 1 if what == "states" else slot + 1
            visible = row == 1 and changed <= seen and not (what == "embeddings" and changed == 0)  # t_0 is no input
            assert torch.equal(after[step, row, slot], state) != visible, (step, row, slot, changed)


def test_gradients_flow_through_predicted_states():
    head, batch = make_head(), make_batch()
    true = batch.states.clone().requires_grad_(True)
    last = collected(unrolled(head, batch, true, 1, 0, 3))[3, 1, 7]  # base 5: predicted from states 0 … 5
    last.sum().backward()
    touched = true.grad.abs().sum(-1).nonzero().tolist()
    assert touched == [[1, i] for i in range(6)]


def test_autocast_keeps_the_residual_precise():
    head = make_head().float()
    batch = make_batch()
    batch = Batch(batch.embeddings.float(), batch.states.float(), batch.first, batch.last)
    plain = unrolled(head, batch, batch.states, 1, 0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = unrolled(head, batch, batch.states, 1, 0, 3)
    for (a, _, real), (b, _, _) in zip(plain, rounded, strict=True):
        assert b.dtype == torch.float32
        assert (a - b)[real].abs().max() < 0.1 * a[real].abs().max()
