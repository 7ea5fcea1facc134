"""Compiled graphs in the user's cache: named by all that they were made of and for, traced, packed, found again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.files import write_json

FORMAT = 4  # of a package; another one is another key
OPTIONS = {"freezing": True}  # weights become constants, packed for the products
ABOUT = "about.json"


def kind(*made_of: object) -> str:
    """A name for all that makes a package useless elsewhere but the weights; little to compute."""
    about = [
        FORMAT, *made_of, torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
        sorted(OPTIONS.items()),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def place(folder: Path, kind: str, weights: Mapping[str, Tensor]) -> Path:
    """Where the package of a kind and of these very weights is."""
    with ThreadPoolExecutor() as pool:  # every start waits for it
        digests = pool.map(_digest, sorted(weights.items()))
        digest = hashlib.sha256(b"".join(digests)).hexdigest()
    return folder / f"{kind}-{digest[:16]}"


def _digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(name.encode())
    digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def left_aside() -> bool:
    """Whether ``BEAGLE_COMPILED=0`` asks for the eager pass."""
    return os.environ.get("BEAGLE_COMPILED") == "0"


def find(folder: Path, kind: str, weights: Callable[[], Mapping[str, Tensor]]) -> Path | None:
    """The package, if there is one and it isn't left aside."""
    if left_aside() or not any(folder.glob(f"{kind}-*")):
        return None
    found = place(folder, kind, weights())
    return found if found.is_dir() else None


@contextmanager
def fresh(place: Path, about: dict[str, Any]) -> Iterator[Path]:
    """A folder to write in; it takes its place, with ``about``, when all is written.

    Raises:
        BeagleError: there is no room.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=place.parent, prefix="."))
    except OSError as error:
        raise _unwritable(place, error) from error
    try:
        yield partial
        write_json(partial / ABOUT, about)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except OSError as error:
        raise _unwritable(place, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export(graph: nn.Module, inputs: tuple[Any, ...], shapes: tuple[Any, ...], library: Path, name: str) -> None:
    """Compile a graph into one shared library, its weights inside.

    Args:
        shapes: ``torch.export``'s dynamic shapes of the inputs. name: for errors.
    Raises:
        BeagleError: the graph can't be traced, or there is no compiler.
    """
    try:
        traced = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
        package = str(library.with_suffix(".pt2"))
        torch._inductor.aoti_compile_and_package(traced, package_path=package, inductor_configs=dict(OPTIONS))
        # the package would be unpacked anew by every process, and its tree of inputs parsed by every call
        with zipfile.ZipFile(package) as archive, library.open("wb") as out:
            (inside,) = [entry for entry in archive.namelist() if entry.endswith(".so")]
            shutil.copyfileobj(archive.open(inside), out)
        os.remove(package)
    except OSError:
        raise
    except Exception as error:  # tracing and compiling raise whatever they stumble over
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BeagleError(
            f"{name}: it can't be compiled here ({type(error).__name__}: {reason}); without it everything works "
            "as before (a C++ compiler is needed: g++ or clang)"
        ) from error


def about(place: Path, what: str) -> Any:
    """An entry of what ``fresh`` was given.

    Raises:
        BeagleError: the package is broken.
    """
    try:
        return json.loads((place / ABOUT).read_text(encoding="utf-8"))[what]
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(place) from error


def load(library: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """The compiled graph; it takes all inputs that are tensors, lists laid out flat, and gives all outputs so.

    Raises:
        BeagleError: the library is broken.
    """
    try:
        run: Callable[[list[Tensor]], list[Tensor]] = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run
    except (OSError, RuntimeError) as error:
        raise _unreadable(library.parent) from error
    return run


def _unreadable(place: Path) -> BeagleError:
    return BeagleError(f"the compiled graphs in {place} can't be read; delete the folder")


def _unwritable(place: Path, error: OSError) -> BeagleError:
    return BeagleError(f"cannot write {place}: {error.strerror}; free space or set BEAGLE_CACHE")
