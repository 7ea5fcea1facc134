"""The same weights in other GGUF types, for llama.cpp.

Takes keys, tokenizer and tensor order from a GGUF file of the model and writes its matrices, dequantised, rounded to
bf16 as our target holds them, as BF16 or Q8_0.

python benchmarks/baselines/write_gguf.py MODEL.Q4_1.gguf Q8_0 OUT.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
from gguf.quants import dequantize, quantize

from beagle.targets.loading import cache_dir, sha256

FILE_TYPES = {Kind.BF16: LlamaFileType.MOSTLY_BF16, Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0}


def write_gguf(source: Path, kind: Kind, out: Path) -> None:
    reader = GGUFReader(source)
    architecture = reader.fields[Keys.General.ARCHITECTURE].contents()
    writer = GGUFWriter(out, architecture)
    writer.add_file_type(FILE_TYPES[kind])
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE):
            continue
        part = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], part)
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        matrix = len(tensor.shape) > 1
        if matrix:
            weights = dequantize(quantize(weights, Kind.BF16), Kind.BF16)
            writer.add_tensor(tensor.name, quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, weights)
    partial = out.with_suffix(".partial")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def file_type(path: Path) -> str:
    """What most of a file's matrices are, such as Q4_1."""
    return LlamaFileType(GGUFReader(path).fields[Keys.General.FILE_TYPE].contents()).name.removeprefix("MOSTLY_")


def with_type(source: Path, kind: str) -> Path:
    """The file itself if it is of this type, else one made of it, kept in the user's cache."""
    if file_type(source) == kind:
        return source
    out = cache_dir() / "gguf" / f"{sha256(source)[:12]}-{kind}.gguf"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(source, Kind[kind], out)
    return out


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Kind[sys.argv[2]], Path(sys.argv[3]))
