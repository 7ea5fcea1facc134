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

from beagle.errors import BeagleError, first_line
from beagle.files import write_json
from beagle.targets.linears import tiled

FORMAT = 5  # of a package; another one is another key
OPTIONS = {"freezing": True}  # weights become constants, packed for the products
METADATA = "about.json"


def key(*made_of: object) -> str:
    """A name for all that makes a package useless elsewhere but the weights; little to compute."""
    parts = [
        FORMAT, *made_of, torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
        sorted(OPTIONS.items()),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def path(folder: Path, key: str, weights: Mapping[str, Tensor]) -> Path:
    """Where the package of a key and of these very weights is."""
    with ThreadPoolExecutor() as pool:  # every start waits for it
        digests = pool.map(_digest, sorted(weights.items()))
        digest = hashlib.sha256(b"".join(digests)).hexdigest()
    return folder / f"{key}-{digest[:16]}"


def _digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(name.encode())
    digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def compiled_disabled() -> bool:
    """Whether ``BEAGLE_COMPILED=0`` asks for the eager pass."""
    return os.environ.get("BEAGLE_COMPILED") == "0"


def find(folder: Path, key: str, weights: Callable[[], Mapping[str, Tensor]]) -> Path | None:
    """The package, if there is one and compiled passes are not disabled."""
    if compiled_disabled() or not any(folder.glob(f"{key}-*")):
        return None
    found = path(folder, key, weights())
    return found if found.is_dir() else None


@contextmanager
def writing(package: Path, metadata: dict[str, Any]) -> Iterator[Path]:
    """A folder to write in; it becomes the package, with its metadata, when all is written.

    Raises:
        BeagleError: there is no room.
    """
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=package.parent, prefix="."))
    except OSError as error:
        raise _unwritable(package, error) from error
    try:
        yield partial
        write_json(partial / METADATA, metadata)
        shutil.rmtree(package, ignore_errors=True)
        partial.rename(package)
    except OSError as error:
        raise _unwritable(package, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export(graph: nn.Module, inputs: tuple[Any, ...], shapes: tuple[Any, ...], library: Path, name: str) -> None:
    """Compile a graph into one shared library, its weights inside.

    Args:
        shapes: ``torch.export``'s dynamic shapes of the inputs.
    Raises:
        BeagleError: the graph can't be traced, or there is no compiler.
    """
    try:
        traced = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
        package = str(library.with_suffix(".pt2"))
        torch._inductor.aoti_compile_and_package(
            traced,
            package_path=package,
            inductor_configs={**OPTIONS, "aot_inductor.custom_ops_to_c_shims": tiled.c_shims()},
        )
        # the package would be unpacked anew by every process, and its tree of inputs parsed by every call
        with zipfile.ZipFile(package) as archive, library.open("wb") as out:
            (inside,) = [entry for entry in archive.namelist() if entry.endswith(".so")]
            shutil.copyfileobj(archive.open(inside), out)
        os.remove(package)
    except OSError:
        raise
    except Exception as error:  # tracing and compiling raise whatever they stumble over
        raise BeagleError(
            f"{name}: it can't be compiled here ({type(error).__name__}: {first_line(error)}); without it everything works "
            "as before (a C++ compiler is needed: g++ or clang)"
        ) from error


def metadata(package: Path, entry: str) -> Any:
    """An entry of what ``writing`` was given.

    Raises:
        BeagleError: the package is broken.
    """
    try:
        return json.loads((package / METADATA).read_text(encoding="utf-8"))[entry]
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(package) from error


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


def _unreadable(package: Path) -> BeagleError:
    return BeagleError(f"the compiled graphs in {package} can't be read; delete the folder")


def _unwritable(package: Path, error: OSError) -> BeagleError:
    return BeagleError(f"cannot write {package}: {error.strerror}; free space or set BEAGLE_CACHE")
