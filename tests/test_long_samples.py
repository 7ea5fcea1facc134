"""Memory of training: of long samples, whose queries are taken in parts, and of many simulated steps."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beagle.drafters.checkpoint import HEADS
from beagle.training import windows
from beagle.training.config import TrainConfig
from beagle.training.stages import stage_loss
from beagle.training.windows import Batch

SHAPE = {
    "hidden_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "target_vocab_size": 32,
}
CONFIG = TrainConfig(window=3, steps=3, noise=0.1)
KINDS = {
    "beagle": {"blocks": 2, "kv_layers": (1, 2)},
    "eagle": {},
    "eagle3": {"kv_layers": (1, 2)},
}


def make(architecture: str, n: int) -> tuple:
    torch.manual_seed(3)
    kind = HEADS[architecture]
    head = kind(kind.config_class(**{**SHAPE, **KINDS[architecture]})).double()
    size = head.config.state_size
    first, last = torch.tensor([0, 5]), torch.tensor([n - 2, n - 20])
    batch = Batch(torch.randn(2, n, 16, dtype=torch.float64), torch.randn(2, n, size, dtype=torch.float64), first, last)
    return head, batch, torch.randn(32, 16, dtype=torch.float64), torch.randn_like(batch.states)


def step(head, batch, weight, noise, stage):
    head.zero_grad()
    loss, _ = stage_loss(head, batch, (weight, None), CONFIG, stage=stage, offset=1, noise=noise)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that is made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.entries = max(self.entries, out.numel())
        return out


@pytest.mark.parametrize("stage", ["early", "late"])
@pytest.mark.parametrize("architecture", KINDS)
def test_parts_of_the_queries_give_what_all_at_once_do(architecture, stage, monkeypatch):
    made = make(architecture, 60)
    loss, gradients = step(*made, stage)
    monkeypatch.setattr(windows, "MASK", 2 * 60 * 7)  # seven queries of each sample
    monkeypatch.setattr(windows, "SCORES", 2 * 4 * 60 * 5)
    parts = []
    again = windows._again
    monkeypatch.setattr(windows, "_again", lambda *of: parts.append(of[0]) or again(*of))
    other, others = step(*made, stage)
    assert parts.count(windows._attend_part) >= 6
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-6)  # logits are float32
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", ["early", "late"])
@pytest.mark.parametrize("architecture", KINDS)
def test_no_tensor_grows_with_the_square_of_the_length(architecture, stage, monkeypatch):
    n = 512
    monkeypatch.setattr(windows, "MASK", 2**14)
    monkeypatch.setattr(windows, "SCORES", 2**15)
    made = make(architecture, n)
    with Largest() as largest:
        step(*made, stage)
    assert largest.entries < 2 * n * 3 * 32  # a state of every slot, or logits of the draft vocabulary
    monkeypatch.undo()
    with Largest() as largest:
        step(*made, stage)
    assert largest.entries >= 2 * (n // 3) * n  # else nothing was to be split


def kept_for_backward(steps: int) -> int:
    """Bytes that autograd keeps of a late stage in bf16, whose windows have as many slots as there are steps."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "intermediate_size": 128}
    kind = HEADS["beagle"]
    head = kind(kind.config_class(**shape, target_vocab_size=32, blocks=2, kv_layers=(1, 2)))
    n = 256
    batch = Batch(torch.randn(2, n, 64), torch.randn(2, n, 192), torch.tensor([16, 16]), torch.tensor([n - 2, n - 2]))
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        windows.late(head, batch, batch.states, steps, 0, steps)
    return sum(storage.nbytes() for storage in kept.values())


def test_what_is_kept_for_the_backward_pass_hardly_grows_with_the_steps():
    one = kept_for_backward(1)
    assert kept_for_backward(2) < 1.06 * one
    assert kept_for_backward(8) < 1.07 * one
