"""The paper's losing variants of both stages, against slow literal forms."""

from __future__ import annotations

import pytest
import torch

from beagle.drafters.block import Block
from beagle.drafters.eagle_head import EagleConfig, EagleHead
from beagle.drafters.head import BeagleHead, HeadConfig
from beagle.research.ablations import AblatedHead, early_random, late_window
from beagle.training.config import TrainConfig
from beagle.training.stages import stage_loss
from beagle.training.windows import Batch, early, late
from windows import make_batch, make_head, rope


def alone(head: BeagleHead, batch: Batch, row: int, slot: int, base: int, predicted: dict[int, torch.Tensor]):
    """One query: true keys up to ``base``, behind them ``predicted`` states by slot, up to its own."""
    k, v = head.keys_values(batch.states[row, : base + 1], rope(head, torch.arange(base + 1)))
    newest = batch.states[row, base]
    for at in sorted(predicted):
        if not isinstance(head, AblatedHead) or head.config.concat:
            own = head.keys_values(predicted[at][None], rope(head, torch.tensor([at])))
            k, v = torch.cat([k, own[0]], dim=1), torch.cat([v, own[1]], dim=1)
        newest = predicted[at]
    embedding = batch.embeddings[row, slot + 1][None]
    q = head.queries(embedding, rope(head, torch.tensor([slot])))
    return head.finish(head.attend(q[None], k[None], v[None], None)[0], embedding, newest[None])[0]


@pytest.mark.parametrize("overrides", [{}, {"num_kv_heads": 2, "newest_state": "none"}, {"concat": False}], ids=str)
@pytest.mark.parametrize(("window", "offset", "steps"), [(1, 0, 1), (3, 2, 2), (3, 0, 3), (4, 1, 3)])
def test_late_window_is_every_query_of_the_rest_of_its_window(overrides, window, offset, steps):
    head, batch = make_head(**overrides), make_batch()
    parts = late_window(head, batch, batch.states, window, offset, steps)
    seen = set()
    for step, (states, slots, real) in enumerate(parts, 1):
        for row, i in real.nonzero().tolist():
            slot, first = int(slots[row, i]), int(batch.first[row])
            base = slot - (slot - first + offset) % window
            assert step <= slot - base + 1 <= window
            predicted: dict[int, torch.Tensor] = {}
            for at in range(base + 1, base + step):
                predicted[at] = alone(head, batch, row, at - 1, base, predicted)
            expected = alone(head, batch, row, slot, base, predicted)
            torch.testing.assert_close(states[row, i], expected, atol=1e-5, rtol=1e-5)
            seen.add((step, row, slot))
    whole = {
        (step, row, slot)
        for row, (first, last) in enumerate(zip(batch.first.tolist(), batch.last.tolist(), strict=True))
        for base in range(first + (-offset) % window, last + 1, window)
        for step in range(1, steps + 1)
        for slot in range(base + step - 1, min(base + window - 1, last) + 1)
    }
    assert seen == whole


def test_late_window_holds_the_next_tokens_of_the_sliced_form():
    head, batch = make_head(), make_batch()
    sliced = late(head, batch, batch.states, 4, 1, 3)
    whole = late_window(head, batch, batch.states, 4, 1, 3)
    for step, ((a, at, _), (b, every, _)) in enumerate(zip(sliced, whole, strict=True)):
        ahead = 4 - step
        assert torch.equal(every[:, ::ahead], at)
        torch.testing.assert_close(b[:, ::ahead], a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 4])
def test_random_masks_hide_up_to_a_window_of_the_newest_keys(window):
    head, batch = make_head(), make_batch()
    hidden: list[int] = []
    for seed in range(6):
        torch.manual_seed(seed)
        states, slots, real = early_random(head, batch, batch.states, window, 0)
        for row, i in real.nonzero().tolist():
            slot = int(slots[row, i])
            found = [
                h
                for h in range(min(window, slot + 1))
                if torch.allclose(states[row, i], alone(head, batch, row, slot, slot - h, {}))
            ]
            assert len(found) == 1  # the keys up to one base, and no other
            hidden += found
    assert set(hidden) == set(range(window))
    assert sum(hidden) / len(hidden) == pytest.approx((window - 1) / 2, abs=0.35)
    if window > 1:  # not one draw for all
        torch.manual_seed(0)
        ordered = early(head, batch, batch.states, window, 0)[0]
        assert not torch.allclose(ordered, states)


def saved_bytes(head: Block, window: int, *, stage: str = "late") -> int:
    """Bytes that autograd keeps for the backward pass of one batch, each storage once, weights apart."""
    torch.manual_seed(0)
    d, n, rows = head.config.hidden_size, 8 * 15 + 2, 2
    batch = Batch(
        torch.randn(rows, n, d),
        torch.randn(rows, n, d),
        torch.zeros(rows, dtype=torch.long),
        torch.full((rows,), n - 3),
    )
    lm_head = (torch.randn(head.config.target_vocab_size, d), None)
    config = TrainConfig(window=window, steps=window, regression=0.1)
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stage_loss(head, batch, lm_head, config, stage=stage, offset=0, noise=torch.zeros_like(batch.states))
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


SHAPE = {"hidden_size": 64, "num_heads": 2, "head_dim": 32, "intermediate_size": 256, "target_vocab_size": 32}


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_late_stage_memory_does_not_grow_with_steps_and_eagles_does(kv_heads):
    """With window = steps every setting supervises every slot once."""
    ours = BeagleHead(HeadConfig(**SHAPE, num_kv_heads=kv_heads))
    theirs = EagleHead(EagleConfig(**SHAPE, num_kv_heads=kv_heads))
    beagle = {s: saved_bytes(ours, s) for s in (1, 2, 4, 8)}
    eagle = {s: saved_bytes(theirs, s) for s in (1, 2, 4, 8)}
    assert beagle[8] < 1.1 * beagle[1]
    assert beagle[8] < 1.5 * saved_bytes(ours, 4, stage="early")
    for steps in (2, 4, 8):
        assert 0.7 * steps < eagle[steps] / eagle[1] < 1.5 * steps
