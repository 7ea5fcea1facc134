"""Weights on huge pages."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from beagle import memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")


def huge_bytes() -> int:
    return 1024 * sum(map(int, re.findall(r"AnonHugePages:\s+(\d+)", Path("/proc/self/smaps").read_text())))


def test_large_memory_moves_and_keeps_its_content(monkeypatch):
    monkeypatch.setattr(memory, "LEAST", 32 * memory.HUGE)
    large = torch.arange(48 * memory.HUGE // 8)
    before = huge_bytes()
    done = memory.collapse()
    if not done:
        pytest.skip("this Linux refuses")
    assert huge_bytes() - before >= 32 * memory.HUGE
    assert torch.equal(large, torch.arange(len(large)))


def test_it_can_be_left_aside(monkeypatch):
    monkeypatch.setenv("BEAGLE_HUGE_PAGES", "0")
    memory.use_huge_pages()
    assert not memory._asked_for


def test_who_measures_waits(monkeypatch):
    done = []
    monkeypatch.setenv("BEAGLE_HUGE_PAGES", "1")
    monkeypatch.setattr(memory, "PATIENCE", 1e6)
    monkeypatch.setattr(memory, "collapse", lambda: (time.sleep(0.05), done.append(1)))
    memory.use_huge_pages()
    memory.finish_huge_pages()
    assert done == [1]
