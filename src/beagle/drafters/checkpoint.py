"""Draft checkpoints: ``config.json`` beside ``model.safetensors``, checked against the target."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import beagle.drafters.eagle3_head
import beagle.drafters.eagle_head
import beagle.drafters.head  # noqa: F401
from beagle.drafters.block import HEADS, Block
from beagle.drafters.hub import download_head, is_hub_name
from beagle.drafters.int8_weights import from_int8, to_int8
from beagle.errors import BeagleError
from beagle.files import replacing, write_json, writing_to

PARTS = "model-*-of-*.safetensors"
SHIPPED = Path(__file__).parent.parent / "heads"
MODELS = {"smollm2-135m": "smollm2-135m-instruct"}  # what names of ours stand for
GGUF_ENDING = re.compile(r"([-._](i?q\d\w*|bf16|f16|f32))?\.gguf$")


def save_head(head: Block, folder: str | Path, *, target: str, dtype: torch.dtype, meta: dict[str, Any]) -> None:
    """Write a head atomically: the weights first, then the config that makes the folder a checkpoint.

    Args:
        folder: is made, or written over.
        dtype: of its weights; int8: of its matrices, the rest is bfloat16 (see ``int8_weights``).
    """
    folder = Path(folder)
    tensors = {
        name: tensor.detach().contiguous() if tensor.is_floating_point() else tensor.to(torch.int32)
        for name, tensor in head.state_dict().items()
    }
    if dtype == torch.int8:
        tensors = to_int8(tensors)
    else:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    kind = head.architecture
    content: dict[str, Any] = {"model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"], "target": target}
    content |= {"head": asdict(head.config), "meta": meta}
    with writing_to(folder, "free space or choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as partial:
            save_file(tensors, partial)
        for part in folder.glob(PARTS):  # of a head that was here before, which would be read in its place
            part.unlink()
        write_json(folder / "config.json", content)


def weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or the parts ``model-00001-of-00002.safetensors`` … of a head that one file is too small for."""
    return sorted(folder.glob(PARTS)) or [folder / "model.safetensors"]


def shipped_head(target_name: str) -> Path | None:
    """The folder of the head that ships with this package for a target, if there is one.

    A hub id, a folder and a GGUF file of one model share the last part of their names, but for the file's quantisation.
    """
    name = MODELS.get(target_name) or Path(target_name).name.lower()
    if name.endswith(".gguf"):
        name = GGUF_ENDING.sub("", name)
    folder = SHIPPED / name
    return folder if name and (folder / "config.json").is_file() else None


def find_head(draft: str, target_name: str) -> Path:
    """The folder that a draft names: ``head`` is the one shipped for this target, ``ORG/NAME[@revision]`` one of the hub.

    Raises:
        BeagleError: there is none.
    """
    if draft == "head":
        shipped = shipped_head(target_name)
        if shipped is None:
            raise BeagleError(
                f"no head is shipped for {target_name}; train one with `beagle train`, or draft by lookup"
            )
        return shipped
    if draft and Path(draft).is_dir():
        return Path(draft)
    if is_hub_name(draft):
        if (parent := Path(draft).parent).is_dir():  # where nobody looks for an organisation of the hub
            raise BeagleError(f"draft '{draft}': no such folder in '{parent}'; check the path")
        return download_head(draft, refuse_other_models)
    raise BeagleError(
        f"draft '{draft}': no such folder; give a folder that `beagle train` wrote, ORG/NAME[@revision] of a head on the "
        "hub, auto, head, lookup, head+lookup, model:NAME or none"
    )


def refuse_other_models(folder: Path, name: str) -> None:
    """Refuse a folder, by its name, whose model is no draft head."""
    try:
        _content(folder)
    except BeagleError as error:
        raise BeagleError(
            f"draft '{name}' is no Beagle head; give one that `beagle push` uploaded, or model:{name} for a small model"
        ) from error


def kv_layers(folder: Path) -> tuple[int, ...]:
    """The layers that a head reads beside the top state, which its target must be loaded with (see ``Target``).

    Raises:
        BeagleError: it is no draft head.
    """
    settings = _content(folder)[1].get("head")
    return tuple(settings.get("kv_layers") or ()) if isinstance(settings, dict) else ()  # ``load_head`` refuses it


def head_settings(folder: Path) -> dict[str, Any]:
    """Architecture and settings of a head, as a recipe's head section has them: without what the target fixes.

    Raises:
        BeagleError: it is no draft head.
    """
    kind, content = _content(folder)
    settings = content.get("head")
    fixed = {"hidden_size", "target_vocab_size", "draft_vocab_size", *kind.config_class.removed}
    named = settings.items() if isinstance(settings, dict) else ()  # ``load_head`` refuses it
    return {"architecture": kind.architecture, **{name: value for name, value in named if name not in fixed}}


def _content(folder: Path) -> tuple[type[Block], dict[str, Any]]:
    """A checkpoint's architecture and config; refuses what is no draft head."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BeagleError(f"draft '{folder}': no config.json there; give a folder that `beagle train` wrote") from error
    except (OSError, ValueError) as error:
        raise BeagleError(f"draft '{folder}': config.json is unreadable ({error}); train or copy it again") from error
    kind = HEADS.get(str(content.get("model_type"))) if isinstance(content, dict) else None
    if kind is None:
        raise BeagleError(
            f"draft '{folder}' is no Beagle head (model_type is none of {', '.join(HEADS)}); "
            "give a folder that `beagle train` wrote"
        )
    return kind, content


def load_head(folder: str | Path, target: Any) -> Block:
    """Load a head for ``target``, onto its device in its dtype.

    Raises:
        BeagleError: missing, corrupt, or made for another target (which part differs is named).
    """
    folder = Path(folder)
    kind, content = _content(folder)
    known = {field.name for field in fields(kind.config_class)}
    try:
        settings = dict(content["head"])
        for name, only in kind.config_class.removed.items():
            if name not in known and (value := settings.pop(name, only)) != only:
                raise BeagleError(
                    f"draft '{folder}': {name} of its head is {value!r}, an ablation that is no longer drafted with; "
                    "train it again without"
                )
        if unknown := set(settings) - known:
            raise BeagleError(f"draft '{folder}': unknown setting {sorted(unknown)}; it needs a newer beagle")
        config = kind.config_class(**settings)
        with torch.device("meta"):  # no time for weights that are replaced at once
            head = kind(config)
    except (KeyError, TypeError, ValueError) as error:
        raise BeagleError(f"draft '{folder}': config.json is incomplete ({error}); train or copy it again") from error
    for what, ours, theirs in (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("vocabulary size", config.target_vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise BeagleError(
                f"draft '{folder}' was trained for {content.get('target')} ({what} {ours}), but {target.name} has "
                f"{what} {theirs}; choose the head of this target or train one with `beagle train`"
            )
    try:
        tensors = from_int8({name: t for path in weight_files(folder) for name, t in load_file(path).items()})
        tensors["draft_vocab"] = tensors["draft_vocab"].long()
        head.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        reason = (
            str(error).strip().split("\n")[:2][-1].strip()
        )  # torch's first line names a class, its second the tensor
        raise BeagleError(
            f"draft '{folder}': model.safetensors is corrupt or incomplete ({reason}); train or copy it again"
        ) from error
    if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()):
        raise BeagleError(f"draft '{folder}': model.safetensors holds NaN or infinite weights; train or copy it again")
    if int(head.draft_vocab.max()) >= target.vocab_size:
        raise BeagleError(f"draft '{folder}': its vocabulary names tokens the target does not have; train it again")
    return head.to(target.device, target.dtype).eval().requires_grad_(False)
