"""Memory of training: of long samples, whose queries are taken in parts, and of many simulated steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from beagle.drafters.checkpoint import HEADS
from beagle.drafters.head import BeagleHead, HeadConfig
from beagle.training import losses, windows
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
    again = windows.again
    monkeypatch.setattr(windows, "again", lambda *of: parts.append(of[0]) or again(*of))
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


def of_many_steps(samples: int = 2, n: int = 256) -> tuple[BeagleHead, Batch]:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "intermediate_size": 128}
    head = BeagleHead(HeadConfig(**shape, target_vocab_size=32, blocks=2, kv_layers=(1, 2)))
    first, last = torch.full((samples,), 16), torch.full((samples,), n - 2)
    return head, Batch(torch.randn(samples, n, 64), torch.randn(samples, n, 192), first, last)


def kept_for_backward(steps: int) -> int:
    """Bytes that autograd keeps of a late stage in bf16, whose windows have as many slots as there are steps."""
    head, batch = of_many_steps()
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


def most_bytes(work: Callable[[], object], folder: Path) -> int:
    """The most bytes of tensors that exist at a time while ``work`` runs, above what exists before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        work()
    measured.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    found = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    before = found[0][1]["Total Allocated"] - found[0][1]["Bytes"]
    return max(sizes["Total Allocated"] for _, sizes in found) - before


def test_a_step_never_holds_much_more_for_more_simulated_steps(tmp_path):
    def peak(steps: int) -> int:
        head, batch = of_many_steps(16, 64)  # scores of short samples are few beside states, as those of a wide head
        weight, noise = torch.randn(32, 64), torch.randn_like(batch.states)

        def late() -> None:
            config = TrainConfig(window=steps, steps=steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = stage_loss(head, batch, (weight, None), config, stage="late", offset=0, noise=noise)
            loss.backward()

        return most_bytes(late, tmp_path)

    one = peak(1)
    assert peak(2) < 1.08 * one
    assert peak(8) < 1.08 * one


def test_a_chunk_of_logits_is_gone_before_the_next_one_is_made(tmp_path):
    vocabulary = 4096

    def peak(slots: int) -> int:
        predicted, true, weights = torch.randn(slots, 8), torch.randn(slots, 8), torch.ones(slots)
        head = torch.randn(vocabulary, 8)
        return most_bytes(lambda: losses.slot_losses(predicted, true, head, weights), tmp_path)

    chunk = 4 * losses.CHUNK * vocabulary
    assert peak(4 * losses.CHUNK) - peak(losses.CHUNK) < chunk / 4
