"""Code that was put into a model: hooks and replaced functions.

It may do anything: act on the last token alone, count its calls, keep what it sees. A pass over a tree of drafts would
show it other tokens than ``generate`` does, so a model with such code is refused.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from accelerate.hooks import AlignDevicesHook
from torch import nn
from torch.nn.modules import module as torch_module

from beagle import hf

_HOOKS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}


def hooks_and_replaced_functions(model: nn.Module) -> str | None:
    """The first hook or replaced function of a model, in words; None if there is none that acts on answers."""
    for attribute, name in _HOOKS.items():
        for hook in getattr(torch_module, f"_global{attribute}", {}).values():
            return f"the {name} {_named(hook)} on all modules"
    for path, module in model.named_modules():
        where = path or type(module).__name__
        for attribute, name in _HOOKS.items():
            for hook in getattr(module, attribute).values():
                if not hf.is_harmless(hook):
                    return f"the {name} {_named(hook)} on {where}"
        for name in replaced_functions(module):
            if not _is_its_own(module, name):
                return f"the replaced {name} of {where}"
    return None


def has_adapters_of_one_call(model: nn.Module) -> bool:
    """Whether the call of ``generate`` under way chooses adapters for each of its rows or tokens."""
    return any(hf.is_of_one_call(hook) for module in model.modules() for hook in module._forward_pre_hooks.values())


def replaced_functions(module: nn.Module) -> list[str]:
    """Names under which a module itself has a function that hides one of its class."""
    own = [name for name, value in vars(module).items() if callable(value)]
    return [name for name in own if callable(getattr(type(module), name, None))]


def _is_its_own(module: nn.Module, name: str) -> bool:
    """Whether what hides the function of the class does just the same."""
    function: Any = vars(module)[name]
    if name == "generate" and getattr(function, "speculates", False):
        return True
    hook: Any = vars(module).get("_hf_hook")
    if name == "forward" and type(hook) is AlignDevicesHook and not hook.offload:  # moves inputs that are there already
        function = vars(module).get("_old_forward", function)
    function = getattr(function, "_torchdynamo_orig_callable", function)  # torch.compile
    method = isinstance(function, MethodType) and function.__self__ is module
    return method and function.__func__ is getattr(type(module), name)


def _named(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__)).rpartition(".")[2]
