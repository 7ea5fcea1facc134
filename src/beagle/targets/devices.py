"""Models that one device does not hold: parts kept elsewhere by a device map, or every layer divided among ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.ranks import Ranks

DeviceMap = str | dict[str, str | int]


def refuse_planned_attention(device: torch.device) -> None:
    """Keep PyTorch from cuDNN's attention, for the whole process, where targets run on CUDA.

    It plans every new shape for milliseconds, and PyTorch prefers it on Hopper. Prompts and training batches are of any
    length, so that most of a training step went into plans.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def refuse_together(
    name: str,
    device: str,
    quantize: str | None,
    adapter: str | Path | None,
    device_map: DeviceMap | None,
    tensor_parallel: Ranks,
) -> None:
    """Refuse what does not go together; arguments as of ``load_target``."""
    if device_map is None and tensor_parallel.count == 1:
        return
    if device_map is not None and tensor_parallel.count > 1:
        raise BeagleError(f"target '{name}': a device map and tensor parallelism exclude each other; leave one out")
    if isinstance(device_map, str) and device_map != "auto":
        raise BeagleError(f"device map '{device_map}' is unknown; use auto")
    if device_map is not None and device != "auto":
        raise BeagleError(f"target '{name}': a device map chooses the device; leave device '{device}' out")
    what = "tensor parallelism" if device_map is None else "a device map"
    if adapter is not None:
        raise BeagleError(
            f"target '{name}': adapter '{adapter}' does not go with {what}; merge it into the weights first"
        )
    if quantize is not None:
        raise BeagleError(f"target '{name}': quantize {quantize} does not go with {what}; leave one of them out")


def options(
    name: str, device_map: DeviceMap | None, tensor_parallel: Ranks, folder: Path
) -> tuple[dict[str, Any], TemporaryDirectory[str] | None]:
    """
    Args:
        folder: where weights may be kept that a device map sends to the disk.
    Returns:
        What transformers' ``from_pretrained`` is given, and a folder that must live as long as the model.
    Raises:
        BeagleError: transformers is too old.
    """
    if tensor_parallel.count > 1:
        try:
            from transformers.distributed import DistributedConfig

            # LM head and embeddings stay whole on every rank: draft heads read their rows
            whole = {"lm_head": "replicate", "model.embed_tokens": "replicate"}
            return {"distributed_config": DistributedConfig(tp_size=tensor_parallel.count, tp_plan=whole)}, None
        except (ImportError, TypeError) as error:
            raise BeagleError(
                f"target '{name}': this transformers divides no layers among processes ({error}); update it"
            ) from error
    if device_map is None:
        return {}, None
    folder.mkdir(parents=True, exist_ok=True)
    scratch = TemporaryDirectory(dir=folder, prefix="offloaded-")
    return {"device_map": device_map, "offload_folder": scratch.name}, scratch


def refuse_unserved(model: nn.Module, name: str, tensor_parallel: Ranks) -> None:
    """Refuse a loaded model that computes on several GPUs in turn, or whose layers alone are not what is divided."""
    gpus = {device for device in getattr(model, "hf_device_map", {}).values() if device not in ("cpu", "disk")}
    if len(gpus) > 1:
        raise BeagleError(
            f"target '{name}': the device map lays its layers over {len(gpus)} GPUs, whose passes are not supported; "
            "divide the layers among the GPUs by tensor parallelism, or show PyTorch one of them (CUDA_VISIBLE_DEVICES=0)"
        )
    if tensor_parallel.count == 1:
        return
    divided = {name for name, weight in model.named_parameters() if _is_divided(weight)}
    if not divided:
        raise BeagleError(
            f"target '{name}': transformers has no plan to divide layers of type {model.config.model_type} among "  # type: ignore[union-attr]
            "processes; use a device map, or another model"
        )
    for part in (model.get_output_embeddings(), model.get_input_embeddings()):  # type: ignore[operator]
        if _is_divided(part.weight):
            raise BeagleError(
                f"target '{name}': its LM head or embedding is divided among the processes, too, so that draft heads "
                "can't read it; use a device map, or another model"
            )


def _is_divided(weight: Tensor) -> bool:
    return hasattr(weight, "full_tensor")


def device_of(model: Any) -> torch.device:
    """Where a model takes its tokens and computes, wherever its weights are kept."""
    embed = model.get_input_embeddings()
    if embed.weight.is_meta:
        return torch.device(embed._hf_hook.execution_device)
    device: torch.device = embed.weight.device
    return device


def present(module: nn.Module) -> AbstractContextManager[None]:
    """Have a module's weights at hand, where a device map keeps them elsewhere."""
    if any(weight.is_meta for weight in module.parameters(recurse=False)):
        from accelerate.utils import align_module_device

        return align_module_device(module)
    return nullcontext()


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, sorted by name, whole and at hand while it is looked at."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    names = [name for name, weight in model.named_parameters() if not (weight.is_meta and name in tied)]
    for name in sorted(names):
        module = model.get_submodule(name.rpartition(".")[0])
        with present(module):
            weight = getattr(module, name.rpartition(".")[2]).detach()
            yield name, weight.full_tensor() if _is_divided(weight) else weight
