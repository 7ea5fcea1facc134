"""Rows of question files: JSON lines or a JSON array, and what the library ``datasets`` reads."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from beagle.errors import BeagleError, first_line, required

Row = tuple[int, str, Any]  # its number from 1 on, what it is called, and a line's text or what an entry holds

_TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # endings, and what `datasets` calls the format
_PANDAS = "python -c \"import pandas; pandas.read_parquet('{0}').to_json('{0}.jsonl', orient='records', lines=True)\""
_OTHERS = {  # first bytes of files that are taken for question files, and what makes one of them
    b"PAR1": ("Parquet", _PANDAS),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -d '{0}'"),
    b"\xfd7zXZ": ("xz", "xz -dk '{0}'"),
    b"BZh": ("bzip2", "bzip2 -dk '{0}'"),
    b"PK\x03\x04": ("zip", "unzip '{0}'"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 '{0}' > '{0}.jsonl'"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 '{0}' > '{0}.jsonl'"),
}


def rows(path: Path) -> Iterator[Row]:
    """Every row of a file, or of a folder that ``datasets`` saved, read no further than asked.

    Raises:
        BeagleError: it can't be read.
    """
    if path.suffix in _TABLES or _is_saved(path):
        yield from _table(path)
        return
    try:
        with path.open("rb") as file:
            packed = path.suffix == ".gz" or file.peek(2)[:2] == b"\x1f\x8b"
            yield from _lines(path, gzip.GzipFile(fileobj=file) if packed else file)
    except UnicodeDecodeError as error:
        raise BeagleError(f"question file '{path}' can't be read: {error}; save it in UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BeagleError(f"question file '{path}' can't be read: {error}; copy or compress it again") from error
    except IsADirectoryError as error:
        raise BeagleError(
            f"question file '{path}' can't be read: it is a folder, and none that `datasets` saved; give a file, or a "
            "folder that `save_to_disk` wrote"
        ) from error
    except OSError as error:
        raise BeagleError(f"question file '{path}' can't be read: {error.strerror or error}; check the path") from error


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the library ``datasets`` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _table(path: Path) -> Iterator[Row]:
    """Rows of a data set; fields without a value are left out, which in a table every row has."""
    if not path.exists():
        raise BeagleError(f"question file '{path}' can't be read: No such file; check the path")
    datasets = required("datasets", "data", f"'{path}'")  # most people have JSON
    try:
        if path.is_dir():
            found: Any = datasets.load_from_disk(str(path))
            if isinstance(found, dict):
                raise BeagleError(
                    f"'{path}' holds the splits {', '.join(found)}; give one of them: {path / next(iter(found))}"
                )
        else:
            found = datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(found, 1):
            yield number, f"{path}: row {number}", _filled(row)
    except BeagleError:
        raise
    except Exception as error:  # that library has many ways to fail
        raise BeagleError(f"'{path}' can't be read: {first_line(error)}; copy or download it again") from error


def _filled(value: Any) -> Any:
    """A row without its empty fields, and those of what it holds."""
    if isinstance(value, dict):
        return {name: _filled(inner) for name, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _lines(path: Path, file: Any) -> Iterator[Row]:
    """A line's text each, or the entries of an array."""
    start = file.peek(8)[:8]
    for magic, (name, command) in _OTHERS.items():
        if start.startswith(magic):
            raise BeagleError(
                f"question file '{path}' can't be read: it is {name}; convert it first: {command.format(path)}"
            )
    text: IO[str] = io.TextIOWrapper(file, encoding="utf-8-sig")
    number, first = next(((n, line) for n, line in enumerate(text, 1) if line.strip()), (1, ""))
    lines: Iterable[str] = text
    if first.lstrip().startswith("["):
        rest = text.read()
        try:
            entries = json.loads(first + rest)
        except (json.JSONDecodeError, RecursionError) as error:
            if not _is_json(first):
                where = f" from line {number - 1 + error.lineno} on" if isinstance(error, json.JSONDecodeError) else ""
                raise BeagleError(
                    f"question file '{path}' begins like a JSON array but is none{where}; copy or download it again"
                ) from error
            lines = rest.split("\n")
        else:
            for n, entry in enumerate(entries, 1):
                yield n, f"{path}: entry {n}", entry if isinstance(entry, dict) else []
            return
    for n, line in enumerate(chain([first], lines), number):
        if line.strip():
            yield n, f"{path}:{n}", line.strip()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
