"""Training windows against slow, literal forms of the paper's two stages, and against inference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beagle.drafters.base import TreePlan
from beagle.drafters.head import BeagleHead
from beagle.research.ablations import AblatedHead, chains
from beagle.training.stages import STAGES
from beagle.training.windows import ROUND, Batch, additive, early, late
from conftest import SCALES, tiny_drafter, tiny_target
from drafting import One
from windows import make_batch, make_head, rope

HEADS = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "newest_state": "none"},
    {"newest_through_matrix": True, "token_in_mlp": False},
    {"concat": False},
    {"concat": False, "num_kv_heads": 2, "newest_state": "none"},
]


def pieces(head: BeagleHead, out: torch.Tensor, row: int, slot: int, weights: torch.Tensor) -> torch.Tensor:
    """A scalar of one output that depends on where it stands, for comparing gradients."""
    return (out * weights[row, slot]).sum()


def unsliced(head, batch, keys_from, window, offset, steps):
    """The paper's late stage, literally: all queries at every step, one extra key buffer in place.

    Returns ``{(step, row, slot): output}`` of the slots whose immediate next token step i predicts.
    """
    n = batch.states.shape[1]
    found = {}
    for row in range(len(batch.first)):
        first, last = int(batch.first[row]), int(batch.last[row])
        bases = [b for b in range(first, last + 1) if (b - first + offset) % window == 0]
        slots = torch.arange(bases[0], n - 1) if bases else torch.arange(0)
        base_of = [max(b for b in bases if b <= int(s)) for s in slots]
        true_k, true_v = head.keys_values(keys_from[row], rope(head, torch.arange(n)))
        embeddings = batch.embeddings[row, slots + 1]
        q = head.queries(embeddings, rope(head, slots))
        # the buffer: entry i belongs to slot i; steps write what they predicted for the next slot
        buffer = {}
        newest = torch.stack([keys_from[row, b] for b in base_of])
        for step in range(1, steps + 1):
            outputs = []
            for i, slot in enumerate(slots.tolist()):
                base = base_of[i]
                k, v = true_k[:, : base + 1], true_v[:, : base + 1]
                seen = [buffer[j] for j in range(base + 1, slot + 1) if j in buffer and j < base + step]
                if seen:
                    k = torch.cat([k, *(x[0] for x in seen)], dim=1)
                    v = torch.cat([v, *(x[1] for x in seen)], dim=1)
                groups = q.shape[0] // k.shape[0]
                k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
                scores = (q[:, i : i + 1] @ k.transpose(-1, -2)) / head.config.head_dim**0.5
                out = head.finish(scores.softmax(-1) @ v, embeddings[i : i + 1], newest[i : i + 1])[0]
                outputs.append(out)
                if slot == base + step - 1 and slot <= last:
                    found[step, row, slot] = out
            fresh = newest.clone()
            for i, slot in enumerate(slots.tolist()):
                if slot == base_of[i] + step - 1:  # this state stands in for h_{slot + 1}
                    if not isinstance(head, AblatedHead) or head.config.concat:
                        buffer[slot + 1] = head.keys_values(outputs[i][None], rope(head, torch.tensor([slot + 1])))
                    if i + 1 < len(slots):
                        fresh[i + 1] = outputs[i]
            newest = fresh
    return found


def gradients(head, outputs: dict, weights) -> list[torch.Tensor]:
    head.zero_grad()
    sum(pieces(head, out, row, slot, weights) * step for (step, row, slot), out in outputs.items()).backward()
    return [p.grad.clone() for p in head.parameters() if p.grad is not None]


@pytest.mark.parametrize("overrides", HEADS, ids=str)
@pytest.mark.parametrize(("window", "offset", "steps"), [(1, 0, 1), (3, 0, 3), (3, 2, 2), (4, 1, 3), (5, 4, 5)])
def test_late_is_the_unsliced_form(overrides, window, offset, steps):
    head, batch = make_head(**overrides), make_batch()
    keys_from = batch.states + 0.2 * torch.randn(batch.states.shape, dtype=torch.float64)
    expected = unsliced(head, batch, keys_from, window, offset, steps)
    stage = chains if isinstance(head, AblatedHead) else late
    found = {}
    for step, (states, slots, real) in enumerate(stage(head, batch, keys_from, window, offset, steps), 1):
        for row, i in real.nonzero().tolist():
            found[step, row, int(slots[row, i])] = states[row, i]
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, 14, 16, dtype=torch.float64)
    for a, b in zip(gradients(head, found, weights), gradients(head, expected, weights), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("overrides", HEADS, ids=str)
@pytest.mark.parametrize(("window", "offset"), [(1, 0), (3, 0), (3, 2), (5, 3)])
def test_early_is_each_slot_alone(overrides, window, offset):
    head, batch = make_head(**overrides), make_batch()
    states, slots, real = early(head, batch, batch.states, window, offset)
    seen = set()
    for row, i in real.nonzero().tolist():
        slot, first = int(slots[row, i]), int(batch.first[row])
        seen.add((row, slot))
        base = max(0, slot - (slot - first + offset) % window)
        k, v = head.keys_values(
            batch.states[row, : base + 1], head.rotation(torch.arange(base + 1), batch.states.dtype)
        )
        embedding = batch.embeddings[row, slot + 1][None]
        attended = head.attend(
            head.queries(embedding, head.rotation(torch.tensor([slot]), embedding.dtype))[None], k[None], v[None], None
        )[0]
        alone = head.finish(attended, embedding, batch.states[row, base][None])[0]
        torch.testing.assert_close(states[row, i], alone, atol=1e-7, rtol=1e-5)
    assert seen == {(r, s) for r in range(2) for s in range(int(batch.first[r]), int(batch.last[r]) + 1)}


@pytest.mark.parametrize("stage", ["early", "late"])
@pytest.mark.parametrize("newest", ["none", "scale"])
def test_a_window_sees_its_base_and_nothing_later(stage, newest):
    head, batch, window = make_head(newest_state=newest), make_batch(), 4

    def outputs(keys_from):
        if stage == "early":
            parts = [early(head, batch, keys_from, window, 0)]
        else:
            parts = late(head, batch, keys_from, window, 0, window)
        return {
            (row, int(slots[row, i])): states[row, i].detach()
            for states, slots, real in parts
            for row, i in real.nonzero().tolist()
        }

    before = outputs(batch.states)
    base = 7  # of row 1: windows start at 3, 7, 11
    for changed in range(14):
        keys_from = batch.states.clone()
        keys_from[1, changed] += 1.0
        after = outputs(keys_from)
        for slot in range(base, base + window):
            same = torch.equal(before[1, slot], after[1, slot])
            assert same == (changed > base), (slot, changed)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"architecture": "beagle-ablated", "concat": False},
        {"num_kv_heads": 2},
        {"newest_state": "none"},
        {"architecture": "eagle"},
        {"architecture": "eagle", "num_kv_heads": 2},
        {"blocks": 3},
        {"kv_layers": (1,)},
        {"kv_layers": (1, 2), "blocks": 2, "num_kv_heads": 2},
        {"architecture": "eagle", "kv_layers": (1, 2)},
        {"architecture": "eagle3", "kv_layers": (1, 2)},
        {"architecture": "eagle3", "kv_layers": (2,), "norm_layers": False, "num_kv_heads": 2},
    ],
    ids=str,
)
def test_training_and_inference_agree(overrides):
    target = tiny_target(state_layers=overrides.get("kv_layers", ()))
    drafter = One(
        tiny_drafter(
            target, scale=SCALES[overrides.get("architecture", "beagle").removesuffix("-ablated")], **overrides
        )
    )
    simulate = STAGES[type(drafter.head)].chains
    head, depth = drafter.head, 4
    context = [5, 9, 33, 12, 60, 41, 7]
    states = target.prefill(torch.tensor([context]), target.new_cache(1, 16))[0]
    drafter.begin(context, states)
    root = 20
    draft = drafter.draft(root, TreePlan("chain", depth=depth))
    assert draft.parents == [-1, 0, 1, 2]

    tokens = torch.tensor([[*context, root, *draft.tokens]])
    n, base = tokens.shape[1], len(context) - 1
    padded = torch.full((1, n, target.state_size), 7.0)  # states after the base are unknown
    padded[0, : len(context)] = states
    batch = Batch(target.embed(tokens), padded, torch.tensor([base]), torch.tensor([n - 2]))
    score = 0.0
    for i, (predicted, slots, real) in enumerate(simulate(head, batch, padded, depth, 0, depth)):
        assert bool(real[0, 0])
        assert int(slots[0, 0]) == base + i
        log_q = F.log_softmax(target.head(predicted[0, 0]), dim=-1)
        assert int(log_q.argmax()) == draft.tokens[i]
        score += float(log_q.max())
        assert draft.scores[i] == pytest.approx(score, abs=1e-4)


def test_additive_mask():
    mask = additive(torch.tensor([True, False]), torch.float32)
    assert mask.tolist() == [0.0, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("stage", ["early", "late"])
def test_answers_of_similar_length_are_computed_in_one_shape(stage):
    """Some kernels keep what they made for every shape."""
    head, shapes = make_head(), set()
    for length in range(1, 2 * ROUND + 1):
        embeddings = torch.randn(1, 3 * ROUND, 16, dtype=torch.float64)
        batch = Batch(embeddings, torch.randn_like(embeddings), torch.tensor([2]), torch.tensor([1 + length]))
        part = (
            late(head, batch, batch.states, 3, 0, 1)[0] if stage == "late" else early(head, batch, batch.states, 3, 1)
        )
        shapes.add(part[0].shape[1])
        assert part[2].sum() == (-(-length // 3) if stage == "late" else length)
    assert len(shapes) == 2
