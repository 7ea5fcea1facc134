"""C++ of ours as a shared library, built for this very machine and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from beagle.files import replacing

HEADERS = Path(__file__).parent
SECONDS = 300  # that building may take


@cache
def version(source: Path) -> str:
    """Another source, PyTorch or instruction set is another library."""
    has = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    content = b"".join(path.read_bytes() for path in (source, *sorted(HEADERS.glob("*.h"))))
    return hashlib.sha256(content + repr((torch.__version__, has)).encode()).hexdigest()[:16]


def path(folder: Path, name: str, source: Path) -> Path:
    """Where the library is, or would be.

    Args:
        folder: of all packages.
    """
    return folder / f"{name}-{version(source)}.so"


def function(library: Path, name: str) -> Any | None:
    """A function of what ``build`` made; None where there is nothing that works here."""
    try:
        return getattr(ctypes.CDLL(str(library)), name) if library.is_file() else None
    except (OSError, AttributeError):
        return None


def build(library: Path, source: Path, links: Sequence[str] = ()) -> str | None:
    """Compile a source for this machine, if that has not been done.

    Args:
        library: what becomes of it, as of ``path``.
        links: more options.

    Returns:
        Why there is none; None: it is there.
    """
    if library.is_file():
        return None
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX-512 BF16"
    compiler = os.environ.get("CXX", "g++")
    options = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", f"-I{HEADERS}"]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with replacing(library) as partial:
            command = [compiler, *options, str(source), "-o", str(partial), *links]
            subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        return f"{compiler} fails ({(error.stderr.strip().splitlines() or ['no message'])[0]})"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} can't be run ({error})"
    return None
