"""The best rates that a machine has shown: on a shared one, neighbours take part of its memory's speed for minutes."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from beagle.evaluation.roofline import Machine
from beagle.files import kept_entries, write_json
from beagle.targets.loading import cache_dir
from beagle.targets.target import Target

BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux: another one whenever the machine starts


def best_rates(now: Machine, target: Target) -> Machine:
    """These rates, or better ones that were measured before, since the machine started, for the target's dtype and threads.

    They are kept in the user's cache.
    """
    key = {
        "machine": platform.node() + platform.machine() + platform.processor(),
        "boot": BOOT.read_text().strip() if BOOT.is_file() else "",
        "device": torch.cuda.get_device_name() if target.device.type == "cuda" else "cpu",
        "dtype": str(target.dtype),
        "threads": torch.get_num_threads(),
    }
    path = cache_dir() / "rates.json"
    known = kept_entries(path)
    kept: Any = next((entry.get("rates") for entry in known if entry.get("key") == key), None)
    best = now
    if isinstance(kept, dict) and all(isinstance(kept.get(name), float) for name in asdict(now)):
        best = now.best(Machine(kept["bandwidth"], kept["matrix_rate"]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [entry for entry in known if entry.get("key") != key]
        write_json(path, [*others, {"key": key, "rates": asdict(best)}])
    except OSError:
        pass  # a read-only home: this run's rates are all there is
    return best
