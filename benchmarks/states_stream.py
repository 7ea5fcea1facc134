"""Hidden states from a vLLM server, streamed through a folder that never holds more than a limit.

python benchmarks/states_stream.py --url http://127.0.0.1:8000 --folder /dev/shm/states --layers 10,20 \
    --limit-mb 200 --gigabytes 2 --json results/states_stream.json

The server is started as docs/training.md says ("States from vLLM"). Samples are random tokens.
"""

from __future__ import annotations

import argparse
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch

from beagle.errors import run_script
from beagle.files import write_json
from beagle.meta import command_line, describe
from beagle.targets.loading import load_target
from beagle.training.answers import Sample
from beagle.training.vllm_states import StatesServer, VllmStates

GROUP = 4  # samples that are asked for together; the next group is under way beside them


class Watch(threading.Thread):
    """Looks at a folder as often as it can.

    Attributes:
        most: bytes that it held at its highest.
        looks: how often it was looked at.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.looks, self.ended = folder, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            held = 0
            for file in self.folder.iterdir():
                with suppress(OSError):  # it is gone
                    held += file.stat().st_size
            self.most, self.looks = max(self.most, held), self.looks + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--url", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="that the server writes to")
    parser.add_argument("--layers", default="", help="beside the top one, such as 10,20")
    parser.add_argument("--limit-mb", type=int, default=200)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="to be streamed")
    parser.add_argument("--tokens", type=int, default=450, help="of a sample")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    layers = tuple(int(layer) for layer in given.layers.split(",") if layer)
    target = load_target(given.target, state_layers=layers)
    draw = torch.Generator().manual_seed(0)
    watch, began, streamed, seen = Watch(given.folder), time.perf_counter(), 0, 0
    with VllmStates(StatesServer(given.url, given.folder, given.limit_mb * 1_000_000), target) as states:
        watch.start()
        groups = (
            [
                Sample(f"s/{at + i}", torch.randint(target.vocab_size, (given.tokens,), generator=draw), None, 0)
                for i in range(GROUP)
            ]
            for at in count(0, GROUP)
        )
        for group in states.ahead(groups):
            if streamed >= given.gigabytes * 1e9:
                break
            for sample in states(group):
                assert sample.states is not None
                streamed += sample.states.numel() * sample.states.element_size()
                seen += len(sample.tokens)
    watch.ended.set()
    watch.join()
    found = {
        "limit_bytes": given.limit_mb * 1_000_000,
        "streamed_bytes": streamed,
        "tokens": seen,
        "most_bytes": watch.most,
        "most_asked_for": states.most,
        "looks": watch.looks,
        "left_files": len(list(given.folder.iterdir())),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(found)
    if given.json:
        write_json(
            given.json, describe(target) | found | {"command": command_line("python benchmarks/states_stream.py")}
        )
    if watch.most > found["limit_bytes"]:
        raise SystemExit("the folder held more than the limit")


if __name__ == "__main__":
    run_script(main)
